"""One step: the objective's losses on MLX's arrays, their gradients in one compiled function, and one update."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np

from soup_xb.backends.mlx.adapters import Adapters, Arrays
from soup_xb.backends.mlx.device import memory_guard
from soup_xb.backends.mlx.head import laid_out
from soup_xb.backends.mlx.optimizer import Optimizer
from soup_xb.backends.mlx.outputs import Outputs
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

    The compiled forward and backward pass is a pure function of what is trained, the batch, its constants, the step's
    scalars and a dropout key. `traced` counts how often it was compiled: once for each size of the grid.
    """

    def __init__(
        self, state: StepState, outputs: Outputs, adapters: Adapters | None, seed: int, compiled: bool = True
    ) -> None:
        """Without adapters there is an evaluation and no update. Dropout masks are a function of `seed` and step.

        What is not compiled runs without padding to a grid.
        """
        self.traced = 0
        self._state, self._outputs, self._adapters, self._seed = state, outputs, adapters, seed
        self._processes, self._padded = outputs.base.processes, compiled
        both = mx.value_and_grad(self._weighed)
        self._gradients = mx.compile(both) if compiled else both
        # The objective's metrics, in its order; known once it was traced.
        self._names: tuple[str, ...] = ()

    def train(self, batches: Sequence[MicroBatch], step: StepSettings, optimizer: Optimizer) -> StepResult:
        """One update of the adapters over this process's micro-batches."""
        processes = self._processes
        if self._adapters is None:
            raise RuntimeError("attach adapters before training")
        seed = step_seed(self._seed, "dropout", step.step, processes.process)
        keys = mx.random.split(mx.random.key(seed), max(1, len(batches)))
        divisor = self._state.objective.divisor(step.weight, step.examples)
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
            norm, values = optimizer.step(self._trained(), gradients, step.learning_rate)
        if values is None:
            return StepResult(mean, norm, applied=False)
        self._adapters.set({name: values[name] for name in self._adapters.values})
        self._outputs.place(values)
        return StepResult(mean, norm, applied=True, means=means)

    def evaluate(self, batches: Sequence[MicroBatch]) -> LossSum:
        """The losses without dropout; every process evaluates its share."""
        total, targets, weight = 0.0, 0, 0.0
        with memory_guard("evaluating"):
            self._state.begin(batches)
            for batch in batches:
                arrays, known = self._arrays(batch, self._state.constants(batch), padded=False)
                total += self._added(*self._losses(arrays, known))
                targets += batch.target_tokens
                weight += batch.target_weight
            examples, means = self._state.finish(training=False)
        exactly = self._processes.sum_exactly
        return LossSum(exactly(total), round(exactly(targets)), examples, means, exactly(weight))

    def _loss_and_gradients(
        self, batch: MicroBatch, constants: Mapping[str, Array], share: float, key: mx.array
    ) -> tuple[float, Arrays]:
        """The summed loss of a micro-batch, and the gradients of `share` times it."""
        arrays, known = self._arrays(batch, constants, self._padded)
        values = self._trained()
        try:
            (_, each, sums), gradients = self._gradients(
                values, arrays, known, mx.array(share, mx.float32), key
            )
            mx.eval(each, sums, gradients)
        finally:
            self._place(values)
        return self._added(each, sums), gradients

    def _trained(self) -> Arrays:
        assert self._adapters is not None
        return {**self._adapters.values, **self._outputs.values()}

    def _place(self, values: Arrays, key: mx.array | None = None) -> None:
        assert self._adapters is not None
        self._adapters.place(values, key)
        self._outputs.place(values)

    def _added(self, each: mx.array, sums: mx.array) -> float:
        self._state.sums.add(self._names, np.array(sums).reshape(-1, 2))
        # MLX adds one term after the other on a CPU; in float64 that loses nothing.
        return float(np.array(each).sum(dtype=np.float64))

    def _arrays(
        self, batch: MicroBatch, constants: Mapping[str, Array], padded: bool
    ) -> tuple[tuple[mx.array, ...], dict[str, dict[str, mx.array]]]:
        arrays = self._outputs.arrays(batch, padded)
        known = laid_out(batch, arrays[0].shape[1], {**constants, "counted": batch.counted})
        scalars = {name: mx.array(value, mx.float32) for name, value in self._state.scalars.items()}
        return arrays, {"constants": known, "scalars": scalars}

    def _weighed(
        self, values: Arrays, arrays: Any, known: Any, share: mx.array, key: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        self.traced += 1
        self._place(values, key)
        each, sums = self._losses(arrays, known)
        return mx.sum(each) * share, each, sums

    def _losses(
        self, arrays: Sequence[mx.array], known: dict[str, dict[str, mx.array]]
    ) -> tuple[mx.array, mx.array]:
        """The loss of each example that counts, and sums and counts of the metrics (metrics, 2)."""
        objective, constants = self._state.objective, known["constants"]
        each, metrics = objective.losses(XP, self._outputs.compute(arrays), constants, known["scalars"])
        counted = constants["counted"]
        self._names = tuple(metrics)
        sums = [
            mx.stack([mx.sum(values * which * counted), mx.sum(which * counted)])
            for values, which in metrics.values()
        ]
        return each * counted, mx.stack(sums) if sums else mx.zeros((0, 2))
