"""The loss of a step by task: over target tokens, or over answers by one of the preference losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from soup_xb.backends.torch.head import BatchTensors, summed_loss
from soup_xb.core.rows.batches import MicroBatch
from soup_xb.core.run.session import StepSettings


class TaskLoss(Protocol):
    """What a step or an evaluation asks of a task: `begin`, `summed` for each micro-batch, then `finish`."""

    def begin(self, model: Any, batches: Sequence[MicroBatch]) -> None:
        """Look at all micro-batches of this process before the first is trained on, without gradients."""

    def summed(self, model: Any, batch: MicroBatch) -> torch.Tensor:
        """The sum of the losses in a micro-batch."""

    def divisor(self, step: StepSettings) -> int:
        """What the sum over a whole step is divided by."""

    def finish(self, training: bool) -> tuple[int, Mapping[str, float]]:
        """The examples that were judged, over all processes, and means over them.

        After a training step what the task carries from step to step moves on.
        """

    def parameters(self) -> Mapping[str, torch.nn.Parameter]:
        """What is trained beside the adapter, by name."""

    def state(self) -> Mapping[str, float]:
        """What the task carries from step to step, for checkpoints."""

    def load(self, state: Mapping[str, float]) -> None:
        """Take over what a checkpoint kept."""


class TokenLoss:
    """Cross-entropy of the target tokens."""

    def __init__(self, place: torch.device) -> None:
        """Compute on `place`."""
        self._place = place

    def begin(self, model: Any, batches: Sequence[MicroBatch]) -> None:
        """There is nothing to know beforehand."""

    def summed(self, model: Any, batch: MicroBatch) -> torch.Tensor:
        """Sum over the targets."""
        return summed_loss(model, BatchTensors.of(batch, self._place))

    def divisor(self, step: StepSettings) -> int:
        """The step's targets."""
        return step.target_tokens

    def finish(self, training: bool) -> tuple[int, Mapping[str, float]]:
        """The loss says it all."""
        return 0, {}

    def parameters(self) -> Mapping[str, torch.nn.Parameter]:
        """The adapter is all."""
        return {}

    def state(self) -> Mapping[str, float]:
        """Nothing is carried."""
        return {}

    def load(self, state: Mapping[str, float]) -> None:
        """Nothing was."""
