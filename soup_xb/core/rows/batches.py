"""Which rows a micro-batch holds, in which order, and how they are padded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from attrs import evolve, frozen

from soup_xb.core.random_numbers import permutation
from soup_xb.core.rows.examples import Inputs, RowMedia, TokenRow, media_inputs
from soup_xb.core.rows.made import LazySequence
from soup_xb.core.rows.prompts import PromptRow, Rollout

# Rows are sorted by length inside a window of so many micro-batches: wide enough for rows of nearly equal length
# to meet, narrow enough that a window still is a random sample of the data.
WINDOW = 64

Array = np.ndarray[Any, Any]


@frozen(eq=False)
class Comparison:
    """What a preference loss knows of the rows of a micro-batch.

    With `desirable` None the rows are pairs: all chosen answers, then all rejected ones in the same order. Else they
    are answers, and `desirable`, bool (rows,), says which are as answers should be. `reference` is float64 (rows,),
    the log-probability of each row's targets under the base, None where the loss asks for none. `mismatched` holds
    answers to other prompts, with their own reference, where the loss measures the drift from the base on them.
    """

    desirable: Array | None = None
    reference: Array | None = None
    mismatched: MicroBatch | None = None


@frozen(eq=False)
class Contrast:
    """What an embedding loss knows of a micro-batch whose rows are anchors.

    `candidates` are this process's texts to be found: a positive for each anchor, then hard negatives. `count` is how
    many candidates the micro-batch has on all processes; `places`, int64 (candidates,), says which of those are this
    process's, and `right`, int64 (anchors,), which belongs to each of its anchors.
    """

    candidates: MicroBatch
    count: int
    places: Array
    right: Array


@frozen(eq=False)
class MicroBatch:
    """Rows that go through the model together.

    `tokens` is int32 (rows, length), padded on the right. `positions` is int64 (n,): the places in the flattened
    (rows * length) grid whose hidden state predicts a target; `targets` is int64 (n,), the token ids predicted
    there. `lengths` is int64 (rows,), the real tokens of each row. `position_ids` is int32 (rows, length), the place of
    each token in its document, where a row holds several documents; None where no row does. `comparison` is what
    preference tasks know besides, `contrast` what embedding tasks do. `media` are the pictures or sounds of the rows
    that have some, in order. `prompts` are the rows to answer, for tasks that sample; once they are answered the rows
    here are prompts with their answers, and `rollout` is what these earned.
    """

    tokens: Array
    positions: Array
    targets: Array
    lengths: Array
    position_ids: Array | None = None
    comparison: Comparison | None = None
    contrast: Contrast | None = None
    media: tuple[RowMedia, ...] = ()
    prompts: tuple[PromptRow, ...] = ()
    rollout: Rollout | None = None

    def inputs(self) -> Inputs:
        """What the model takes besides tokens, read from the files now and kept by nobody."""
        return media_inputs(self.media, self.tokens)

    @property
    def target_tokens(self) -> int:
        """Number of targets."""
        return int(self.targets.size)

    @property
    def row_targets(self) -> Array:
        """Number of targets of each row, int64 (rows,); they stand in `targets` row by row."""
        return np.bincount(self.positions // self.tokens.shape[1], minlength=len(self.lengths))

    @property
    def real_tokens(self) -> int:
        """Number of tokens without padding."""
        return int(self.lengths.sum())


def epoch_batches(lengths: Array, batch_size: int, seed: int, epoch: int) -> Sequence[Array]:
    """Row indices of each micro-batch of an epoch, every row once; a function of seed and epoch.

    Rows are shuffled, sorted by length inside windows so that padding stays small, cut into micro-batches, and
    the micro-batches are shuffled again, so that consecutive steps do not see consecutive lengths.
    """
    order = permutation(len(lengths), "rows", seed, epoch)
    window = WINDOW * batch_size
    for start in range(0, len(order), window):
        rows = order[start : start + window]
        order[start : start + window] = rows[np.argsort(lengths[rows], kind="stable")]
    # A window is a whole number of micro-batches, so cutting the order is cutting the windows.
    batches = _cut(order, batch_size)
    turns = permutation(len(batches), "batches", seed, epoch)
    return LazySequence(len(batches), lambda turn: batches[int(turns[turn])])


def eval_batches(lengths: Array, batch_size: int) -> Sequence[Array]:
    """Row indices of each evaluation micro-batch, longest rows first, so that a lack of memory shows at once."""
    return _cut(np.argsort(-np.asarray(lengths), kind="stable"), batch_size)


def _cut(order: Array, size: int) -> Sequence[Array]:
    return LazySequence(-(-len(order) // size), lambda index: order[index * size : (index + 1) * size])


def process_share(rows: Array, process: int, processes: int) -> Array:
    """The rows of a micro-batch that one of several processes computes; lengths are dealt out evenly."""
    return rows[process::processes]


def collate(rows: Sequence[TokenRow], pad_id: int) -> MicroBatch:
    """Pad rows on the right to their longest.

    Without rows (a process that has none of the last micro-batch) it is one padding token without a target, so
    that every process takes part in every collective operation.
    """
    length = max((row.length for row in rows), default=1)
    tokens = np.full((max(1, len(rows)), length), pad_id, dtype=np.int32)
    positions, targets = [], []
    for index, row in enumerate(rows):
        tokens[index, : row.length] = row.tokens
        predicted = np.flatnonzero(row.trained[1:]) + 1
        positions.append(index * length + predicted - 1)
        targets.append(row.tokens[predicted])
    empty = np.zeros(0, dtype=np.int64)
    return MicroBatch(
        tokens=tokens,
        positions=np.concatenate([empty, *positions]),
        targets=np.concatenate([empty, *targets]).astype(np.int64),
        lengths=np.array([row.length for row in rows], dtype=np.int64),
        position_ids=_position_ids(rows, length),
        media=tuple(row.media for row in rows if row.media is not None),
    )


def without_targets(row: TokenRow) -> TokenRow:
    """The row with nothing to learn: it goes through the model, and counts for nothing."""
    return evolve(row, trained=np.zeros(row.length, dtype=np.bool_))


def _position_ids(rows: Sequence[TokenRow], length: int) -> Array | None:
    if all(len(row.documents) == 1 for row in rows):
        return None
    ids = np.empty((len(rows), length), dtype=np.int32)
    for index, row in enumerate(rows):
        ids[index, : row.length] = row.position_ids
        # Padding is a document of its own.
        ids[index, row.length :] = np.arange(length - row.length)
    return ids
