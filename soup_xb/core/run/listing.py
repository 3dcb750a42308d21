"""The output folders below a place, each with how its run went."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

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
