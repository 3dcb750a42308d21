"""Micro-batches of every task: rows of answers, pairs, and judged answers with their references."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from attrs import evolve

from soup_xb.core.batches import Comparison, MicroBatch, collate, eval_batches, process_share
from soup_xb.core.examples import TokenRow
from soup_xb.core.preferences import JudgedRow, LearnedRow, PairRow

Array = np.ndarray[Any, Any]


def collate_rows(rows: Sequence[LearnedRow], references: Array | None, pad_id: int) -> MicroBatch:
    """One micro-batch of rows of one kind.

    `references` is float64 (rows, sequences of a row), the log-probabilities under the base. The answers of judged
    rows are the batch; their mismatched ones are a batch beside it.
    """
    pairs = [row for row in rows if isinstance(row, PairRow)]
    if pairs:
        grid = collate([row.chosen for row in pairs] + [row.rejected for row in pairs], pad_id)
        known = None if references is None else references.T.reshape(-1)
        return evolve(grid, comparison=Comparison(reference=known))
    judged = [row for row in rows if isinstance(row, JudgedRow)]
    if judged:
        return _judged(judged, references, pad_id)
    return collate([row for row in rows if isinstance(row, TokenRow)], pad_id)


def _judged(rows: Sequence[JudgedRow], references: Array | None, pad_id: int) -> MicroBatch:
    others = [row.mismatched for row in rows if row.mismatched is not None]
    mismatched = None
    if others:
        drift = Comparison(reference=None if references is None else references[:, 1])
        mismatched = evolve(collate(others, pad_id), comparison=drift)
    comparison = Comparison(
        desirable=np.array([row.desirable for row in rows]),
        reference=None if references is None else references[:, 0],
        mismatched=mismatched,
    )
    return evolve(collate([row.answer for row in rows], pad_id), comparison=comparison)


def sequence_batches(
    rows: Sequence[LearnedRow], size: int, pad_id: int, process: int, processes: int
) -> list[tuple[Array, MicroBatch]]:
    """Every sequence of every row once, one process's share: `(places, batch)` each.

    A place counts through the rows and, in each, through its sequences, as the flattened references do.
    """
    sequences = [sequence for row in rows for sequence in row.sequences]
    lengths = np.array([sequence.length for sequence in sequences], dtype=np.int64)
    shares = (process_share(batch, process, processes) for batch in eval_batches(lengths, size))
    return [(share, collate([sequences[place] for place in share], pad_id)) for share in shares]
