"""The losses of preference tasks, as functions of log-probabilities.

A log-probability is that of an answer's trained tokens, in nats: their sum or their mean (`per_token`), as each
loss says. Every loss comes for each example, unreduced, together with metrics for each example that carry no
gradient: the step's sum is divided by a count that core knows. The reference's log-probabilities are constants.
"""

from __future__ import annotations

import torch
from attrs import frozen
from torch import Tensor
from torch.nn.functional import logsigmoid

from soup_xb.core.objectives.settings import Bco, Dpo, Ipo, Kto, Orpo, Simpo

Metrics = dict[str, Tensor]
Losses = tuple[Tensor, Metrics]


@frozen(eq=False)
class Pair:
    """A number for the chosen answer and one for the rejected answer of each example, both (n,)."""

    chosen: Tensor
    rejected: Tensor

    @property
    def margin(self) -> Tensor:
        """By how much the chosen answer leads, (n,)."""
        return self.chosen - self.rejected

    def above(self, reference: Pair) -> Pair:
        """The log-ratios to the reference, which is detached."""
        return Pair(self.chosen - reference.chosen.detach(), self.rejected - reference.rejected.detach())

    def times(self, factor: float) -> Pair:
        """Both sides multiplied."""
        return Pair(factor * self.chosen, factor * self.rejected)


def per_token(summed: Tensor, tokens: Tensor) -> Tensor:
    """Means (n,) out of sums (n,) over `tokens` (n,); of an answer without tokens it is its sum, zero."""
    return summed / tokens.clamp(min=1)


def pair_metrics(rewards: Pair) -> Metrics:
    """Rewards, margins and accuracies (1 where the chosen answer leads, 0 at a tie), each (n,), detached."""
    margins = rewards.margin.detach()
    return {
        "chosen_rewards": rewards.chosen.detach(),
        "rejected_rewards": rewards.rejected.detach(),
        "margins": margins,
        "accuracies": (margins > 0).to(margins.dtype),
    }


def dpo(policy: Pair, reference: Pair, settings: Dpo) -> Losses:
    """Direct preference optimization, on sums (arXiv:2305.18290, equation 7).

    With r = beta (log pi - log pi_ref) and m = r_chosen - r_rejected: -log sigmoid(m). Label smoothing e, for pairs
    of which a share e is judged the wrong way round: -(1 - e) log sigmoid(m) - e log sigmoid(-m).
    """
    rewards = policy.above(reference).times(settings.beta)
    return _logistic(rewards.margin, settings.label_smoothing), pair_metrics(rewards)


def ipo(policy: Pair, reference: Pair, settings: Ipo) -> Losses:
    """Identity preference optimization, on means (arXiv:2310.12036, equation 17).

    (h - 1 / (2 beta))^2, h the margin of log pi - log pi_ref. The metrics' rewards are beta times that.
    """
    ratios = policy.above(reference)
    return (ratios.margin - 1 / (2 * settings.beta)) ** 2, pair_metrics(ratios.times(settings.beta))


def orpo(policy: Pair, settings: Orpo) -> Losses:
    """Odds ratio preference optimization, on means, without a reference (arXiv:2403.07691, equation 6).

    -log p_chosen - beta log sigmoid(log odds_chosen - log odds_rejected), odds = p / (1 - p). The first term is the
    answer's own mean, so that each example weighs alike whatever its length.
    """
    odds = Pair(log_odds(policy.chosen), log_odds(policy.rejected))
    rewards = policy.times(settings.beta)
    return -policy.chosen - settings.beta * logsigmoid(odds.margin), pair_metrics(rewards)


def simpo(policy: Pair, settings: Simpo) -> Losses:
    """Simple preference optimization, on means, without a reference (arXiv:2405.14734).

    -log sigmoid(m - gamma), m the margin of beta log pi; label smoothing as in `dpo`.
    """
    rewards = policy.times(settings.beta)
    return _logistic(rewards.margin - settings.gamma, settings.label_smoothing), pair_metrics(rewards)


@frozen(eq=False)
class Judged:
    """Answers judged one by one: log-probabilities of policy and reference, verdicts as bool, all (n,)."""

    policy: Tensor
    reference: Tensor
    desirable: Tensor

    def rewards(self, beta: float) -> Tensor:
        """The rewards beta (log pi - log pi_ref), (n,); the reference is detached."""
        return beta * (self.policy - self.reference.detach())

    def towards_verdict(self, leads: Tensor) -> Tensor:
        """`leads` (n,) as it is for desirable answers, negated for the others."""
        return torch.where(self.desirable, leads, -leads)


def kto(judged: Judged, kl: Tensor, settings: Kto) -> Losses:
    """Kahneman-Tversky optimization, on sums (arXiv:2402.01306).

    weight * (1 - sigmoid(r - beta kl)) for desirable answers, weight * (1 - sigmoid(beta kl - r)) for the others,
    r = beta (log pi - log pi_ref). `kl` is the step's `kto_kl`, a scalar, detached.
    """
    rewards = judged.rewards(settings.beta)
    leads = judged.towards_verdict(rewards - settings.beta * kl.detach())
    # sigmoid(-x) keeps the digits that 1 - sigmoid(x) loses.
    losses = torch.sigmoid(-leads)
    weighted = torch.where(
        judged.desirable, settings.desirable_weight * losses, settings.undesirable_weight * losses
    )
    return weighted, _judged_metrics(rewards, leads)


def kto_kl(policy: Tensor, reference: Tensor) -> Tensor:
    """How far the policy went from the reference: the mean log-ratio of mismatched pairs, at least 0, detached.

    Sums (m,) of prompts with answers to others: all of a step, for the loss to be the same however it is split up.
    Without any it is 0.
    """
    if not policy.numel():
        return policy.new_zeros(())
    return (policy - reference).mean().clamp(min=0).detach()


def bco(judged: Judged, delta: float, settings: Bco) -> Losses:
    """Binary classifier optimization, on sums (arXiv:2404.04656).

    -log sigmoid(r - delta) for desirable answers, -log sigmoid(delta - r) for the others,
    r = beta (log pi - log pi_ref). `delta` is the running mean of the rewards (`objectives.RewardMean`): the paper
    takes the mean of both kinds' means, which is the same where both are equally many.
    """
    rewards = judged.rewards(settings.beta)
    leads = judged.towards_verdict(rewards - delta)
    return -logsigmoid(leads), _judged_metrics(rewards, leads)


def log_odds(logps: Tensor) -> Tensor:
    """log(p / (1 - p)) out of log p <= 0, any shape.

    A p that rounds to 1 counts as the largest below 1: its odds stay finite and push no further.
    """
    logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    # expm1 keeps the digits of 1 - p for a p near 1; for a small p they vanish beside log p.
    return logps - torch.log(-torch.expm1(logps))


def _logistic(leads: Tensor, label_smoothing: float) -> Tensor:
    return -(1 - label_smoothing) * logsigmoid(leads) - label_smoothing * logsigmoid(-leads)


def _judged_metrics(rewards: Tensor, leads: Tensor) -> Metrics:
    """Accuracies are 1 where the answer stands on its verdict's side."""
    return {"rewards": rewards.detach(), "accuracies": (leads > 0).to(rewards.dtype)}
