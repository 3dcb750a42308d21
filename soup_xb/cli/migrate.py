"""`soupx migrate`: another tool's config as ours, with an account of every key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from attrs import asdict

from soup_xb.cli.options import json_option
from soup_xb.core.config.keys import safe_text

if TYPE_CHECKING:
    from soup_xb.migrate import Migration

_TOOLS = ("auto", "axolotl", "llama-factory", "soup")


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--from", "tool", type=click.Choice(_TOOLS), default="auto", show_default=True, help="Whose file it is."
)
@click.option(
    "--output", type=click.Path(path_type=Path), help="File to write; by default the config is printed."
)
@click.option("--force", is_flag=True, help="Overwrite what is there.")
@json_option
def command(file: Path, tool: str, output: Path | None, force: bool, as_json: bool) -> None:
    """Turn FILE of axolotl, LLaMA-Factory or Soup into a soup.yaml.

    Each of its keys is carried over, or listed with the reason why not.
    """
    from soup_xb.cli.init import write_files
    from soup_xb.core.config.yaml import read_text
    from soup_xb.migrate import migrate

    done = migrate(read_text(file), str(file), tool)
    if output is not None:
        write_files({output: done.text}, force)
    if as_json:
        click.echo(json.dumps(_plain(done, output), indent=2))
        return
    if output is None:
        click.echo(done.text, nl=False)
    _report(done, output)


def _plain(done: Migration, output: Path | None) -> dict[str, Any]:
    return {
        "from": done.tool,
        "file": done.source,
        "output": None if output is None else str(output),
        "config": done.text,
        "carried": [asdict(carried) for carried in done.carried],
        "added": [asdict(added) for added in done.added],
        "left": [asdict(left) for left in done.left],
        "check": {"ok": not done.problems, "problems": [asdict(problem) for problem in done.problems]},
    }


def _report(done: Migration, output: Path | None) -> None:
    """The account on stderr, so that the config alone can go into a file."""
    _say(f"{done.source}: {done.tool}, {len(done.carried)} keys carried over, {len(done.left)} left\n")
    for carried in done.carried:
        to = f"{carried.to}: {_value(carried.value)}" if carried.to else "as it is here"
        note = f"   ({carried.note})" if carried.note else ""
        _say(f"  {carried.line:4}  {safe_text(carried.key)} -> {to}{note}")
    if done.added:
        _say("\nadded, because the defaults differ:")
    for added in done.added:
        _say(f"        {added.key}: {_value(added.value)}   ({added.reason})")
    if done.left:
        _say("\nnot carried over:")
    for left in done.left:
        _say(f"  {left.line:4}  {safe_text(left.key)}: {left.reason}")
    _say("")
    for problem in done.problems:
        _say(problem.render("warning"))
    if output is not None:
        _say(f"wrote {output}\nnext: soupx {'check' if done.problems else 'plan'} {output}")


def _value(value: Any) -> str:
    return safe_text(json.dumps(value, ensure_ascii=False))


def _say(line: str) -> None:
    click.echo(line, err=True)
