"""`soupx runs`: the output folders below here, and how each of them went."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from attrs import asdict, frozen

from soup_xb.core.errors import CheckpointError
from soup_xb.core.run.events import last_step
from soup_xb.core.run.folder import METRICS, live_owner
from soup_xb.core.run.record import RECORD, read_record
from soup_xb.core.text import legible

MAX_DEPTH = 5
MAX_FOLDERS = 20_000
SKIPPED = frozenset({"node_modules", "__pycache__", "site-packages"})


@frozen(kw_only=True)
class ListedRun:
    """One output folder.

    `status` is that of the record, or `died` (its process is gone) or `damaged`; then `problem` has the
    reason and what is unknown is None.
    """

    path: str
    status: str
    backend: str | None = None
    base: str | None = None
    steps: int | None = None
    total_steps: int | None = None
    loss: float | None = None
    started: str | None = None
    ended: str | None = None
    problem: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The run as plain values, keys in the order above."""
        return asdict(self)


def list_runs(roots: Sequence[Path]) -> list[ListedRun]:
    """Every folder with a `run.json` at or below `roots`, in the order of their paths.

    Hidden folders, symbolic links and anything deeper than 5 levels are not entered.
    """
    found = {folder.resolve(): folder for root in roots for folder in _run_folders(root)}
    return [_listed(folder) for folder in sorted(found.values())]


def _run_folders(root: Path) -> Iterator[Path]:
    waiting = [(root, 0)]
    seen = 0
    while waiting and seen < MAX_FOLDERS:
        folder, depth = waiting.pop()
        seen += 1
        try:
            inner = [path for path in folder.iterdir() if path.name == RECORD or _is_entered(path)]
        except OSError:
            continue
        if any(path.name == RECORD for path in inner):
            yield folder
        elif depth < MAX_DEPTH:
            waiting.extend((path, depth + 1) for path in inner)


def _is_entered(path: Path) -> bool:
    return (
        not path.name.startswith(".") and path.name not in SKIPPED and path.is_dir() and not path.is_symlink()
    )


def _listed(folder: Path) -> ListedRun:
    newest = last_step(folder / METRICS)
    loss = newest.loss if newest and math.isfinite(newest.loss) else None
    try:
        record = read_record(folder / RECORD)
    except CheckpointError as error:
        return ListedRun(path=str(folder), status="damaged", loss=loss, problem=error.problems[0].message)
    status, problem = record.status, record.error
    if status == "running" and live_owner(folder) is None:
        status, problem = (
            "died",
            "its process ended without a word; `--resume` goes on from its last checkpoint",
        )
    return ListedRun(
        path=str(folder),
        status=status,
        backend=legible(record.backend),
        base=legible(record.base),
        # The record is written now and then, the metrics at every step.
        steps=max(record.steps, newest.step) if newest else record.steps,
        total_steps=record.total_steps,
        loss=loss,
        started=legible(record.started),
        ended=record.ended and legible(record.ended),
        problem=problem and _legible_lines(problem),
    )


def _legible_lines(text: str) -> str:
    return "\n".join(map(legible, text.splitlines()))


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
