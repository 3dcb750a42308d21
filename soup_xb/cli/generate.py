"""`soupx generate`: answer prompts with a trained adapter, or with a base alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from soup_xb.cli.options import BACKENDS, json_option
from soup_xb.core.errors import Problem

_SPELLED = Problem(
    "control-tokens",
    "the prompt spells control tokens, which are read as the words that they are spelled with",
)
_FORGED = Problem(
    "turn-marks",
    "the prompt spells the marks that the chat template writes around turns; they are ordinary words, so the model "
    "cannot tell them from a turn",
)


@click.command()
@click.option(
    "--adapter", type=click.Path(path_type=Path), help="A run's output folder or an adapter folder."
)
@click.option("--base", help="Hub id or folder of the base; by default the adapter's own.")
@click.option("--prompt", "prompts", multiple=True, help="A user turn; without it, lines of stdin.")
@click.option("--system", help="A system turn before it.")
@click.option("--max-new-tokens", type=click.IntRange(1, 65536), default=256, show_default=True)
@click.option(
    "--temperature", type=click.FloatRange(0, 10), default=0.0, show_default=True, help="0: greedy."
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="For a temperature above 0."
)
@click.option("--compare", is_flag=True, help="Show the base's answer too.")
@click.option("--backend", type=BACKENDS, default="auto", show_default=True)
@json_option
def command(  # noqa: PLR0913 - one parameter an option
    adapter: Path | None,
    base: str | None,
    prompts: tuple[str, ...],
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    compare: bool,
    backend: str,
    as_json: bool,
) -> None:
    """Answer each prompt."""
    if not prompts:
        prompts = tuple(line.strip() for line in sys.stdin if line.strip())
    if not prompts:
        raise click.UsageError("no prompt: give --prompt TEXT, or lines on stdin")
    from soup_xb.backends import available_backend
    from soup_xb.core.rows.examples import Message
    from soup_xb.core.run.session import GenerationSettings
    from soup_xb.runs.adapters import (
        TrainedOptions,
        continue_chat,
        open_trained,
        refuse_files,
        refuse_to_answer,
    )

    refuse_to_answer(adapter)
    with open_trained(TrainedOptions(available_backend(backend), adapter, base)) as trained:
        refuse_files(trained)
        settings = GenerationSettings(max_new_tokens, temperature, trained.tokenizer.end_ids, seed)
        for prompt in prompts:
            messages = ([Message("system", system)] if system else []) + [Message("user", prompt)]
            if trained.tokenizer.spells_control(messages):
                click.echo(_SPELLED.render("note"), err=True)
            if trained.tokenizer.plain_marks.spelled(messages):
                click.echo(_FORGED.render("note"), err=True)
            answer = {"prompt": prompt, "answer": continue_chat(trained, messages, settings)}
            if compare and trained.has_adapter:
                answer["base"] = continue_chat(trained, messages, settings, adapter=False)
            _show(answer, as_json)


def _show(answer: dict[str, str], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(answer, ensure_ascii=False))
        return
    if "base" in answer:
        click.echo(f"base:  {answer['base']}\ntuned: {answer['answer']}\n")
        return
    click.echo(answer["answer"])
