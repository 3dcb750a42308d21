"""Rows as columns: arrays in memory, or in files of which only what is asked for is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from attrs import frozen

from soup_xb.core.rows.examples import Source, TokenRow
from soup_xb.core.rows.preferences import LearnedRow, prompt_tokens
from soup_xb.core.rows.row_facts import prompt_key
from soup_xb.core.rows.row_kinds import RowKind, facts_of_columns, kind_of
from soup_xb.core.rows.rows import Rows, combined

Array = np.ndarray[Any, Any]

# Of tokens: `tokens` and `trained`; of sequences: the next four; of rows: the rest, `extras` being bytes of JSON.
COLUMNS: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        "tokens": np.dtype("<i4"),
        "trained": np.dtype("?"),
        "lengths": np.dtype("<i4"),
        "targets": np.dtype("<i4"),
        "prompt_lengths": np.dtype("<i4"),
        "prompt_keys": np.dtype("<u8"),
        "counts": np.dtype("<i4"),
        "lines": np.dtype("<i8"),
        "extras": np.dtype("u1"),
        "extra_lengths": np.dtype("<i4"),
    }
)
_READ_BY_ROW = ("tokens", "trained", "lines", "extras")
# Where a row stands in its file changes nothing that is learned.
_LEARNED = tuple(name for name in COLUMNS if name != "lines")


class Column(Protocol):
    """A one-dimensional array whose slices are arrays."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Array: ...


@frozen(eq=False)
class Columns:
    """The columns of rows of one kind; `digests` are the sha256 of the bytes of each, empty where not known."""

    kind: RowKind
    arrays: Mapping[str, Column]
    digests: Mapping[str, str]


class RowTable(Rows):
    """Rows of one file, out of columns."""

    def __init__(self, file: str, columns: Columns) -> None:
        self._file, self._columns, self._kind = file, columns, columns.kind
        whole = {name: columns.arrays[name][:] for name in COLUMNS if name not in _READ_BY_ROW}
        prompts = (whole["prompt_lengths"], whole["prompt_keys"])
        self.facts = facts_of_columns(whole["counts"], whole["lengths"], whole["targets"], prompts)
        self._starts = _starts(whole["lengths"])
        self._firsts = _starts(whole["counts"])
        self._extra_starts = _starts(whole["extra_lengths"])

    def row(self, index: int) -> LearnedRow:
        """The row of a number, its tokens read now."""
        arrays = self._columns.arrays
        source = Source(self._file, int(arrays["lines"][index : index + 1][0]))
        sequences = []
        for place in range(int(self._firsts[index]), int(self._firsts[index + 1])):
            here = slice(int(self._starts[place]), int(self._starts[place + 1]))
            sequences.append(TokenRow(arrays["tokens"][here], arrays["trained"][here], source))
        return self._kind.make(sequences, self._extra(index))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of every token, trained mark, length and verdict, in order."""
        known = self._columns.digests
        digests = [known.get(name) or column_digest(self._columns.arrays[name]) for name in _LEARNED]
        return combined("table", self._kind.name, *digests)

    @property
    def pairs(self) -> Array:
        """Which rows are pairs of answers."""
        return np.full(len(self), self._kind.name == "pair")

    def _extra(self, index: int) -> Any:
        if self._kind.extra is None:
            return None
        here = slice(int(self._extra_starts[index]), int(self._extra_starts[index + 1]))
        return json.loads(self._columns.arrays["extras"][here].tobytes())


def columns_of(rows: Sequence[LearnedRow]) -> dict[str, Array]:
    """The columns of rows of one kind, at least one; those that the kind has no use for are empty."""
    kind = kind_of(rows[0])
    if kind is None or any(kind_of(row) is not kind for row in rows):
        raise TypeError(
            f"no table keeps these rows: core.rows.row_kinds has no kind for {type(rows[0]).__name__}"
        )
    sequences = [sequence for row in rows for sequence in row.sequences]
    extras = [] if kind.extra is None else [json.dumps(kind.extra(row)).encode() for row in rows]
    prompted = sequences if kind.prompted else []
    found: dict[str, Any] = {
        "tokens": np.concatenate([row.tokens for row in sequences]),
        "trained": np.concatenate([row.trained for row in sequences]),
        "lengths": [row.length for row in sequences],
        "targets": [row.target_tokens for row in sequences],
        "prompt_lengths": [prompt_tokens(row).size for row in prompted],
        "prompt_keys": [prompt_key(row) for row in prompted],
        "counts": [len(row.sequences) for row in rows],
        "lines": [row.source.line for row in rows],
        "extras": np.frombuffer(b"".join(extras), dtype=np.uint8),
        "extra_lengths": [len(extra) for extra in extras],
    }
    return {name: np.asarray(found[name], dtype=dtype) for name, dtype in COLUMNS.items()}


def column_digest(column: Column) -> str:
    """sha256 of a column's bytes, read in parts."""
    digest = hashlib.sha256()
    for start in range(0, len(column), _PART):
        digest.update(column[start : start + _PART].tobytes())
    return digest.hexdigest()


_PART = 2**20


def _starts(lengths: Array) -> Array:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
