"""The rows of a run: sequences whose rows are made when they are asked for, whose sizes are known beforehand."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, overload

import numpy as np

from soup_xb.core.rows.examples import TokenRow
from soup_xb.core.rows.preferences import LearnedRow, PairRow, side_names
from soup_xb.core.rows.prompts import PromptRow
from soup_xb.core.rows.row_facts import RowFacts, facts_of

Array = np.ndarray[Any, Any]


class Rows(Sequence[LearnedRow]):
    """Rows by their number. `facts` are the sizes of all of them; a row's tokens are read when it is asked for."""

    facts: RowFacts

    def __len__(self) -> int:
        return len(self.facts)

    @overload
    def __getitem__(self, index: int) -> LearnedRow: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> LearnedRow | Rows:
        if isinstance(index, slice):
            return SelectedRows(self, np.arange(len(self))[index])
        place = int(index)
        if not -len(self) <= place < len(self):
            raise IndexError(f"row {place} of {len(self)}")
        return self.row(place % len(self))

    @abstractmethod
    def row(self, index: int) -> LearnedRow:
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
    def first_packed(self) -> TokenRow | None:
        """The first row that holds several documents."""
        return None


class ListedRows(Rows):
    """Rows that are at hand one by one."""

    def __init__(self, rows: Sequence[LearnedRow]) -> None:
        self._rows = tuple(rows)
        self.facts = facts_of(self._rows)

    def row(self, index: int) -> LearnedRow:
        """The row of a number."""
        return self._rows[index]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of every token, trained mark, document's beginning, verdict, file and prompt's column, in order."""
        digest = hashlib.sha256()
        for prompt in (row for row in self._rows if isinstance(row, PromptRow)):
            digest.update(json.dumps(prompt.columns, sort_keys=True, default=str).encode())
        for name, row in (
            (name, row)
            for one in self._rows
            for name, row in zip(side_names(one), one.sequences, strict=True)
        ):
            digest.update(name.encode())
            digest.update(row.length.to_bytes(8, "little"))
            digest.update(row.tokens.tobytes())
            digest.update(np.packbits(row.trained).tobytes())
            digest.update(np.array(row.documents, dtype="<i8").tobytes())
            digest.update(row.media.digest if row.media else b"")
        return digest.hexdigest()

    @property
    def pairs(self) -> Array:
        """Which rows are pairs of answers."""
        return np.array([isinstance(row, PairRow) for row in self._rows], dtype=np.bool_)

    @property
    def first_packed(self) -> TokenRow | None:
        """The first row that holds several documents."""
        packed = (row for row in self._rows if isinstance(row, TokenRow) and len(row.documents) > 1)
        return next(packed, None)


class JoinedRows(Rows):
    """Rows that follow each other."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = tuple(parts)
        self._ends = np.cumsum([len(part) for part in self._parts])
        self.facts = RowFacts.joined([part.facts for part in self._parts])

    def row(self, index: int) -> LearnedRow:
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

    def row(self, index: int) -> LearnedRow:
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
    def first_packed(self) -> TokenRow | None:
        """The first row that holds several documents."""
        return None if self._rows.first_packed is None else ListedRows(list(self)).first_packed


def as_rows(rows: Sequence[LearnedRow]) -> Rows:
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
