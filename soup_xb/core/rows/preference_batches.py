"""Micro-batches of every task: rows of answers, pairs, and judged answers with their references."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from attrs import evolve

from soup_xb.core.rows.batches import (
    Comparison,
    MicroBatch,
    collate,
    eval_batches,
    process_share,
    without_targets,
)
from soup_xb.core.rows.contrast_batches import contrast_batch
from soup_xb.core.rows.embedding_rows import EmbeddingRow
from soup_xb.core.rows.examples import TokenRow
from soup_xb.core.rows.made import LazySequence
from soup_xb.core.rows.preferences import JudgedRow, LearnedRow, PairRow
from soup_xb.core.rows.prompts import PromptRow
from soup_xb.core.rows.rows import Rows, as_rows

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
    prompts = tuple(row for row in rows if isinstance(row, PromptRow))
    if prompts:
        return evolve(collate([row.sequences[0] for row in prompts], pad_id), prompts=prompts)
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


def micro_batches(
    rows: Rows,
    references: Array | None,
    batches: Sequence[Array],
    share_of: tuple[int, int],
    pad_id: int,
) -> Sequence[MicroBatch]:
    """The share of one process (its number, and how many there are) of each batch of row indices, made when asked for.

    `references` is as in `collate_rows`, for all rows.
    """

    def make(index: int) -> MicroBatch:
        if isinstance(rows[batches[index][0]], EmbeddingRow):
            # What an anchor is told from lies on all processes.
            texts = [row for row in map(rows.row, batches[index]) if isinstance(row, EmbeddingRow)]
            return contrast_batch(texts, share_of, pad_id)
        share = process_share(batches[index], *share_of)
        if not share.size:
            return _idle(rows[int(batches[index][0])], pad_id)
        return collate_rows(
            [rows[row] for row in share], None if references is None else references[share], pad_id
        )

    return LazySequence(len(batches), make)


def _idle(row: LearnedRow, pad_id: int) -> MicroBatch:
    """The micro-batch of a process that has none of the rows, so that every part of the model runs on it too."""
    if isinstance(row, TokenRow) and row.media is not None:
        return collate([without_targets(row)], pad_id)
    return collate([], pad_id)


def sequence_batches(
    rows: Sequence[LearnedRow], size: int, pad_id: int, process: int, processes: int
) -> Sequence[tuple[Array, MicroBatch]]:
    """Every sequence of every row once, one process's share: `(places, batch)` each, made when asked for.

    A place counts through the rows and, in each, through its sequences, as the flattened references do.
    """
    known = as_rows(rows)
    lengths = known.facts.sequence_lengths
    batches = eval_batches(lengths.reshape(-1), size)

    def make(index: int) -> tuple[Array, MicroBatch]:
        share = process_share(batches[index], process, processes)
        places = (divmod(int(place), lengths.shape[1]) for place in share)
        return share, collate([known.row(row).sequences[side] for row, side in places], pad_id)

    return LazySequence(len(batches), make)
