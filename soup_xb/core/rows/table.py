"""The rows of a run: sequences whose rows are made when they are asked for, whose sizes are known beforehand.

Rows are at hand one by one, or are columns: arrays in memory, or in files of which only what is asked for is read.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any, Protocol, overload

import attrs
import numpy as np
from attrs import frozen

from soup_xb.core.rows.examples import Source
from soup_xb.core.rows.row import (
    KINDS,
    Row,
    RowFacts,
    RowKind,
    TokenSequence,
    facts_of,
    facts_of_columns,
    prompt_key,
)

Array = np.ndarray[Any, Any]


class Rows(Sequence[Row]):
    """Rows by their number. `facts` are the sizes of all of them; a row's tokens are read when it is asked for."""

    facts: RowFacts

    def __len__(self) -> int:
        return len(self.facts)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> Row | Rows:
        if isinstance(index, slice):
            return SelectedRows(self, np.arange(len(self))[index])
        place = int(index)
        if not -len(self) <= place < len(self):
            raise IndexError(f"row {place} of {len(self)}")
        return self.row(place % len(self))

    @abstractmethod
    def row(self, index: int) -> Row:
        """The row of a number from 0 to the last."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of everything in the rows that a model learns from, and of their order."""

    @property
    def pairs(self) -> Array:
        """Which rows are pairs of answers, bool (rows,)."""
        return np.zeros(len(self), dtype=np.bool_)

    @property
    def first_packed(self) -> TokenSequence | None:
        """The first row that holds several documents."""
        return None


class ListedRows(Rows):
    """Rows that are at hand one by one."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = tuple(rows)
        self.facts = facts_of(self._rows)

    def row(self, index: int) -> Row:
        """The row of a number."""
        return self._rows[index]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of every token, trained mark, document's beginning, verdict, file and prompt's column, in order."""
        digest = hashlib.sha256()
        for prompt in (row.extra for row in self._rows if row.kind == "prompt"):
            digest.update(json.dumps(prompt.columns, sort_keys=True, default=str).encode())
        for name, one in (
            (name, one) for row in self._rows for name, one in zip(row.sides, row.sequences, strict=True)
        ):
            digest.update(name.encode())
            digest.update(one.length.to_bytes(8, "little"))
            digest.update(one.tokens.tobytes())
            digest.update(np.packbits(one.trained).tobytes())
            digest.update(np.array(one.documents, dtype="<i8").tobytes())
            digest.update(one.media.digest if one.media else b"")
            digest.update(b"" if one.weights is None else one.weights.tobytes())
        return digest.hexdigest()

    @property
    def pairs(self) -> Array:
        """Which rows are pairs of answers."""
        return np.array([row.kind == "pair" for row in self._rows], dtype=np.bool_)

    @property
    def first_packed(self) -> TokenSequence | None:
        """The first row that holds several documents."""
        packed = (row.sequences[0] for row in self._rows if len(row.sequences[0].documents) > 1)
        return next(packed, None)


class JoinedRows(Rows):
    """Rows that follow each other."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = tuple(parts)
        self._ends = np.cumsum([len(part) for part in self._parts])
        self.facts = RowFacts.joined([part.facts for part in self._parts])

    def row(self, index: int) -> Row:
        """The row of a number."""
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[part].row(index - int(self._ends[part]) + len(self._parts[part]))

    @cached_property
    def fingerprint(self) -> str:
        """The parts' fingerprints together."""
        return combined("joined", *(part.fingerprint for part in self._parts))

    @property
    def pairs(self) -> Array:
        """Which rows are pairs of answers."""
        return np.concatenate([part.pairs for part in self._parts])


class SelectedRows(Rows):
    """Some rows of others, in the order of `indices`, int (rows,)."""

    def __init__(self, rows: Rows, indices: Array) -> None:
        self._rows, self._indices = rows, indices
        self.facts = rows.facts.take(indices)

    def row(self, index: int) -> Row:
        """The row of a number."""
        return self._rows.row(int(self._indices[index]))

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of all, and which are taken."""
        return combined("selected", self._rows.fingerprint, self._indices)

    @property
    def pairs(self) -> Array:
        """Which rows are pairs of answers."""
        return self._rows.pairs[self._indices]

    @property
    def first_packed(self) -> TokenSequence | None:
        """The first row that holds several documents."""
        return None if self._rows.first_packed is None else ListedRows(list(self)).first_packed


def as_rows(rows: Sequence[Row]) -> Rows:
    """Rows with their sizes; those that know them stay as they are."""
    return rows if isinstance(rows, Rows) else ListedRows(rows)


def join_rows(parts: Sequence[Rows]) -> Rows:
    """Rows that follow each other; one part alone stays as it is, and no part is no rows."""
    filled = [part for part in parts if len(part)]
    if len(filled) > 1:
        return JoinedRows(filled)
    return filled[0] if filled else ListedRows(())


def combined(*parts: str | Array) -> str:
    """sha256 of texts and whole numbers, each with its size."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part.astype("<i8").tobytes()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


# Of tokens: `tokens` and `trained`; of sequences: the next four; of rows: the next four, `extras` being bytes of JSON.
# `weighted` says which sequences have weights; of those `weights`, one a token, and `weight_sums`, of their targets.
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
        "weighted": np.dtype("?"),
        "weights": np.dtype("<f4"),
        "weight_sums": np.dtype("<f8"),
    }
)
_READ_BY_ROW = ("tokens", "trained", "lines", "extras", "weights")
# What of a sequence has no column has to be as it is in a sequence that has nothing of it.
_WITH_COLUMN = ("tokens", "trained", "source", "weights")
_WITHOUT_COLUMN = tuple(
    (field.name, field.default) for field in attrs.fields(TokenSequence) if field.name not in _WITH_COLUMN
)
_OF_WEIGHTS = ("weighted", "weights", "weight_sums")
# Where a row stands in its file changes nothing that is learned.
_LEARNED = tuple(name for name in COLUMNS if name not in ("lines", *_OF_WEIGHTS))


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
        self._weighted = whole["weighted"]
        sums = whole["targets"].astype(np.float64)
        sums[self._weighted] = whole["weight_sums"]
        self.facts = facts_of_columns(whole["counts"], whole["lengths"], (whole["targets"], sums), prompts)
        self._weight_starts = _starts(np.where(self._weighted, whole["lengths"], 0))
        self._starts = _starts(whole["lengths"])
        self._firsts = _starts(whole["counts"])
        self._extra_starts = _starts(whole["extra_lengths"])

    def row(self, index: int) -> Row:
        """The row of a number, its tokens read now."""
        arrays = self._columns.arrays
        source = Source(self._file, int(arrays["lines"][index : index + 1][0]))
        sequences = []
        for place in range(int(self._firsts[index]), int(self._firsts[index + 1])):
            here = slice(int(self._starts[place]), int(self._starts[place + 1]))
            weights = None
            if self._weighted[place]:
                known = slice(int(self._weight_starts[place]), int(self._weight_starts[place + 1]))
                weights = arrays["weights"][known]
            sequences.append(
                TokenSequence(arrays["tokens"][here], arrays["trained"][here], source, weights=weights)
            )
        return Row(self._kind.name, tuple(sequences), self._extra(index))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of every token, trained mark, length and verdict, in order."""
        known = self._columns.digests
        names = (*_LEARNED, *_OF_WEIGHTS) if self._weighted.any() else _LEARNED
        digests = [known.get(name) or column_digest(self._columns.arrays[name]) for name in names]
        return combined("table", self._kind.name, *digests)

    @property
    def pairs(self) -> Array:
        """Which rows are pairs of answers."""
        return np.full(len(self), self._kind.name == "pair")

    def _extra(self, index: int) -> Any:
        if not len(self._columns.arrays["extra_lengths"]):
            return None
        here = slice(int(self._extra_starts[index]), int(self._extra_starts[index + 1]))
        return json.loads(self._columns.arrays["extras"][here].tobytes())


def stored_kind(row: Row) -> RowKind | None:
    """The kind of a row that columns can hold, None for one of another kind, or with more than tokens and marks."""
    kind = KINDS[row.kind]
    plain = all(getattr(one, name) == value for one in row.sequences for name, value in _WITHOUT_COLUMN)
    return kind if kind.stored and plain else None


def columns_of(rows: Sequence[Row]) -> dict[str, Array]:
    """The columns of rows of one kind, at least one; those that the kind has no use for are empty."""
    kind = stored_kind(rows[0])
    if kind is None or any(stored_kind(row) is not kind for row in rows):
        raise TypeError(f"no table holds these rows of the kind {rows[0].kind}")
    sequences = [sequence for row in rows for sequence in row.sequences]
    extras = [json.dumps(row.extra).encode() for row in rows if row.extra is not None]
    weights = [one.weights for one in sequences if one.weights is not None]
    prompted = sequences if kind.prompted else []
    found: dict[str, Any] = {
        "tokens": np.concatenate([one.tokens for one in sequences]),
        "trained": np.concatenate([one.trained for one in sequences]),
        "lengths": [one.length for one in sequences],
        "targets": [one.target_tokens for one in sequences],
        "prompt_lengths": [one.first_target for one in prompted],
        "prompt_keys": [prompt_key(one) for one in prompted],
        "counts": [len(row.sequences) for row in rows],
        "lines": [row.source.line for row in rows],
        "extras": np.frombuffer(b"".join(extras), dtype=np.uint8),
        "extra_lengths": [len(extra) for extra in extras],
        "weighted": [one.weights is not None for one in sequences],
        "weights": np.concatenate(weights) if weights else [],
        "weight_sums": [one.target_weight for one in sequences if one.weights is not None],
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
