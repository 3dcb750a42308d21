"""Policy optimisation on a model: the answers that it gave a moment ago, weighed by what they earned in their group."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from soup_xb.backends.torch.head import BatchTensors, target_log_probabilities
from soup_xb.backends.torch.means import Means
from soup_xb.backends.torch.processes import Processes
from soup_xb.backends.torch.reward_losses import Completions, group_advantages, grpo
from soup_xb.core.objectives.settings import Grpo
from soup_xb.core.rows.batches import MicroBatch
from soup_xb.core.run.session import StepSettings


class GrpoTask:
    """One update on the answers of a step, with the KL divergence from the true base where it is weighed.

    The loss that is told is the objective's value, beta times the divergence less the reward. Its gradient is that of
    the clipped surrogate, whose own value says nothing: advantages sum to zero in every group.
    """

    def __init__(
        self,
        objective: Grpo,
        processes: Processes,
        place: torch.device,
        true_base: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        """Compute on `place`; inside `true_base()` the model is the base."""
        self._objective, self._place, self._true_base = objective, place, true_base
        self._means = Means(processes, place)
        self._references: list[Tensor] = []

    def begin(self, model: Any, batches: Sequence[MicroBatch]) -> None:
        """Ask the base about all answers, without dropout and gradients."""
        self._means.clear()
        self._references = []
        if self._objective.beta:
            with torch.no_grad(), self._true_base():
                self._references = [self._log_probabilities(model, batch) for batch in batches]

    def summed(self, model: Any, batch: MicroBatch) -> Tensor:
        """Sum over the answers of the micro-batch."""
        policy = self._log_probabilities(model, batch)
        # Batches come in the order in which they were shown at the beginning.
        reference = self._references.pop(0) if self._references else policy.detach()
        rollout = batch.rollout
        if rollout is None:
            raise RuntimeError(
                "prompts are answered before they are trained on: see core.objectives.rollouts"
            )
        rewards = torch.from_numpy(rollout.rewards).to(self._place, torch.float32)
        told = {name: torch.from_numpy(values) for name, values in rollout.told.items()}
        if not len(rewards):
            self._means.add(told | ({"kl": rewards} if self._objective.beta else {}))
            return policy.sum()
        counts = torch.tensor(BatchTensors.of(batch, self._place).counts, device=self._place)
        trained = torch.arange(policy.shape[1], device=self._place) < counts.unsqueeze(-1)
        groups = rewards.view(-1, self._objective.group_size)
        advantages = group_advantages(groups, self._objective.scale_rewards).reshape(-1)
        completions = Completions(policy, policy.detach(), reference, trained)
        each, metrics = grpo(completions, advantages, self._objective)
        self._means.add(told | ({"kl": metrics["kl"]} if self._objective.beta else {}))
        kl = self._objective.beta * metrics["kl"]
        # The value of the objective, with the surrogate's gradient.
        return (each - each.detach() + kl - rewards).sum()

    def divisor(self, step: StepSettings) -> int:
        """The step's answers, over all processes."""
        return step.examples * self._objective.group_size

    def finish(self, training: bool) -> tuple[int, Mapping[str, float]]:
        """The answers that were judged, what they earned on average, and how far the model is from the base."""
        return self._means.told()

    def parameters(self) -> Mapping[str, torch.nn.Parameter]:
        """The adapter is all."""
        return {}

    def state(self) -> Mapping[str, float]:
        """Nothing is carried."""
        return {}

    def load(self, state: Mapping[str, float]) -> None:
        """Nothing was."""

    def _log_probabilities(self, model: Any, batch: MicroBatch) -> Tensor:
        """Log-probability (nats) of the answers' tokens at the sampling temperature, float32 (answers, longest)."""
        tensors = BatchTensors.of(batch, self._place)
        each = target_log_probabilities(model, tensors, self._objective.temperature)
        if not each.numel():
            return each.unsqueeze(0)
        return pad_sequence(each.split(tensors.counts), batch_first=True)
