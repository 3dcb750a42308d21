"""`soupx runs`: the output folders below here, and how each of them went."""

from __future__ import annotations

from pathlib import Path

import click

HEAD = ("folder", "status", "backend", "base", "steps", "loss", "when")


@click.command("runs")
@click.argument("folders", nargs=-1, metavar="[FOLDER]...", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def command(folders: tuple[Path, ...], as_json: bool) -> None:
    """List output folders: what each run was, how far it came and how it ended.

    Looks below the current directory, or below each FOLDER.
    """
    from soup_xb.core.disk import json_text
    from soup_xb.core.errors import ConfigError
    from soup_xb.core.run.listing import list_runs

    for folder in folders:
        if not folder.is_dir():
            raise ConfigError("no-such-folder", "no such folder", where=str(folder))
    runs = list_runs(folders or (Path(),))
    if as_json:
        click.echo(json_text([run.as_dict() for run in runs], indent=2))
        return
    if not runs:
        click.echo("no runs found", err=True)
        return
    for line in _table([HEAD, *(_cells(run.as_dict()) for run in runs)]):
        click.echo(line)
    for run in runs:
        if run.problem:
            click.echo(f"note: {run.path}: {run.problem}", err=True)


def _cells(run: dict[str, object]) -> tuple[str, ...]:
    loss = run["loss"]
    return (
        str(run["path"]),
        str(run["status"]),
        str(run["backend"] or "-"),
        _short(str(run["base"] or "-"), 40),
        "-" if run["steps"] is None else f"{run['steps']}/{run['total_steps']}",
        f"{loss:.4f}" if isinstance(loss, float) else "-",
        str(run["ended"] or run["started"] or "-")[:16].replace("T", " "),
    )


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else "…" + text[1 - width :]


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    rows = [tuple(_printable(cell) for cell in row) for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _printable(text: str) -> str:
    # A folder name or a record may hold escape sequences, which a terminal would obey.
    return "".join(letter if letter.isprintable() else "?" for letter in text)
