"""What a model is asked for besides its losses: log-probabilities."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from attrs import frozen

from soup_xb.backends.mlx.device import memory_guard
from soup_xb.backends.mlx.head import exact_grid, taken_back, token_logps
from soup_xb.backends.mlx.processes import Processes
from soup_xb.core.rows.batches import MicroBatch

Array = np.ndarray[Any, Any]


@frozen(eq=False)
class OpenBase:
    """An opened base: `model()` gives it, and inside `with_adapter(False)` it is without its adapter.

    `check_length` raises ModelError for rows that are longer than it reads exactly.
    """

    model: Callable[[], Any]
    processes: Processes
    with_adapter: Callable[[bool], AbstractContextManager[Any]]
    check_length: Callable[[int], None]


class MlxScorer:
    """See soup_xb.core.objectives.objective.Scorer."""

    def __init__(self, base: OpenBase) -> None:
        """Ask the model of `base`."""
        self._base = base

    def token_logps(self, batch: MicroBatch, temperature: float = 1.0, adapter: bool = True) -> Array:
        """Log-probability of each target."""
        self._base.check_length(batch.tokens.shape[1])
        with self._base.with_adapter(adapter), memory_guard("scoring answers"):
            return taken_back(batch, token_logps(self._base.model(), exact_grid(batch), temperature))

    def sum(self, values: Array) -> Array:
        """Values summed over all processes."""
        whole = np.asarray(values, dtype=np.float64)
        summed = [self._base.processes.sum_exactly(float(value)) for value in whole.reshape(-1)]
        return np.array(summed).reshape(whole.shape)
