"""Several documents in one sequence, each by itself: positions restart, and attention does not cross.

Best-fit packing (arXiv:2404.10830): no document is cut that fits a sequence, and sequences are nearly full.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from soup_xb.core.batches import collate
from soup_xb.core.errors import ModelError, Problem
from soup_xb.core.examples import TokenRow
from soup_xb.core.session import Session

# Two short documents show whether the second sees the first; rounding is far smaller than what that does.
_PROBE = 48
_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}


def split_long(row: TokenRow, length: int) -> list[TokenRow]:
    """A document as pieces of at most `length` tokens; a piece without a target is left out.

    The first token of a piece is not learned: nothing comes before it.
    """
    if row.length <= length:
        return [row]
    pieces = [
        TokenRow(row.tokens[start : start + length], row.trained[start : start + length], row.source)
        for start in range(0, row.length, length)
    ]
    return [piece for piece in pieces if piece.target_tokens]


def pack(rows: Sequence[TokenRow], length: int) -> tuple[TokenRow, ...]:
    """Rows put together into sequences of at most `length` tokens, in the order of their first row.

    The longest go first, each into the sequence that it fills best. Raises ValueError for a row that is longer.
    """
    return tuple(_joined([rows[index] for index in group]) for group in _groups(rows, length))


def packing_notice(documents: int, sequences: Sequence[TokenRow], length: int) -> Problem:
    """How many documents became how many sequences, and how full those are."""
    filled = sum(row.length for row in sequences) / (len(sequences) * length) if sequences else 0.0
    text = f"{documents:,} documents in {len(sequences):,} sequences of {length:,} tokens, {filled:.1%} full"
    return Problem("packing", text)


def check_apart(session: Session, rows: Sequence[TokenRow], pad_id: int) -> None:
    """Raise ModelError where the base lets a document see the one before it in its sequence.

    Models with a recurrent state do. Two documents are evaluated together and one by one.
    """
    packed = next((row for row in rows if len(row.documents) > 1), None)
    if packed is None:
        return
    first, second = (_probe(packed, index) for index in (0, 1))
    together = session.evaluate([collate([_joined([first, second])], pad_id)]).total
    alone = session.evaluate([collate([row], pad_id) for row in (first, second)]).total
    if abs(together - alone) > _TOLERANCE[session.precision] * max(1.0, alone):
        raise ModelError(
            "documents-not-apart",
            f"this base ({session.describe().model_type}) lets a document see the one before it in its sequence "
            f"(loss {together:.4f} together, {alone:.4f} alone)",
            where="data.packing",
            help="such a base takes one document a row: remove `data.packing`, or use `task: sft` with text rows.",
        )


def _probe(row: TokenRow, index: int) -> TokenRow:
    """The beginning of one document of a packed row, every token of it a target."""
    starts = (*row.documents, row.length)
    tokens = row.tokens[starts[index] : starts[index + 1]][:_PROBE]
    return TokenRow(tokens, np.arange(tokens.size) > 0, row.source)


def _groups(rows: Sequence[TokenRow], length: int) -> list[list[int]]:
    """Indices of the rows of each sequence."""
    groups: list[list[int]] = []
    # Room that is left -> sequences with that room; `rooms` has the keys in order.
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    for index in sorted(range(len(rows)), key=lambda index: (-rows[index].length, index)):
        size = rows[index].length
        if size > length:
            raise ValueError(f"a row of {size} tokens does not fit a sequence of {length}")
        place = bisect_left(rooms, size)
        if place == len(rooms):
            groups.append([])
            group, room = len(groups) - 1, length
        else:
            room = rooms[place]
            group = by_room[room].pop()
            if not by_room[room]:
                del by_room[room]
                rooms.pop(place)
        groups[group].append(index)
        left = room - size
        if left not in by_room:
            by_room[left] = []
            insort(rooms, left)
        by_room[left].append(group)
    return sorted(sorted(group) for group in groups)


def _joined(rows: Sequence[TokenRow]) -> TokenRow:
    trained = [row.trained.copy() for row in rows]
    for marks in trained:
        marks[0] = False
    return TokenRow(
        tokens=np.concatenate([row.tokens for row in rows]),
        trained=np.concatenate(trained),
        source=rows[0].source,
        documents=tuple(accumulate((row.length for row in rows[:-1]), initial=0)),
    )
