"""Padding to a grid of few sizes, so that a compiled step is compiled few times."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from attrs import frozen

from soup_xb.core.rows.batches import MicroBatch


@frozen(eq=False)
class Grid:
    """A micro-batch as arrays on the grid; `weights` (n,) is 0 where a place only fills it.

    `documents` is int32 (rows, length), the number of each token's document, where a row holds several.
    """

    tokens: mx.array
    positions: mx.array
    targets: mx.array
    weights: mx.array
    documents: mx.array | None = None

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """All of them, in the order in which `Grid` takes them."""
        arrays = (self.tokens, self.positions, self.targets, self.weights)
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
    """The micro-batch as it is; without targets one place of weight 0 stands in for them."""
    weights = np.ones(batch.target_tokens, dtype=np.float32)
    return _grid(
        batch.tokens, batch.positions, batch.targets, weights, _documents(batch, batch.tokens.shape[1])
    )


def padded_grid(batch: MicroBatch) -> Grid:
    """The micro-batch padded on the right to a grid length and a grid number of targets."""
    rows, length = batch.tokens.shape
    wide = grid_size(length, steps=8)
    tokens = np.zeros((rows, wide), dtype=np.int32)
    tokens[:, :length] = batch.tokens
    row, column = np.divmod(batch.positions, length)
    missing = grid_size(batch.target_tokens) - batch.target_tokens
    # The places that fill the grid repeat a real one, so that nothing odd is computed there.
    first = slice(0, 1) if batch.target_tokens else slice(0, 0)
    positions = np.concatenate([row * wide + column, np.repeat((row * wide + column)[first], missing)])
    targets = np.concatenate([batch.targets, np.repeat(batch.targets[first], missing)])
    weights = np.zeros(positions.size, dtype=np.float32)
    weights[: batch.target_tokens] = 1.0
    return _grid(tokens, positions, targets, weights, _documents(batch, wide))


def _documents(batch: MicroBatch, wide: int) -> Any:
    """The number of each token's document; what fills the grid belongs to none of them."""
    if batch.position_ids is None:
        return None
    documents = np.zeros((batch.tokens.shape[0], wide), dtype=np.int32)
    documents[:, : batch.tokens.shape[1]] = np.cumsum(batch.position_ids == 0, axis=1)
    return documents


def _grid(tokens: Any, positions: Any, targets: Any, weights: Any, documents: Any) -> Grid:
    if not positions.size:
        positions = targets = np.zeros(1, dtype=np.int64)
        weights = np.zeros(1, dtype=np.float32)
    return Grid(
        mx.array(tokens.astype(np.int32)),
        mx.array(positions.astype(np.int32)),
        mx.array(targets.astype(np.int32)),
        mx.array(weights),
        None if documents is None else mx.array(documents),
    )
