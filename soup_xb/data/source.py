"""Where rows come from, and how they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from attrs import frozen

from soup_xb.core.errors import Problem
from soup_xb.core.rows.examples import Row
from soup_xb.core.rows.formats.detect import Formats
from soup_xb.core.rows.goal import Goal


def _nothing() -> tuple[Problem, ...]:
    return ()


@frozen(eq=False)
class DataSource:
    """Where rows come from: a reader that starts anew with each call.

    `name` is as the config writes it, `place` what rows name as theirs. `files` are what the rows are read from,
    `extra` what else decides which rows there are. Rows with a `goal` come over the network, and no more of them are
    taken than it asks for. `told` is what a user should know of the reading, once it is done.
    """

    name: str
    place: str
    rows: Callable[[], Iterator[Row]]
    files: tuple[Path, ...] = ()
    extra: tuple[str, ...] = ()
    goal: Goal | None = None
    told: Callable[[], tuple[Problem, ...]] = _nothing

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(file.stat().st_size for file in self.files)


@frozen
class Reading:
    """How rows are read: the format asked for, those that the task knows, and what else their meaning depends on.

    `has_columns` says whether a table can keep what becomes of them.
    """

    format: str
    formats: Formats
    extra: tuple[str, ...] = ()
    has_columns: bool = True
