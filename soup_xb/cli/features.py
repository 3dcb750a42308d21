"""`soupx features`: what works on which backend."""

from __future__ import annotations

import json
from textwrap import wrap

import click
from attrs import asdict

from soup_xb.cli.options import json_option
from soup_xb.core.config.support import Feature, features_table
from soup_xb.core.config.support_rows import BACKENDS


@click.command()
@click.option("--backend", type=click.Choice(BACKENDS), help="Show this backend alone.")
@json_option
def command(backend: str | None, as_json: bool) -> None:
    """Show what works on which backend, and why the rest is refused."""
    shown = (backend,) if backend else BACKENDS
    table = features_table()
    if as_json:
        left_out = set(BACKENDS) - set(shown)
        rows = [{name: value for name, value in asdict(row).items() if name not in left_out} for row in table]
        click.echo(json.dumps({"features": rows}, indent=2))
        return
    width = max(len(row.name) for row in table)
    click.echo(f"{'feature':{width}}  " + "  ".join(f"{name:5}" for name in shown))
    for row in table:
        answers = "  ".join(f"{_answer(row, name):5}" for name in shown)
        click.echo(f"{row.name:{width}}  {answers}".rstrip())
    click.echo("\nwhy not:")
    for row in table:
        if any(_answer(row, name) == "no" for name in shown):
            notes = [note for note in row.notes if backend is None or not _is_of_another(note, backend)]
            click.echo(
                "\n".join(
                    wrap(
                        f"{row.name}: {'; '.join(notes)}", 100, initial_indent="  ", subsequent_indent="    "
                    )
                )
            )


def _answer(row: Feature, backend: str) -> str:
    answer: str = getattr(row, backend)
    return answer


def _is_of_another(note: str, backend: str) -> bool:
    return any(note.startswith(f"{other}: ") for other in BACKENDS if other != backend)
