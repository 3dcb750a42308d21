"""The output head on trained positions alone: the vocabulary is a model's largest matrix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from soup_xb.backends.mlx.documents import documents_apart
from soup_xb.backends.mlx.grid import Grid

_BLOCK = 256


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


def summed_loss(model: Any, grid: Grid) -> mx.array:
    """Weighted sum of the cross-entropies (nats) at the grid's positions, in float32.

    Rows are padded on the right: causal attention keeps padding out of every real token's sight, so no mask is
    needed, unless a row holds several documents.
    """
    with head_on_positions(model, grid.positions), documents_apart(model, grid.documents):
        logits = model(grid.tokens)[0].astype(mx.float32)
    chosen = mx.take_along_axis(logits, grid.targets[:, None], axis=-1)[:, 0]
    return mx.sum((log_sum_exp(logits) - chosen) * grid.weights)


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
