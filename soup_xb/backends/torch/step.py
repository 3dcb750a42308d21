"""One step: the objective's losses on torch's arrays, their gradients, and one update of the optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from soup_xb.backends.torch.device import memory_guard
from soup_xb.backends.torch.optimizer import Optimizer
from soup_xb.backends.torch.outputs import Outputs
from soup_xb.backends.torch.router_balance import RouterBalance
from soup_xb.core.objectives.losses import NAMESPACE
from soup_xb.core.objectives.objective import StepState
from soup_xb.core.random_numbers import step_seed
from soup_xb.core.rows.batches import MicroBatch
from soup_xb.core.run.session import LossSum, StepResult, StepSettings

Array = np.ndarray[Any, Any]
# torch as core.objectives.losses wants it.
XP = SimpleNamespace(
    **{
        **{name: getattr(torch, name, None) for name in NAMESPACE},
        "stop_gradient": Tensor.detach,
        "take_along_axis": torch.take_along_dim,
    }
)


class Step:
    """The losses of an objective over micro-batches, for an update or for an evaluation."""

    def __init__(self, state: StepState, outputs: Outputs, router: RouterBalance | None, seed: int) -> None:
        """Dropout masks are a function of `seed`, step and process; a `router` has a loss of its own."""
        self._state, self._outputs, self._router, self._seed = state, outputs, router, seed
        self._processes, self._place = outputs.base.processes, outputs.base.place

    def train(
        self, batches: Sequence[MicroBatch], step: StepSettings, adapters: Any, optimizer: Optimizer
    ) -> StepResult:
        """One update of the adapters over this process's micro-batches."""
        divisor = self._state.objective.divisor(step.weight, step.examples)
        with memory_guard("training"):
            self._begin(batches, training=True)
            constants = [self._state.constants(batch) for batch in batches]
        torch.manual_seed(step_seed(self._seed, "dropout", step.step, self._processes.process))
        total = torch.zeros((), dtype=torch.float64, device=self._place)
        optimizer.zero_grad()
        adapters.train(True)
        try:
            with memory_guard("training"):
                for batch, known in zip(batches, constants, strict=True):
                    loss = self._summed(batch, known, divisor)
                    # Adapters in towers alone have no part in rows without files.
                    if loss.requires_grad:
                        (loss / divisor).backward()
                    total += loss.detach()
        finally:
            adapters.train(False)
        self._processes.sum_([total])
        self._processes.sum_(optimizer.gradients())
        mean = total.item() / divisor
        _, means = self._finish(training=True)
        if not math.isfinite(mean):
            return StepResult(mean, math.nan, applied=False)
        norm, applied = optimizer.step(step.learning_rate)
        optimizer.zero_grad()
        return StepResult(mean, norm, applied, means)

    def evaluate(self, batches: Sequence[MicroBatch]) -> LossSum:
        """The losses without dropout and gradients; every process evaluates its share."""
        totals = torch.zeros(3, dtype=torch.float64, device=self._place)
        with torch.no_grad(), memory_guard("evaluating"):
            self._begin(batches, training=False)
            for batch in batches:
                totals[0] += self._summed(batch, self._state.constants(batch), divisor=1.0)
                totals[1] += batch.target_tokens
                totals[2] += batch.target_weight
        self._processes.sum_([totals])
        examples, means = self._finish(training=False)
        total, targets, weight = totals.tolist()
        return LossSum(total, int(targets), examples, means, weight)

    def _begin(self, batches: Sequence[MicroBatch], training: bool) -> None:
        self._state.begin(batches)
        if self._router is not None:
            self._router.begin(self._outputs.base.model(), batches, training)

    def _finish(self, training: bool) -> tuple[int, Mapping[str, float]]:
        examples, means = self._state.finish(training)
        return examples, {**means, **(self._router.means() if self._router is not None else {})}

    def _summed(self, batch: MicroBatch, constants: Mapping[str, Array], divisor: float) -> Tensor:
        """The sum of a micro-batch's losses, in training with the router's loss times the divisor."""
        if self._router is None:
            return self._losses(batch, constants)
        model = self._outputs.base.model()
        return self._router.beside(model, batch, divisor, lambda: self._losses(batch, constants))

    def _losses(self, batch: MicroBatch, constants: Mapping[str, Array]) -> Tensor:
        """The sum of the losses in a micro-batch."""
        known = {name: self._tensor(array) for name, array in constants.items()}
        scalars = {name: self._tensor(np.float32(value)) for name, value in self._state.scalars.items()}
        each, metrics = self._state.objective.losses(XP, self._outputs.compute(batch), known, scalars)
        counted = self._tensor(batch.counted)
        if metrics:
            sums = [
                torch.stack([(values * which * counted).sum(), (which * counted).sum()])
                for values, which in metrics.values()
            ]
            self._state.sums.add(metrics, torch.stack(sums).detach().cpu().numpy())
        return (each * counted).sum()

    def _tensor(self, array: Any) -> Tensor:
        tensor = torch.from_numpy(np.asarray(array)).to(self._place)
        return tensor.float() if tensor.dtype == torch.float64 else tensor
