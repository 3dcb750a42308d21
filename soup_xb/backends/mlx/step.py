"""One micro-batch forward and back: the loss and the gradients of the factors."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from soup_xb.backends.mlx.adapters import Adapters, Arrays
from soup_xb.backends.mlx.grid import Grid, exact_grid, padded_grid
from soup_xb.backends.mlx.head import summed_loss
from soup_xb.core.rows.batches import MicroBatch


class Gradients:
    """The compiled forward and backward pass of one model with adapters.

    It is a pure function of the factors, the batch and a dropout key. `traced` counts how often it was compiled:
    once for each size of the grid.
    """

    def __init__(self, model: Any, adapters: Adapters, compiled: bool) -> None:
        """Compile on first use, or never."""
        self.traced = 0
        self._model, self._adapters = model, adapters
        self._grid = padded_grid if compiled else exact_grid
        both = mx.value_and_grad(self._loss)
        self._both = mx.compile(both) if compiled else both

    def __call__(self, batch: MicroBatch, share: float, key: mx.array) -> tuple[float, Arrays]:
        """The summed loss, and the gradients of `share` times it."""
        arrays = self._grid(batch).arrays
        try:
            (_, total), gradients = self._both(
                self._adapters.values, arrays, mx.array(share, mx.float32), key
            )
            mx.eval(total, gradients)
        finally:
            self._adapters.place(self._adapters.values)
        return float(np.array(total)), gradients

    def _loss(self, values: Arrays, arrays: Any, share: mx.array, key: mx.array) -> tuple[mx.array, mx.array]:
        self.traced += 1
        self._adapters.place(values, key)
        total = summed_loss(self._model, Grid(*arrays))
        return total * share, total
