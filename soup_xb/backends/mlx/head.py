"""The output head on trained positions alone: the vocabulary is a model's largest matrix.

A micro-batch is padded to a grid of few sizes, so that a compiled step is compiled few times.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from attrs import frozen

from soup_xb.core.rows.batches import MicroBatch

Array = np.ndarray[Any, Any]
_BLOCK = 256


@frozen(eq=False)
class Grid:
    """A micro-batch as arrays.

    `positions`, `targets` and `live` are (n,), one for each trained token and some that fill up: where its hidden state
    stands in the flattened (rows * length) grid, its id, and 1, or 0 for one that only fills up. `documents` is int32
    (rows, length), the number of each token's document, where a row holds several.
    """

    tokens: mx.array
    positions: mx.array
    targets: mx.array
    live: mx.array
    documents: mx.array | None = None

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """All of them, in the order in which `Grid` takes them."""
        arrays = (self.tokens, self.positions, self.targets, self.live)
        return arrays if self.documents is None else (*arrays, self.documents)


def grid_size(count: int, least: int = 16, steps: int = 4) -> int:
    """The next size of the grid: `steps` sizes an octave, so at most 1/steps of it is padding.

    >>> [grid_size(count) for count in (1, 16, 17, 33, 100, 129)]
    [16, 16, 20, 40, 112, 160]
    """
    if count <= least:
        return least
    octave = least
    while octave * 2 < count:
        octave *= 2
    stride = octave // steps
    return -(-count // stride) * stride


def exact_grid(batch: MicroBatch) -> Grid:
    """The micro-batch as it is; without targets one place that only fills up stands in for them."""
    return _grid(batch, batch.tokens.shape[1], max(1, batch.target_tokens))


def padded_grid(batch: MicroBatch) -> Grid:
    """The micro-batch padded on the right to a grid length and a grid number of targets."""
    return _grid(batch, grid_size(batch.tokens.shape[1], steps=8), grid_size(batch.target_tokens))


def _grid(batch: MicroBatch, wide: int, count: int) -> Grid:
    rows, length = batch.tokens.shape
    tokens = np.zeros((rows, wide), dtype=np.int32)
    tokens[:, :length] = batch.tokens
    trained = batch.weights != 0
    row, column = np.divmod(batch.positions[trained], length)
    # What fills up repeats a real place, so that nothing odd is computed there.
    filled = np.minimum(np.arange(count), max(0, row.size - 1))
    if not row.size:
        row = column = np.zeros(1, dtype=np.int64)
    targets = batch.targets[trained] if trained.any() else np.zeros(1, dtype=np.int64)
    documents = _documents(batch, wide)
    return Grid(
        mx.array(tokens),
        mx.array((row * wide + column)[filled].astype(np.int32)),
        mx.array(targets[filled].astype(np.int32)),
        mx.array((np.arange(count) < batch.target_tokens).astype(np.float32)),
        None if documents is None else mx.array(documents),
    )


def laid_out(batch: MicroBatch, grid: Grid, values: Mapping[str, Array]) -> dict[str, mx.array]:
    """Arrays of a micro-batch on the grid: those of its targets, (rows, width), become (rows, grid length)."""
    rows, length = batch.tokens.shape
    trained = batch.weights != 0
    row, column = np.divmod(batch.positions[trained], length)
    found = {}
    for name, array in values.items():
        if array.shape == batch.weights.shape:
            whole = np.zeros((rows, grid.tokens.shape[1]), dtype=array.dtype)
            whole[row, column] = array[trained]
            array = whole
        found[name] = mx.array(array.astype(np.float32) if array.dtype == np.float64 else array)
    return found


def taken_back(batch: MicroBatch, values: mx.array) -> Array:
    """Values (rows, grid length) as those of the micro-batch's targets, (rows, width), 0 where nothing is trained."""
    row, column = np.divmod(batch.positions, batch.tokens.shape[1])
    return np.where(batch.weights != 0, np.array(values)[row, column], np.float32(0.0))


def _documents(batch: MicroBatch, wide: int) -> Any:
    """The number of each token's document; what fills the grid belongs to none of them."""
    if batch.position_ids is None:
        return None
    documents = np.zeros((batch.tokens.shape[0], wide), dtype=np.int32)
    documents[:, : batch.tokens.shape[1]] = np.cumsum(batch.position_ids == 0, axis=1)
    return documents


class _Selecting(nn.Module):
    """A head that sees hidden states (1, n, hidden) of n places in the flattened (rows * length) grid."""

    def __init__(self, head: Any, positions: mx.array) -> None:
        super().__init__()
        self._head, self._positions = (head,), (positions,)

    def __call__(self, x: mx.array) -> mx.array:
        # A tied head is also the embedding, whose input are token ids.
        if mx.issubdtype(x.dtype, mx.integer):
            return self._head[0](x)
        return self._head[0](self._select(x))

    def as_linear(self, x: mx.array) -> mx.array:
        return self._head[0].as_linear(self._select(x))

    def _select(self, hidden: mx.array) -> mx.array:
        return mx.take(hidden.reshape(-1, hidden.shape[-1]), self._positions[0], axis=0)[None]


@contextmanager
def head_on_positions(model: Any, positions: mx.array) -> Iterator[None]:
    """Inside, the head computes `positions` (n,) alone.

    The model's own code still does what it does after the head (soft caps, scaling), so the logits (1, n,
    vocabulary) are those of the full computation at these positions.
    """
    owner, name = (model, "lm_head") if "lm_head" in model else (model.model, "embed_tokens")
    head = owner[name]
    setattr(owner, name, _Selecting(head, positions))
    try:
        yield
    finally:
        setattr(owner, name, head)


def token_logps(model: Any, grid: Grid, temperature: float = 1.0) -> mx.array:
    """Log-probability (nats) of each target, float32 (rows, grid length), where its hidden state stands; 0 elsewhere.

    Logits are divided by `temperature`. Rows are padded on the right: causal attention keeps padding out of every real
    token's sight, so no mask is needed, unless a row holds several documents.
    """
    with head_on_positions(model, grid.positions), documents_apart(model, grid.documents):
        logits = model(grid.tokens)[0].astype(mx.float32)
    if temperature != 1.0:
        logits = logits / temperature
    chosen = mx.take_along_axis(logits, grid.targets[:, None], axis=-1)[:, 0]
    each = (chosen - log_sum_exp(logits)) * grid.live
    return mx.zeros(grid.tokens.size).at[grid.positions].add(each).reshape(grid.tokens.shape)


def log_sum_exp(logits: mx.array) -> mx.array:
    """log(sum(exp(logits))) over the last axis of float32 (n, vocabulary).

    mx.logsumexp adds one term after the other on a CPU, which loses 1e-4 over 50,000 terms, always downwards;
    sums of blocks first keep what float32 can hold.
    """
    largest = mx.stop_gradient(mx.max(logits, axis=-1, keepdims=True))
    terms = mx.exp(logits - largest)
    blocked = terms.shape[-1] // _BLOCK * _BLOCK
    blocks = terms[:, :blocked].reshape(terms.shape[0], -1, _BLOCK)
    total = mx.sum(mx.sum(blocks, axis=-1), axis=-1) + mx.sum(terms[:, blocked:], axis=-1)
    return largest[:, 0] + mx.log(total)


@contextmanager
def documents_apart(model: Any, documents: mx.array | None) -> Iterator[None]:
    """Inside, the model's masks keep tokens of different documents apart.

    `documents` is int32 (rows, length), the number of the document that each token belongs to; None changes nothing.
    mlx-lm's models make their mask with a function of their module, which is replaced for the while.
    """
    if documents is None:
        yield
        return
    module: Any = sys.modules[type(model.model).__module__]
    usual = module.create_attention_mask
    same = documents[:, None, :, None] == documents[:, None, None, :]

    def create_attention_mask(h: mx.array, cache: Any = None, **options: Any) -> mx.array:
        if h.shape[1] == 1:
            return same
        return usual(h, cache, **{**options, "return_array": True}) & same

    module.create_attention_mask = create_attention_mask
    try:
        yield
    finally:
        module.create_attention_mask = usual
