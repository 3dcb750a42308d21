"""The `soupx` group and the edge of the program: exceptions become one message and an exit code."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import click

from soup_xb import __version__
from soup_xb.core.errors import Problem, ResourceError, SoupError
from soup_xb.core.text import masked

# Name -> what it does. A command lives in the module of its name, in the variable `command`, and is imported
# only when it runs: `soupx --help` stays instant.
COMMANDS = {
    "cache": "Show or delete the tokenized rows that are kept for the next start.",
    "check": "Check a config file: every problem at once, nothing loaded.",
    "data": "Show what a data file holds and which tokens would be trained on.",
    "demo": "Fine-tune a small real model on a shipped dataset, and show the difference.",
    "doctor": "Show what this machine offers: versions, devices, speed.",
    "eval": "Loss and perplexity on a file, of the base and of the adapter.",
    "export": "Write an adapter for stock mlx-lm or stock PEFT.",
    "features": "What works on which backend.",
    "generate": "Answer a prompt with a trained adapter or a base.",
    "init": "Write a first config from a template.",
    "merge": "Fold an adapter into its base and write the whole model.",
    "migrate": "Turn a config of axolotl, LLaMA-Factory or Soup into a soup.yaml.",
    "parity": "Run the first steps on both engines and compare the numbers.",
    "plan": "Show modules, steps and learning rates of a run, without loading weights.",
    "runs": "List output folders.",
    "schema": "Print the JSON Schema of the config, for editors.",
    "templates": "List the starter configs, or show one.",
    "train": "Fine-tune: check, open the base, plan, train, save.",
}


class LazyGroup(click.Group):
    """A group that lists its commands from a table and imports one only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, sorted."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command of that name."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"soup_xb.cli.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or refuse with the closest names."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from soup_xb.core.text import did_you_mean

            raise click.UsageError(f"no such command `{args[0]}`. {did_you_mean(args[0], COMMANDS)}".strip())
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table without importing the commands."""
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="soupx")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def main(context: click.Context, debug: bool) -> None:
    """Fine-tune a language model with LoRA from one YAML file, on PyTorch or on Apple MLX."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def run() -> None:
    """Run the command line and exit; every failure is one message on stderr."""
    debug = "--debug" in sys.argv[1:] or os.environ.get("SOUPX_DEBUG") == "1"
    open_missing()
    code = _guarded(debug)
    settle()
    sys.exit(code)


def _guarded(debug: bool) -> int:
    try:
        code: Any = main.main(standalone_mode=False)
        return code if isinstance(code, int) else 0
    except SoupError as error:
        _show_traceback(debug)
        tell(str(error))
        return error.exit_code
    except click.ClickException as error:
        problem = Problem("usage", error.format_message(), help="`soupx --help` lists commands and options.")
        tell(problem.render())
        return 2
    except (KeyboardInterrupt, click.Abort) as error:
        # click turns the one into the other.
        told = error.args or getattr(error.__cause__, "args", ())
        tell(str(told[0]) if told else "stopped; nothing was written")
        return 130
    except SystemExit as end:
        # click ends by itself, with 1, where the reader of our output went away (`soupx runs | head`).
        return 0 if end.code in (None, 1) else int(end.code)
    except OSError as error:
        # No bug: a disk, a permission or a path that the system does not take.
        _show_traceback(debug)
        reason, file = error.strerror or str(error), str(error.filename or "")
        tell(Problem("system-refused", f"the system refuses: {reason}", where=file).render())
        return ResourceError.exit_code
    except Exception as error:  # noqa: BLE001 - the very edge: a bug becomes exit 1 and a request to report it
        _show_traceback(debug)
        problem = Problem(
            "bug",
            f"{type(error).__name__}: {error}",
            help="this is a bug in soup-xb; run again with `soupx --debug …` and report what it prints.",
        )
        tell(problem.render())
        return 1


def _show_traceback(debug: bool) -> None:
    if debug:
        tell(masked(traceback.format_exc()))


def open_missing() -> None:
    """Put the null device where a stream is closed (`2>&-`).

    A file of ours would get its number else, and what libraries write there would land in that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    # Python itself sets None for a stream that is closed.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            null = Path(os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115 - open to the end
            setattr(sys, name, null)


def tell(text: str) -> None:
    """Write a line to stderr; where nobody can read it, the exit code alone tells."""
    with suppress(OSError):
        click.echo(text, err=True)


def settle() -> None:
    """Flush stdout and stderr; what cannot be delivered is dropped, or Python would exit with a code of its own."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            _drop(stream)


def _drop(stream: TextIO) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
