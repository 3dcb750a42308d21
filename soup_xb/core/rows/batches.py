"""Which rows a micro-batch holds, in which order, and how they are padded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar, overload

import numpy as np
from attrs import evolve, field, frozen

from soup_xb.core.random_numbers import permutation
from soup_xb.core.rows.examples import Inputs, RowMedia, media_inputs
from soup_xb.core.rows.row import Row, TokenSequence
from soup_xb.core.rows.table import Rows, as_rows

# Rows are sorted by length inside a window of so many micro-batches: wide enough for rows of nearly equal length
# to meet, narrow enough that a window still is a random sample of the data.
WINDOW = 64

Array = np.ndarray[Any, Any]
Item = TypeVar("Item")


class LazySequence(Sequence[Item]):
    """`count` items; `make` gives the item of a number from 0 on, each time anew. A slice is a list.

    >>> LazySequence(4, lambda index: index * index)[1:]
    [1, 4, 9]
    """

    def __init__(self, count: int, make: Callable[[int], Item]) -> None:
        self._places, self._make = range(count), make

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self._make(place) for place in self._places[index]]
        return self._make(self._places[index])


@frozen(eq=False)
class MicroBatch:
    """Sequences that go through the model together.

    `tokens` is int32 (rows, length), padded on the right; `lengths` int64 (rows,), the real tokens of each row.
    What is trained is (rows, width), as wide as the row with most targets: `positions` int64, the places in the
    flattened (rows * length) grid whose hidden state predicts a target; `targets` int64, the token ids predicted there;
    `weights` float32, what each counts for in the loss, 0 where a place only fills the row. `counted` is float32
    (examples,): 1, or 0 for an example that takes part only so that every process runs every part of the model.
    `position_ids` is int32 (rows, length), the place of each token in its document, where a row holds several
    documents; None where no row does.

    What a task knows besides: `constants`, arrays by name; `beside`, other sequences of the same rows (answers to
    other prompts, candidates of an embedding); `media`, the pictures or sounds of the rows that have some, in order;
    `prompts`, the rows to answer, and once they are answered `observed`, metrics of each answer (examples,).

    By the kind of the rows: pairs are all chosen answers, then all rejected ones, with the base's log-probabilities as
    `reference` (rows,). Judged answers have `desirable` (rows,) and `reference`; the mismatched ones beside them have
    their own. Rows to embed are anchors; the candidates beside them are this process's positives, then its hard
    negatives. Of `count` candidates on all processes these stand at `places`, and `right` (rows,) says which of all
    belongs to each anchor.
    """

    tokens: Array
    positions: Array
    targets: Array
    weights: Array
    lengths: Array
    counted: Array
    position_ids: Array | None = None
    constants: Mapping[str, Array] = field(factory=dict)
    beside: MicroBatch | None = None
    media: tuple[RowMedia, ...] = ()
    prompts: tuple[Row, ...] = ()
    observed: Mapping[str, Array] = field(factory=dict)

    def inputs(self) -> Inputs:
        """What the model takes besides tokens, read from the files now and kept by nobody."""
        return media_inputs(self.media, self.tokens)

    @property
    def target_tokens(self) -> int:
        """Number of targets."""
        return int(np.count_nonzero(self.weights))

    @property
    def target_weight(self) -> float:
        """The sum of the targets' weights."""
        return float(self.weights.sum(dtype=np.float64))

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


def collate(sequences: Sequence[TokenSequence], pad_id: int) -> MicroBatch:
    """Pad sequences on the right to their longest; each is one example."""
    length = max(one.length for one in sequences)
    predicted = [np.flatnonzero(one.trained[1:]) + 1 for one in sequences]
    shape = (len(sequences), max(1, *(places.size for places in predicted)))
    tokens = np.full((len(sequences), length), pad_id, dtype=np.int32)
    # The places that fill a row repeat its first one, so that nothing odd is computed there.
    positions = np.repeat(np.arange(len(sequences))[:, None] * length, shape[1], axis=1)
    targets, weights = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.float32)
    for index, (one, places) in enumerate(zip(sequences, predicted, strict=True)):
        tokens[index, : one.length] = one.tokens
        positions[index, : places.size] = index * length + places - 1
        targets[index, : places.size] = one.tokens[places]
        weights[index, : places.size] = 1.0 if one.weights is None else one.weights[places]
    return MicroBatch(
        tokens=tokens,
        positions=positions,
        targets=targets,
        weights=weights,
        lengths=np.array([one.length for one in sequences], dtype=np.int64),
        counted=np.ones(len(sequences), dtype=np.float32),
        position_ids=_position_ids(sequences, length),
        media=tuple(one.media for one in sequences if one.media is not None),
    )


def score_places(batch: MicroBatch, pad_id: int | None) -> Array:
    """Where each row is scored, int64 (rows,): at its last token that is not the id the base's config pads with.

    It is the rule of transformers' sequence classification. A chat template may end turns with that id, and then the
    score is read one token earlier.
    """
    length = batch.tokens.shape[1]
    places = np.arange(length)
    usable = places < batch.lengths[:, None]
    if pad_id is not None:
        usable &= batch.tokens != pad_id
    last: Array = np.where(usable, places, 0).max(axis=1)
    return last


def idle(batch: MicroBatch) -> MicroBatch:
    """The micro-batch with nothing in it that counts: it goes through the model, so that every process does."""
    return evolve(
        batch,
        weights=np.zeros_like(batch.weights),
        lengths=np.zeros_like(batch.lengths),
        counted=np.zeros_like(batch.counted),
        beside=None if batch.beside is None else idle(batch.beside),
    )


def _position_ids(sequences: Sequence[TokenSequence], length: int) -> Array | None:
    if all(len(one.documents) == 1 for one in sequences):
        return None
    ids = np.empty((len(sequences), length), dtype=np.int32)
    for index, one in enumerate(sequences):
        ids[index, : one.length] = one.position_ids
        # Padding is a document of its own.
        ids[index, one.length :] = np.arange(length - one.length)
    return ids


def collate_rows(rows: Sequence[Row], references: Array | None, pad_id: int) -> MicroBatch:
    """One micro-batch of rows of one kind.

    `references` is float64 (rows, sequences of a row), the log-probabilities under the base.
    """
    return _COLLATE[rows[0].kind](rows, references, pad_id)


def _tokens(rows: Sequence[Row], references: Array | None, pad_id: int) -> MicroBatch:
    return collate([row.sequences[0] for row in rows], pad_id)


def _pairs(rows: Sequence[Row], references: Array | None, pad_id: int) -> MicroBatch:
    sides = [row.sequences[side] for side in (0, 1) for row in rows]
    known = {} if references is None else {"reference": references.T.reshape(-1)}
    return evolve(collate(sides, pad_id), counted=np.ones(len(rows), dtype=np.float32), constants=known)


def _judged(rows: Sequence[Row], references: Array | None, pad_id: int) -> MicroBatch:
    known = {"desirable": np.array([row.extra for row in rows], dtype=np.bool_)}
    others = [row.sequences[1] for row in rows if len(row.sequences) > 1]
    beside = collate(others, pad_id) if others else None
    if references is not None:
        known["reference"] = references[:, 0]
        if beside is not None:
            beside = evolve(beside, constants={"reference": references[:, 1]})
    return evolve(_tokens(rows, None, pad_id), constants=known, beside=beside)


def _prompts(rows: Sequence[Row], references: Array | None, pad_id: int) -> MicroBatch:
    return evolve(_tokens(rows, None, pad_id), prompts=tuple(rows))


_COLLATE: Mapping[str, Callable[[Sequence[Row], Array | None, int], MicroBatch]] = MappingProxyType(
    {"tokens": _tokens, "pair": _pairs, "judged": _judged, "prompt": _prompts}
)


def contrast_batch(rows: Sequence[Row], share_of: tuple[int, int], pad_id: int) -> MicroBatch:
    """One process's share (its number, and how many there are) of a micro-batch of rows to embed.

    Candidates are counted through the whole micro-batch, first all positives, then the negatives of the rows that have
    one: their order, and with it the loss, is the same for any number of processes.
    """
    own = process_share(np.arange(len(rows)), *share_of)
    hard = [index for index, row in enumerate(rows) if len(row.sequences) > 2]
    mine = [place for place, index in enumerate(hard) if index in own]
    # What an idle process embeds stands at no place.
    shown = own if own.size else np.zeros(1, dtype=np.int64)
    candidates = [rows[index].sequences[1] for index in shown] + [
        rows[hard[place]].sequences[2] for place in mine
    ]
    anchors = collate([rows[index].sequences[0] for index in shown], pad_id)
    batch = evolve(
        anchors,
        beside=collate(candidates, pad_id),
        constants={
            "count": np.array(len(rows) + len(hard)),
            "places": np.concatenate([own, np.array(mine, dtype=np.int64) + len(rows)]).astype(np.int64),
            "right": shown.astype(np.int64),
        },
    )
    return batch if own.size else idle(batch)


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
        if rows[int(batches[index][0])].kind == "embedding":
            # What an anchor is told from lies on all processes.
            return contrast_batch([rows.row(int(row)) for row in batches[index]], share_of, pad_id)
        own = process_share(batches[index], *share_of)
        share = own if own.size else batches[index][:1]
        batch = collate_rows(
            [rows[row] for row in share], None if references is None else references[share], pad_id
        )
        return batch if own.size else idle(batch)

    return LazySequence(len(batches), make)


def sequence_batches(
    rows: Sequence[Row], size: int, pad_id: int, process: int, processes: int
) -> Sequence[tuple[Array, MicroBatch]]:
    """Every sequence of every row once, one process's share: `(places, batch)` each, made when asked for.

    A place counts through the rows and, in each, through its sequences, as the flattened references do. A process
    without a sequence of a batch has no place, and a batch that is idle.
    """
    known = as_rows(rows)
    lengths = known.facts.sequence_lengths
    batches = eval_batches(lengths.reshape(-1), size)

    def make(index: int) -> tuple[Array, MicroBatch]:
        own = process_share(batches[index], process, processes)
        shown = own if own.size else batches[index][:1]
        places = (divmod(int(place), lengths.shape[1]) for place in shown)
        batch = collate([known.row(row).sequences[side] for row, side in places], pad_id)
        return own, batch if own.size else idle(batch)

    return LazySequence(len(batches), make)
