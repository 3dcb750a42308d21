"""Preference tasks on a model: one forward for all answers of a micro-batch, and one of the preference losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from soup_xb.backends.torch import preference_losses as losses
from soup_xb.backends.torch.head import BatchTensors, row_log_probabilities
from soup_xb.backends.torch.preference_losses import Judged, Losses, Pair, per_token
from soup_xb.backends.torch.processes import Processes
from soup_xb.core.objectives.settings import Bco, Dpo, Ipo, Kto, Orpo, RewardMean, Simpo
from soup_xb.core.rows.batches import Comparison, MicroBatch
from soup_xb.core.run.session import StepSettings

_PAIRED: Mapping[type, Callable[[Pair, Pair, Any], Losses]] = MappingProxyType(
    {
        Dpo: losses.dpo,
        Ipo: losses.ipo,
        Orpo: lambda policy, _, settings: losses.orpo(policy, settings),
        Simpo: lambda policy, _, settings: losses.simpo(policy, settings),
    }
)
# Objectives on means over an answer's tokens.
_AVERAGED = (Ipo, Orpo, Simpo)
# The means that are told, in the order in which processes add them up.
_NAMES = (
    "reward_accuracy",
    "reward_margin",
    "reward_chosen",
    "reward_rejected",
    "log_odds",
    "reward",
)


def log_probabilities(model: Any, batch: MicroBatch, place: torch.device) -> Tensor:
    """Log-probability (nats) of each row's targets, float32 (rows,)."""
    return row_log_probabilities(model, BatchTensors.of(batch, place))


class PreferenceTask:
    """One of the preference losses over the examples of a step: pairs, or judged answers.

    What the loss takes from a whole step (KTO's drift) comes from all its micro-batches and processes; what it
    takes from all steps before (BCO's mean reward) is the same on every process and part of a checkpoint.
    """

    def __init__(self, objective: Any, processes: Processes, place: torch.device) -> None:
        """Compute on `place`, with sums over all processes."""
        self._objective, self._processes, self._place = objective, processes, place
        self._rewards = RewardMean()
        self._drift = torch.zeros((), device=place)
        self._sums = torch.zeros(len(_NAMES), 2, dtype=torch.float64)

    def begin(self, model: Any, batches: Sequence[MicroBatch]) -> None:
        """Measure KTO's drift on the mismatched answers, without dropout and gradients."""
        self._sums.zero_()
        if isinstance(self._objective, Kto):
            self._drift = self._measured_drift(model, batches)

    def summed(self, model: Any, batch: MicroBatch) -> Tensor:
        """Sum over the pairs or judged answers."""
        found = log_probabilities(model, batch, self._place)
        if batch.comparison is None:
            # A process that has no row of this micro-batch.
            return found.sum()
        if batch.comparison.desirable is None:
            each, metrics = self._paired(found, batch)
        else:
            each, metrics = self._judged(found, batch.comparison)
        totals = torch.stack([values.sum() for values in metrics.values()]).cpu()
        for (name, values), total in zip(metrics.items(), totals, strict=True):
            self._sums[_NAMES.index(name)] += torch.stack(
                [total.double(), self._sums.new_tensor(values.numel())]
            )
        return each.sum()

    def divisor(self, step: StepSettings) -> int:
        """The step's pairs or judged answers."""
        return step.examples

    def finish(self, training: bool) -> tuple[int, Mapping[str, float]]:
        """The examples over all processes, and means over those that a mean is about."""
        shared = self._sums.to(self._place, torch.float32 if self._place.type == "mps" else torch.float64)
        self._processes.sum_([shared])
        sums = {name: tuple(pair) for name, pair in zip(_NAMES, shared.tolist(), strict=True)}
        if training and isinstance(self._objective, Bco):
            total, count = sums["reward"]
            self._rewards = self._rewards.after(total, int(count))
        means = {name: total / count for name, (total, count) in sums.items() if count and name != "reward"}
        if "reward_margin" not in means and {"reward_chosen", "reward_rejected"} <= means.keys():
            means["reward_margin"] = means["reward_chosen"] - means["reward_rejected"]
        if isinstance(self._objective, Kto):
            means["drift"] = self._drift.item()
        return int(sums["reward_accuracy"][1]), means

    def parameters(self) -> Mapping[str, torch.nn.Parameter]:
        """The adapter is all."""
        return {}

    def state(self) -> Mapping[str, float]:
        """BCO's mean reward with the number of rewards."""
        if not isinstance(self._objective, Bco):
            return {}
        return {"mean": self._rewards.mean, "count": float(self._rewards.count)}

    def load(self, state: Mapping[str, float]) -> None:
        """Take over what a checkpoint kept."""
        if state:
            self._rewards = RewardMean(state["mean"], int(state["count"]))

    def _paired(self, found: Tensor, batch: MicroBatch) -> Losses:
        if isinstance(self._objective, _AVERAGED):
            found = per_token(found, self._tensor(batch.row_targets))
        policy = _halves(found)
        reference = self._reference(batch) if isinstance(self._objective, Dpo | Ipo) else policy
        each, metrics = _PAIRED[type(self._objective)](policy, reference, self._objective)
        told = {
            "reward_accuracy": metrics["accuracies"],
            "reward_margin": metrics["margins"],
            "reward_chosen": metrics["chosen_rewards"],
            "reward_rejected": metrics["rejected_rewards"],
        }
        if isinstance(self._objective, Orpo):
            told["log_odds"] = Pair(
                losses.log_odds(policy.chosen), losses.log_odds(policy.rejected)
            ).margin.detach()
        return each, told

    def _reference(self, batch: MicroBatch) -> Pair:
        known = self._tensor(batch.comparison.reference if batch.comparison else None)
        if isinstance(self._objective, _AVERAGED):
            known = per_token(known, self._tensor(batch.row_targets))
        return _halves(known)

    def _judged(self, found: Tensor, comparison: Comparison) -> Losses:
        desirable = torch.from_numpy(comparison.desirable).to(self._place)
        judged = Judged(found, self._tensor(comparison.reference), desirable)
        if isinstance(self._objective, Kto):
            each, metrics = losses.kto(judged, self._drift, self._objective)
        else:
            each, metrics = losses.bco(judged, self._rewards.mean, self._objective)
        rewards = metrics["rewards"]
        return each, {
            "reward_accuracy": metrics["accuracies"],
            "reward_chosen": rewards[desirable],
            "reward_rejected": rewards[~desirable],
            "reward": rewards,
        }

    def _measured_drift(self, model: Any, batches: Sequence[MicroBatch]) -> Tensor:
        """The mean log-ratio on all mismatched answers of all processes, at least 0."""
        sums = torch.zeros(2, device=self._place)
        with torch.no_grad():
            for batch in batches:
                other = None if batch.comparison is None else batch.comparison.mismatched
                if other is None or other.comparison is None:
                    # This process has no row of this micro-batch; a sharded model runs everywhere or nowhere.
                    log_probabilities(model, batch, self._place)
                    continue
                ratios = log_probabilities(model, other, self._place) - self._tensor(
                    other.comparison.reference
                )
                sums += torch.stack([ratios.sum(), ratios.new_tensor(ratios.numel())])
        self._processes.sum_([sums])
        return losses.kto_kl((sums[0] / sums[1].clamp(min=1)).reshape(1), sums.new_zeros(1))

    def _tensor(self, values: Any) -> Tensor:
        if values is None:
            raise RuntimeError("the loss needs the base's log-probabilities, which the plan does not hold")
        return torch.from_numpy(values).to(self._place, torch.float32)


def _halves(found: Tensor) -> Pair:
    chosen, rejected = found.chunk(2)
    return Pair(chosen, rejected)
