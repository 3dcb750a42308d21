"""`soupx features`: what works on which backend."""

from __future__ import annotations

import json
from textwrap import wrap
from typing import Any

import click
from attrs import asdict

from soup_xb.cli.options import json_option
from soup_xb.core.base.proven import left_out, proven_types, proven_with
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
        others = set(BACKENDS) - set(shown)
        rows = [{name: value for name, value in asdict(row).items() if name not in others} for row in table]
        told: dict[str, Any] = {"features": rows}
        if "mlx" in shown:
            told |= {"mlx_model_types": list(proven_types()), "mlx_left_out": dict(left_out())}
        click.echo(json.dumps(told, indent=2))
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
    if "mlx" in shown:
        versions = proven_with()
        click.echo(
            f"\n{len(proven_types())} model types on mlx, compared with transformers {versions['transformers']} and "
            f"mlx-lm {versions['mlx-lm']}:"
        )
        click.echo(
            "\n".join(wrap(", ".join(proven_types()), 100, initial_indent="  ", subsequent_indent="  "))
        )


def _answer(row: Feature, backend: str) -> str:
    answer: str = getattr(row, backend)
    return answer


def _is_of_another(note: str, backend: str) -> bool:
    return any(note.startswith(f"{other}: ") for other in BACKENDS if other != backend)
