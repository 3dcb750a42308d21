"""Several documents in one sequence, each by itself: positions restart, and attention does not cross.

Best-fit packing (arXiv:2404.10830): no document is cut that fits a sequence, and sequences are nearly full.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from soup_xb.core.errors import Problem
from soup_xb.core.rows.row import Row, TokenSequence, plain_facts, text_row
from soup_xb.core.rows.table import Rows, as_rows, combined

Array = np.ndarray[Any, Any]

# Lengths that are Python numbers at one time.
_BLOCK = 65_536


class Pieces(Rows):
    """Documents as pieces of at most `length` tokens, in their order; a piece without a target is left out.

    The first token of a piece is not learned: nothing comes before it.
    """

    def __init__(self, rows: Rows, length: int) -> None:
        self._rows = rows
        sizes = rows.facts.lengths.astype(np.int64)
        counts = -(-sizes // length)
        owners = np.repeat(np.arange(len(rows)), counts)
        starts = length * (np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts))
        lengths = np.minimum(sizes[owners] - starts, length)
        targets = rows.facts.targets.astype(np.int64)[owners]
        weights = rows.facts.weights[owners]
        for index in np.flatnonzero(counts > 1):
            first = np.searchsorted(owners, index)
            document = rows.row(int(index)).sequences[0]
            for piece in range(first, first + counts[index]):
                inside = slice(int(starts[piece]) + 1, int(starts[piece] + lengths[piece]))
                targets[piece] = document.trained[inside].sum()
                weights[piece] = _weight(document, inside)
        kept = np.flatnonzero((targets > 0) | (counts[owners] == 1))
        self._owners, self._starts = owners[kept], starts[kept]
        self._cut = counts[self._owners] > 1
        self.facts = plain_facts(lengths[kept], targets[kept], weights[kept])

    def row(self, index: int) -> Row:
        """The piece of a number."""
        row = self._rows.row(int(self._owners[index]))
        if not self._cut[index]:
            return row
        document = row.sequences[0]
        here = slice(int(self._starts[index]), int(self._starts[index] + self.facts.lengths[index]))
        weights = None if document.weights is None else document.weights[here]
        return text_row(document.tokens[here], document.trained[here], document.source, weights)

    @cached_property
    def fingerprint(self) -> str:
        """That of the documents, and where they are cut."""
        return combined("pieces", self._rows.fingerprint, self._owners, self._starts)


class PackedRows(Rows):
    """Documents put together into sequences of at most `length` tokens, in the order of their first document.

    The longest go first, each into the sequence that it fills best. Raises ValueError for one that is longer.
    """

    def __init__(self, rows: Rows, length: int) -> None:
        self._rows = rows
        self._members, self._ends = _groups(rows.facts.lengths, length)
        lengths, targets, weights = (
            self._summed(values) for values in (rows.facts.lengths, rows.facts.targets, rows.facts.weights)
        )
        self.facts = plain_facts(lengths, targets, weights)

    def row(self, index: int) -> Row:
        """The sequence of a number."""
        start = int(self._ends[index - 1]) if index else 0
        members = self._members[start : self._ends[index]]
        documents = [self._rows.row(int(member)).sequences[0] for member in members]
        return Row("tokens", (joined_documents(documents),))

    @cached_property
    def fingerprint(self) -> str:
        """That of the documents, and which are together."""
        return combined("packed", self._rows.fingerprint, self._members, self._ends)

    @property
    def first_packed(self) -> TokenSequence | None:
        """The first sequence that holds several documents."""
        several = np.flatnonzero(np.diff(self._ends, prepend=0) > 1)
        return self.row(int(several[0])).sequences[0] if len(several) else None

    def _summed(self, values: Array) -> Array:
        starts = np.concatenate([[0], self._ends[:-1]]).astype(np.int64)
        wide = np.float64 if values.dtype.kind == "f" else np.int64
        return np.add.reduceat(values[self._members], starts, dtype=wide) if len(starts) else starts


def _weight(document: TokenSequence, inside: slice) -> float:
    """The sum of the weights of the targets in a part of a document."""
    marks = document.trained[inside]
    return float(
        marks.sum() if document.weights is None else document.weights[inside][marks].sum(dtype=np.float64)
    )


def split_long(rows: Sequence[Row], length: int) -> Rows:
    """Documents as pieces of at most `length` tokens."""
    known = as_rows(rows)
    return Pieces(known, length) if len(known) and known.facts.lengths.max() > length else known


def pack(rows: Sequence[Row], length: int) -> Rows:
    """Rows put together into sequences of at most `length` tokens. Raises ValueError for a row that is longer."""
    return PackedRows(as_rows(rows), length)


def packing_notice(documents: int, sequences: Rows, length: int) -> Problem:
    """How many documents became how many sequences, and how full those are."""
    filled = int(sequences.facts.lengths.sum()) / (len(sequences) * length) if len(sequences) else 0.0
    text = f"{documents:,} documents in {len(sequences):,} sequences of {length:,} tokens, {filled:.1%} full"
    return Problem("packing", text)


def _groups(lengths: Array, length: int) -> tuple[Array, Array]:
    """The rows of each sequence: their indices, sequence by sequence, and where each sequence ends in them."""
    if len(lengths) and lengths.max() > length:
        raise ValueError(f"a row of {lengths.max()} tokens does not fit a sequence of {length}")
    group_of = np.empty(len(lengths), dtype=np.int64)
    fitting = _BestFit(length)
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    for start in range(0, len(order), _BLOCK):
        block = order[start : start + _BLOCK]
        group_of[block] = [fitting.place(size) for size in lengths[block].tolist()]
    firsts = np.full(fitting.groups, len(lengths), dtype=np.int64)
    np.minimum.at(firsts, group_of, np.arange(len(lengths)))
    turns = np.empty(fitting.groups, dtype=np.int64)
    turns[np.argsort(firsts)] = np.arange(fitting.groups)
    group_of = turns[group_of]
    members = np.argsort(group_of, kind="stable")
    return members, np.cumsum(np.bincount(group_of, minlength=fitting.groups))


class _BestFit:
    """Sequences that are being filled: each document goes where it leaves the least room."""

    def __init__(self, length: int) -> None:
        self.groups = 0
        self._length = length
        # Room that is left -> sequences with that room; `_rooms` has the keys in order.
        self._by_room: dict[int, list[int]] = {}
        self._rooms: list[int] = []

    def place(self, size: int) -> int:
        """The number of the sequence that a document of `size` tokens goes into."""
        at = bisect_left(self._rooms, size)
        if at == len(self._rooms):
            group, room = self.groups, self._length
            self.groups += 1
        else:
            room = self._rooms[at]
            group = self._by_room[room].pop()
            if not self._by_room[room]:
                del self._by_room[room]
                self._rooms.pop(at)
        left = room - size
        if left not in self._by_room:
            self._by_room[left] = []
            insort(self._rooms, left)
        self._by_room[left].append(group)
        return group


def joined_documents(rows: Sequence[TokenSequence]) -> TokenSequence:
    """Sequences of one document each as one sequence; the first token of each is not learned."""
    trained = [row.trained.copy() for row in rows]
    for marks in trained:
        marks[0] = False
    weighted = any(row.weights is not None for row in rows)
    weights = [np.ones(row.length, np.float32) if row.weights is None else row.weights for row in rows]
    return TokenSequence(
        tokens=np.concatenate([row.tokens for row in rows]),
        trained=np.concatenate(trained),
        weights=np.concatenate(weights) if weighted else None,
        source=rows[0].source,
        documents=tuple(accumulate((row.length for row in rows[:-1]), initial=0)),
    )
