"""A data file or hub dataset as token rows: tokenized once, and kept on the disk under everything they depend on."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from attrs import evolve, frozen

from soup_xb import __version__
from soup_xb.core import disk
from soup_xb.core.disk import FULL, free_bytes, user_cache
from soup_xb.core.errors import DataError, Problem, ResourceError
from soup_xb.core.process import tokenizing_processes
from soup_xb.core.rows.examples import AnyExample, Row
from soup_xb.core.rows.formats.detect import ExampleReader, Formats
from soup_xb.core.rows.row import KINDS
from soup_xb.core.rows.table import COLUMNS, Columns, ListedRows, Rows, RowTable
from soup_xb.core.run.manifest import file_sha256
from soup_xb.core.text import bytes_text
from soup_xb.data.goal import Goal
from soup_xb.data.token_cache import (
    DamagedEntryError,
    Entry,
    EntryWriter,
    entry_lock,
    entry_name,
    evict,
    open_entry,
)
from soup_xb.data.tokenize import RowTally
from soup_xb.data.workers import Batch, Tokenizing, UnkeptRowsError, tokenized


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

    `has_columns` says whether a table can keep what becomes of them; `columns` are our names for the file's.
    """

    format: str
    formats: Formats
    extra: tuple[str, ...] = ()
    has_columns: bool = True
    columns: Mapping[str, str] = MappingProxyType({})


_LIBRARIES = ("tokenizers", "transformers", "jinja2", "numpy")
# Raise it when the same file, tokenizer and settings come to other rows.
ROWS_VERSION = 2


def token_key(source: DataSource, reading: Reading, how: Tokenizing) -> dict[str, Any]:
    """The key of a source's rows, as JSON holds it."""
    template = how.tokenizer.template
    return {
        "name": [source.name, source.place],
        "files": [file_sha256(file.resolve()) for file in source.files],
        "readers": [file.suffix.lower() for file in source.files],
        "extra": [list(source.extra), list(reading.extra)],
        "goal": source.goal.words if source.goal is not None else "",
        "format": reading.format,
        "formats": list(reading.formats),
        "columns": dict(reading.columns),
        "max_length": how.max_length,
        "tokenizer": how.tokenizer.fingerprint,
        "embedding_rows": how.tokenizer.embedding_rows,
        "train_on": how.tokenizer.train_on,
        "day": template.day if template is not None and template.is_dated else "",
        "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "rows": [__version__, ROWS_VERSION],
    }


# Smaller data is tokenized in about the time that checking a kept copy takes.
KEPT_FROM_BYTES = 2**20
# A row of which no file tells the size, in bytes: about that of a short conversation.
_STREAMED_ROW = 1024

Array = np.ndarray[Any, Any]


@frozen(eq=False)
class TokenFile:
    """One file as token rows. `count` is the number of rows in the file, `unlearnable` of those without a target."""

    rows: Rows
    format: str
    reason: str
    count: int
    unlearnable: int
    truncated: int
    notices: tuple[Problem, ...]
    warnings: tuple[Problem, ...] = ()


def token_file(source: DataSource, reading: Reading, how: Tokenizing) -> TokenFile:
    """The rows of a source, from the disk where they are kept, else tokenized and, where there are many, kept.

    Raises DataError for a row that cannot be used and for a source without anything to learn, ModelError for
    conversations on a base without a chat template, ResourceError where there is no room for the rows.
    """
    # What a row says of its pictures or sounds is no column; it holds paths, not what they lead to.
    if not _is_kept(source, reading) or how.tokenizer.reads_files:
        return _in_memory(source, reading, how)
    key = token_key(source, reading, how)
    folder = user_cache("tokens") / entry_name(key)
    try:
        with entry_lock(folder):
            return _kept(source, reading, how, (folder, key))
    except UnkeptRowsError:
        return _in_memory(source, reading, how)
    except OSError as error:
        if error.errno in FULL:
            raise _no_room(folder, error) from error
        unkept = Problem(
            "tokens-not-kept",
            f"cannot write here: {error.strerror or error}; the rows stay in memory and are tokenized at each start",
            where=str(folder.parent),
            help="set `XDG_CACHE_HOME` to a folder that can be written.",
        )
    found = _in_memory(source, reading, how)
    return evolve(found, notices=(*found.notices, unkept))


def _is_kept(source: DataSource, reading: Reading) -> bool:
    if source.goal is not None:
        return reading.has_columns
    return bool(source.files) and source.size >= KEPT_FROM_BYTES


def _in_memory(source: DataSource, reading: Reading, how: Tokenizing) -> TokenFile:
    run = _Run(source, reading, how, processes=1)
    sink = _Memory(source.place)
    for batch in run.batches():
        sink.append(batch)
    return run.file(sink.rows(), run.told())


def _kept(
    source: DataSource, reading: Reading, how: Tokenizing, place: tuple[Path, Mapping[str, Any]]
) -> TokenFile:
    folder, key = place
    run = _Run(source, reading, how)
    notices: list[Problem] = []
    try:
        entry = open_entry(folder, key)
    except DamagedEntryError as error:
        text = f"the kept rows are tokenized anew: {error}"
        notices.append(Problem("kept-tokens-damaged", text, where=str(folder)))
        disk.discard(folder)
        entry = None
    if entry is None:
        return _made(run, place, notices)
    notices.append(_kept_notice(source, entry, folder, "read from"))
    return run.file(RowTable(source.place, entry.columns), entry.told, notices)


def _made(run: _Run, place: tuple[Path, Mapping[str, Any]], notices: list[Problem]) -> TokenFile:
    """Tokenize a source into an entry, and open that."""
    folder, key = place
    started, before = time.perf_counter(), _stamp(run.source)
    writer: EntryWriter | None = None
    kind = ""
    try:
        for batch in run.batches():
            if batch.rows or kind not in ("", batch.kind or kind):
                raise UnkeptRowsError
            if not batch.kind:
                continue
            kind = batch.kind
            writer = writer or EntryWriter(folder)
            writer.append(batch.columns)
        told = run.told()
        _check_unchanged(run.source, before)
        # Without a row there would be nothing to learn, which `told` refuses.
        assert writer is not None
        writer.publish(kind, key, told)
    finally:
        if writer is not None:
            writer.discard()
    evict(folder.parent, folder)
    entry = open_entry(folder, key)
    if entry is None:
        raise FileNotFoundError(2, "the rows just written are gone", str(folder))
    seconds = time.perf_counter() - started
    what = f"tokenized by {run.processes} process{'es' * (run.processes > 1)} in {seconds:.0f} s, and kept in"
    notices.append(_kept_notice(run.source, entry, folder, what))
    return run.file(RowTable(run.source.place, entry.columns), told, notices)


def _kept_notice(source: DataSource, entry: Entry, folder: Path, what: str) -> Problem:
    rows = len(entry.columns.arrays["lines"])
    return Problem(
        "kept-tokens", f"{rows:,} rows {what} {folder} ({bytes_text(entry.bytes)})", where=source.name
    )


class _Run:
    """Tokenizing a source once; `told` is what a later start has to know of it."""

    def __init__(
        self, source: DataSource, reading: Reading, how: Tokenizing, processes: int | None = None
    ) -> None:
        self.source, self._reading, self._how = source, reading, how
        self._asked = processes
        self.processes = 1
        self._tally = RowTally(source.name, how.max_length)
        self._reader: ExampleReader | None = None
        self._rows = 0
        self._ended: tuple[Problem, ...] = ()

    def batches(self) -> Iterator[Batch]:
        """The rows in order, as many as the source's goal asks for."""
        self._reader = ExampleReader(
            self.source.rows(),
            self._reading.format,
            self.source.name,
            self._reading.formats,
            self._reading.columns,
        )
        examples, goal = iter(self._reader), self.source.goal
        if goal is None:
            yield from self._tokenized(examples, self.source.size)
        else:
            yield from self._until(goal, examples, self._reader)

    def _tokenized(self, examples: Iterator[AnyExample], size: int) -> Iterator[Batch]:
        processes = self._asked or tokenizing_processes(size)
        self.processes = max(self.processes, processes)
        for batch in tokenized(examples, self._how, processes):
            self._tally.merge(batch.tally)
            self._rows += len(batch.columns["lines"]) if batch.kind else len(batch.rows)
            yield batch

    def _until(self, goal: Goal, examples: Iterator[AnyExample], reader: ExampleReader) -> Iterator[Batch]:
        held = 0
        while count := goal.examples_to_read(reader.count, held):
            before = reader.count
            for batch in self._tokenized(islice(examples, count), count * _STREAMED_ROW):
                held += goal.held(*_sizes(batch))
                yield batch
            if reader.count - before < count:
                self._ended = (goal.ended_early(held, self.source.name),)
                return

    def told(self) -> dict[str, Any]:
        """What became of the rows. Raises DataError where there is nothing to learn in any."""
        assert self._reader is not None
        if not self._rows:
            raise self._tally.nothing_to_learn(self._reader.count)
        detection = self._reader.detection
        notices = [*self._reader.notices(), *self._tally.notices(), *self.source.told(), *self._ended]
        return {
            "format": detection.name,
            "reason": detection.reason,
            "count": self._reader.count,
            "truncated": self._tally.truncated.count,
            "chats": self._tally.chats,
            "notices": [_parts(one) for one in notices],
            "warnings": [_parts(one) for one in self._tally.warnings()],
        }

    def file(self, rows: Rows, told: Mapping[str, Any], notices: list[Problem] | None = None) -> TokenFile:
        """The rows with what was told of them."""
        chat = self._how.tokenizer.notices() if told["chats"] else ()
        return TokenFile(
            rows=rows,
            format=told["format"],
            reason=told["reason"],
            count=told["count"],
            unlearnable=told["count"] - len(rows),
            truncated=told["truncated"],
            notices=(*(Problem(*one) for one in told["notices"]), *chat, *(notices or ())),
            warnings=tuple(Problem(*one) for one in told["warnings"]),
        )


class _Memory:
    """Rows gathered in memory: as one table where their kind has columns."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._batches: list[Batch] = []

    def append(self, batch: Batch) -> None:
        """Add the rows that follow."""
        if batch.kind or batch.rows:
            self._batches.append(batch)

    def rows(self) -> Rows:
        """All of them."""
        kinds = {batch.kind for batch in self._batches}
        if len(kinds) != 1 or "" in kinds:
            return ListedRows([row for batch in self._batches for row in self._listed(batch)])
        return RowTable(self._place, _joined(self._batches))

    def _listed(self, batch: Batch) -> Rows:
        return RowTable(self._place, _joined([batch])) if batch.kind else ListedRows(batch.rows)


def _sizes(batch: Batch) -> tuple[Array, Array]:
    """The sequences of each row, and the tokens of each sequence."""
    if batch.kind:
        return batch.columns["counts"], batch.columns["lengths"]
    sequences = [row.sequences for row in batch.rows]
    return np.array([len(one) for one in sequences]), np.array(
        [row.length for one in sequences for row in one]
    )


def _joined(batches: list[Batch]) -> Columns:
    arrays = {name: np.concatenate([batch.columns[name] for batch in batches]) for name in COLUMNS}
    return Columns(KINDS[batches[0].kind], arrays, {})


def _parts(problem: Problem) -> list[str]:
    return [problem.code, problem.message, problem.where, problem.help]


def _stamp(source: DataSource) -> list[tuple[int, int]]:
    return [(file.stat().st_size, file.stat().st_mtime_ns) for file in source.files]


def _check_unchanged(source: DataSource, before: list[tuple[int, int]]) -> None:
    if _stamp(source) != before:
        raise DataError(
            "changed-while-read",
            "changed while it was read",
            where=source.name,
            help="start again when it is whole.",
        )


def _no_room(folder: Path, error: OSError) -> ResourceError:
    free = free_bytes(folder)
    left = f"; {bytes_text(free)} are free" if free is not None else ""
    return ResourceError(
        "no-room-for-tokens",
        f"no room for the tokenized rows: {error.strerror}{left}",
        where=str(folder.parent),
        help="free some space, `soupx cache --clear`, or set `XDG_CACHE_HOME` to a larger disk.",
    )
