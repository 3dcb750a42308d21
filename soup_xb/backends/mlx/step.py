"""One step: the objective's losses on MLX's arrays, their gradients in one compiled function, and one update."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np

from soup_xb.backends.mlx.adapters import Adapters, Arrays
from soup_xb.backends.mlx.device import memory_guard
from soup_xb.backends.mlx.head import Grid, exact_grid, laid_out, padded_grid, token_logps
from soup_xb.backends.mlx.optimizer import Optimizer
from soup_xb.backends.mlx.outputs import OpenBase
from soup_xb.core.objectives.losses import NAMESPACE
from soup_xb.core.objectives.objective import StepState
from soup_xb.core.random_numbers import step_seed
from soup_xb.core.rows.batches import MicroBatch
from soup_xb.core.run.session import LossSum, StepResult, StepSettings

Array = np.ndarray[Any, Any]
# MLX as core.objectives.losses wants it.
XP = SimpleNamespace(**{name: getattr(mx, name) for name in NAMESPACE})


class Step:
    """The losses of an objective over micro-batches, for an update or for an evaluation.

    The compiled forward and backward pass is a pure function of the factors, the batch, its constants, the step's
    scalars and a dropout key. `traced` counts how often it was compiled: once for each size of the grid.
    """

    def __init__(
        self, state: StepState, base: OpenBase, adapters: Adapters | None, seed: int, compiled: bool = True
    ) -> None:
        """Without adapters there is an evaluation and no update. Dropout masks are a function of `seed` and step.

        What is not compiled runs without padding to a grid.
        """
        self.traced = 0
        self._state, self._base, self._adapters, self._seed = state, base, adapters, seed
        self._grid = padded_grid if compiled else exact_grid
        both = mx.value_and_grad(self._weighed)
        self._gradients = mx.compile(both) if compiled else both
        # The objective's metrics, in its order; known once it was traced.
        self._names: tuple[str, ...] = ()

    def train(self, batches: Sequence[MicroBatch], step: StepSettings, optimizer: Optimizer) -> StepResult:
        """One update of the adapters over this process's micro-batches."""
        adapters, processes = self._adapters, self._base.processes
        if adapters is None:
            raise RuntimeError("attach adapters before training")
        seed = step_seed(self._seed, "dropout", step.step, processes.process)
        keys = mx.random.split(mx.random.key(seed), max(1, len(batches)))
        divisor = self._state.objective.divisor(step.target_tokens, step.examples)
        gradients: Arrays = {}
        total = 0.0
        with memory_guard("training"):
            self._state.begin(batches)
            constants = [self._state.constants(batch) for batch in batches]
            for batch, known, key in zip(batches, constants, keys, strict=True):
                loss, more = self._loss_and_gradients(batch, known, 1.0 / divisor, key)
                gradients = {name: gradients[name] + more[name] for name in more} if gradients else more
                total += loss
            mean = processes.sum_exactly(total) / divisor
            gradients = processes.sum(gradients)
            _, means = self._state.finish(training=True)
            if not math.isfinite(mean):
                return StepResult(mean, math.nan, applied=False)
            norm, values = optimizer.step(adapters.values, gradients, step.learning_rate)
        if values is None:
            return StepResult(mean, norm, applied=False)
        adapters.set(values)
        return StepResult(mean, norm, applied=True, means=means)

    def evaluate(self, batches: Sequence[MicroBatch]) -> LossSum:
        """The losses without dropout; every process evaluates its share."""
        total, targets = 0.0, 0
        with memory_guard("evaluating"):
            self._state.begin(batches)
            for batch in batches:
                grid, known = self._arrays(batch, self._state.constants(batch), exact_grid)
                total += self._added(*self._losses(grid, known))
                targets += batch.target_tokens
            examples, means = self._state.finish(training=False)
        exactly = self._base.processes.sum_exactly
        return LossSum(exactly(total), round(exactly(targets)), examples, means)

    def _loss_and_gradients(
        self, batch: MicroBatch, constants: Mapping[str, Array], share: float, key: mx.array
    ) -> tuple[float, Arrays]:
        """The summed loss of a micro-batch, and the gradients of `share` times it."""
        adapters = self._adapters
        assert adapters is not None
        grid, known = self._arrays(batch, constants, self._grid)
        try:
            (_, each, sums), gradients = self._gradients(
                adapters.values, grid.arrays, known, mx.array(share, mx.float32), key
            )
            mx.eval(each, sums, gradients)
        finally:
            adapters.place(adapters.values)
        return self._added(each, sums), gradients

    def _added(self, each: mx.array, sums: mx.array) -> float:
        self._state.sums.add(self._names, np.array(sums).reshape(-1, 2))
        # MLX adds one term after the other on a CPU; in float64 that loses nothing.
        return float(np.array(each).sum(dtype=np.float64))

    def _arrays(
        self, batch: MicroBatch, constants: Mapping[str, Array], on: Callable[[MicroBatch], Grid]
    ) -> tuple[Grid, dict[str, dict[str, mx.array]]]:
        self._base.check_length(batch.tokens.shape[1])
        grid = on(batch)
        known = laid_out(batch, grid, {**constants, "counted": batch.counted})
        scalars = {name: mx.array(value, mx.float32) for name, value in self._state.scalars.items()}
        return grid, {"constants": known, "scalars": scalars}

    def _weighed(
        self, values: Arrays, arrays: Any, known: Any, share: mx.array, key: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        self.traced += 1
        assert self._adapters is not None
        self._adapters.place(values, key)
        each, sums = self._losses(Grid(*arrays), known)
        return mx.sum(each) * share, each, sums

    def _losses(self, grid: Grid, known: dict[str, dict[str, mx.array]]) -> tuple[mx.array, mx.array]:
        """The loss of each example that counts, and sums and counts of the metrics (metrics, 2)."""
        objective, constants = self._state.objective, known["constants"]
        outputs = token_logps(self._base.model(), grid, objective.temperature)
        each, metrics = objective.losses(XP, outputs, constants, known["scalars"])
        counted = constants["counted"]
        self._names = tuple(metrics)
        sums = [
            mx.stack([mx.sum(values * which * counted), mx.sum(which * counted)])
            for values, which in metrics.values()
        ]
        return each * counted, mx.stack(sums) if sums else mx.zeros((0, 2))
