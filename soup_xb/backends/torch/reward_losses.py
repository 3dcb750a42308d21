"""The losses of scores and rewards: a reward model, a policy gradient over groups, and embeddings.

As in preference_losses: one loss for each example, unreduced, and metrics that carry no gradient.
"""

from __future__ import annotations

import torch
from attrs import frozen
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from soup_xb.backends.torch.preference_losses import Losses, Pair, pair_metrics
from soup_xb.core.objectives.settings import Embedding, Grpo

# exp of it is far from float32's end, and far outside of any ratio that training should see.
_LARGEST_LOG_RATIO = 20.0
# Keeps the advantages of a group with almost equal rewards from being blown up; TRL's value.
_LEAST_DEVIATION = 1e-4


def reward(scores: Pair) -> Losses:
    """Bradley-Terry on scalar scores (InstructGPT, arXiv:2203.02155, equation 1): -log sigmoid(s_c - s_r)."""
    return -logsigmoid(scores.margin), pair_metrics(scores)


@frozen(eq=False)
class Completions:
    """Sampled answers token by token, all (n, length): log-probabilities, and `trained` as bool.

    `old` is the policy that sampled them: `policy.detach()` where they are used for one update alone.
    """

    policy: Tensor
    old: Tensor
    reference: Tensor
    trained: Tensor

    def mean(self, values: Tensor) -> Tensor:
        """Means (n,) of (n, length) over the trained tokens; 0 for an answer without any."""
        return torch.where(self.trained, values, 0.0).sum(-1) / self.trained.sum(-1).clamp(min=1)


def grpo(completions: Completions, advantages: Tensor, settings: Grpo) -> Losses:
    """Group relative policy optimization (arXiv:2402.03300, equations 3 and 4).

    For each token, with q = pi / pi_old and d = log pi_ref - log pi:
    -min(q A, clip(q, 1 - epsilon_low, 1 + epsilon_high) A) + beta (exp(d) - d - 1), averaged over the answer.
    `advantages` (n,), old and reference log-probabilities are constants. Log-ratios count up to 20 either way:
    beyond, a token pushes no further and nothing overflows.
    """
    advantages = advantages.detach().unsqueeze(-1)
    ratio = _bounded(completions.policy - completions.old.detach()).exp()
    clipped = ratio.clamp(1 - settings.epsilon_low, 1 + settings.epsilon_high)
    drift = _bounded(completions.reference.detach() - completions.policy)
    kl = torch.expm1(drift) - drift
    gain = torch.minimum(ratio * advantages, clipped * advantages)
    low = (ratio < 1 - settings.epsilon_low) & (advantages < 0)
    high = (ratio > 1 + settings.epsilon_high) & (advantages > 0)
    metrics = {"kl": kl, "clipped_low": low.to(ratio.dtype), "clipped_high": high.to(ratio.dtype)}
    return completions.mean(settings.beta * kl - gain), {
        name: completions.mean(values.detach()) for name, values in metrics.items()
    }


def group_advantages(rewards: Tensor, scale: bool) -> Tensor:
    """How much better than its group each answer is: rewards (groups, size) less their group's mean, detached.

    With `scale` divided by the group's standard deviation (size - 1 degrees of freedom) as in arXiv:2402.03300;
    without, as arXiv:2503.20783 proposes. A group of one or of equal rewards teaches nothing: zeros, within rounding.
    """
    rewards = rewards.detach()
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if not scale or rewards.shape[1] == 1:
        return advantages
    return advantages / (rewards.std(dim=1, keepdim=True, correction=1) + _LEAST_DEVIATION)


def embedding(
    anchors: Tensor, candidates: Tensor, settings: Embedding, right: Tensor | None = None
) -> Losses:
    """Multiple negatives ranking (arXiv:1705.00652), on cosines.

    anchors (n, width); candidates (m, width), m >= n: that at `right` (n,), by default the i-th, belongs to the i-th
    anchor, every other one, hard negatives too, is a wrong answer to it:
    -log softmax(scale cos(anchor, candidates))[right]. `accuracies` is 1 where the right candidate is nearest,
    `margins` its cosine less the best wrong one's (less -1 where there is none), `positives` its cosine, `negatives`
    the mean of the wrong ones (0 for none).
    """
    cosines = normalize(anchors, dim=-1) @ normalize(candidates, dim=-1).T
    if right is None:
        right = torch.arange(len(anchors), device=anchors.device)
    losses = cross_entropy(settings.scale * cosines, right, reduction="none")
    cosines = cosines.detach()
    found = cosines.gather(1, right.unsqueeze(-1)).squeeze(-1)
    wrong = cosines.scatter(1, right.unsqueeze(-1), -1.0).amax(dim=1)
    return losses, {
        "accuracies": (found > wrong).to(found.dtype),
        "margins": found - wrong,
        "positives": found,
        "negatives": (cosines.sum(1) - found) / max(1, len(candidates) - 1),
    }


def _bounded(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
