"""Every loss once, over an array namespace `xp`: torch, mlx.core or NumPy (see `NAMESPACE` for what it must have).

All functions are pure: they return one unreduced loss for each example and never branch on an array's value, so that
they run eagerly, under torch's autograd and inside mx.compile. Log-probabilities are in nats.

The signature of a task's loss says what it needs. A positional parameter is a statistic of the batch, by name:
`chosen` and `rejected` are summed log-probabilities of the two answers of a pair, `…_mean` their means per trained
token, `ref_…` the same under the base without its adapter. A keyword-only parameter is the config key
`training.<name>`; its default, where it has one, is the value for a file that leaves the key open.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

X = Any
# What `xp` must have beyond arithmetic, comparison, indexing and `@`, by NumPy's names and keywords. torch spells
# `take_along_axis` and `stop_gradient` in another way, NumPy has no `stop_gradient` and no `logsumexp`.
NAMESPACE = (
    "where", "exp", "expm1", "log", "sqrt", "sum", "mean", "clip", "minimum", "logaddexp",
    "stop_gradient", "take_along_axis", "logsumexp",
)  # fmt: skip
# exp of it is far from float32's largest number, and far outside of any ratio that training should see.
_LARGEST_LOG_RATIO = 20.0
# Keeps the advantages of a group with almost equal rewards from being blown up; TRL's value.
_LEAST_DEVIATION = 1e-4
# A probability that rounds to 1 counts as the largest float32 below 1.
_LEAST_LOSS = 2.0**-23
# A vector that is shorter is not scaled to length 1; torch's value.
_LEAST_NORM = 1e-12


@cache
def statistics(loss: Callable[..., X]) -> tuple[str, ...]:
    """The names of the statistics that a loss takes, in its order, `xp` left out.

    >>> statistics(dpo)
    ('chosen', 'rejected', 'ref_chosen', 'ref_rejected')
    """
    parameters = inspect.signature(loss).parameters.values()
    return tuple(one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD)[1:]


@cache
def settings(loss: Callable[..., X]) -> Mapping[str, float | None]:
    """The `training` keys that a loss takes, with its own default for a key that a file leaves open.

    >>> dict(settings(dpo))
    {'beta': 0.1, 'label_smoothing': None}
    """
    parameters = inspect.signature(loss).parameters.values()
    return {
        one.name: None if one.default is one.empty else one.default
        for one in parameters
        if one.kind is one.KEYWORD_ONLY
    }


def row_sums(xp: X, logps: X, weights: X) -> X:
    """(rows, width) -> (rows,): the log-probability of each row's trained tokens, times their weights."""
    return xp.sum(xp.where(weights != 0, logps * weights, 0.0), axis=-1)


def row_means(xp: X, logps: X, weights: X) -> X:
    """(rows, width) -> (rows,): the weighted mean over each row's trained tokens, 0 for a row without any."""
    return row_sums(xp, logps, weights) / row_counts(xp, weights)


def row_counts(xp: X, weights: X) -> X:
    """(rows, width) -> (rows,): the sum of each row's weights, 1 where it is 0."""
    total = xp.sum(weights, axis=-1)
    return xp.where(total == 0, 1.0 + 0.0 * total, total)


def cross_entropy(xp: X, logps: X, weights: X) -> X:
    """Cross-entropy: -log p of each trained token times its weight, summed over the row: (rows, width) -> (rows,)."""
    return -row_sums(xp, logps, weights)


def dpo(
    xp: X,
    chosen: X,
    rejected: X,
    ref_chosen: X,
    ref_rejected: X,
    *,
    beta: float = 0.1,
    label_smoothing: float,
) -> X:
    """Direct preference optimization (arXiv:2305.18290, equation 7): -log sigmoid(m).

    m = beta (log pi_chosen / ref_chosen - log pi_rejected / ref_rejected). With label smoothing e, for pairs of which
    a share e is labelled the wrong way round: -(1 - e) log sigmoid(m) - e log sigmoid(-m).
    """
    return _logistic(xp, beta * ((chosen - ref_chosen) - (rejected - ref_rejected)), label_smoothing)


def ipo(
    xp: X,
    chosen_mean: X,
    rejected_mean: X,
    ref_chosen_mean: X,
    ref_rejected_mean: X,
    *,
    beta: float = 0.1,
) -> X:
    """Identity preference optimization on means (arXiv:2310.12036, equation 17): (h - 1 / (2 beta))^2.

    h is the margin of log pi - log ref; `beta` is the paper's tau.
    """
    margin = (chosen_mean - ref_chosen_mean) - (rejected_mean - ref_rejected_mean)
    return (margin - 1 / (2 * beta)) ** 2


def orpo(xp: X, chosen_mean: X, rejected_mean: X, *, beta: float = 0.1) -> X:
    """Odds ratio preference optimization on means, without a reference (arXiv:2403.07691, equation 6).

    -log p_chosen - beta log sigmoid(log odds_chosen - log odds_rejected), odds = p / (1 - p); `beta` is the paper's
    lambda. The first term is the answer's own mean, so that each example weighs alike whatever its length.
    """
    return -chosen_mean - beta * _logsigmoid(xp, odds_margin(xp, chosen_mean, rejected_mean))


def odds_margin(xp: X, chosen_mean: X, rejected_mean: X) -> X:
    """By how much the log-odds of the chosen answer lead."""
    return _log_odds(xp, chosen_mean) - _log_odds(xp, rejected_mean)


def simpo(
    xp: X,
    chosen_mean: X,
    rejected_mean: X,
    *,
    beta: float = 2.0,
    simpo_gamma: float,
    label_smoothing: float,
    cpo_alpha: float = 0.0,
) -> X:
    """Simple preference optimization on means, without a reference (arXiv:2405.14734): -log sigmoid(m - gamma).

    m = beta (log p_chosen - log p_rejected); label smoothing as in `dpo`. `cpo_alpha` weighs the likelihood of the
    chosen answer as in `cpo`.
    """
    preference = _logistic(xp, beta * (chosen_mean - rejected_mean) - simpo_gamma, label_smoothing)
    return preference - cpo_alpha * chosen_mean


def cpo(
    xp: X,
    chosen: X,
    rejected: X,
    chosen_mean: X,
    *,
    beta: float = 0.1,
    label_smoothing: float,
    cpo_alpha: float = 1.0,
) -> X:
    """Contrastive preference optimization on sums, without a reference (arXiv:2401.08417).

    -log sigmoid(m) - alpha log p_chosen: m = beta (log p_chosen - log p_rejected), label smoothing as in `dpo`; the
    second term is the answer's own mean per token, so that each pair weighs alike however a step is split.
    """
    return _logistic(xp, beta * (chosen - rejected), label_smoothing) - cpo_alpha * chosen_mean


def kto(
    xp: X,
    policy: X,
    ref: X,
    desirable: X,
    drift: X,
    *,
    beta: float = 0.1,
    desirable_weight: float,
    undesirable_weight: float,
) -> X:
    """Kahneman-Tversky optimization on sums (arXiv:2402.01306).

    weight (1 - sigmoid(r - beta drift)) for desirable answers, weight (1 - sigmoid(beta drift - r)) for the others,
    r = beta (log pi - log ref). `drift` is a scalar: the mean log-ratio of mismatched answers, at least 0.
    """
    lead = beta * (policy - ref) - beta * drift
    lead = xp.where(desirable, lead, -lead)
    # sigmoid(-x) keeps the digits that 1 - sigmoid(x) loses.
    loss = xp.exp(_logsigmoid(xp, -lead))
    return xp.where(desirable, desirable_weight * loss, undesirable_weight * loss)


def bco(xp: X, policy: X, ref: X, desirable: X, shift: X, *, beta: float = 0.1) -> X:
    """Binary classifier optimization on sums (arXiv:2404.04656).

    -log sigmoid(r - shift) for desirable answers, -log sigmoid(shift - r) for the others, r = beta (log pi - log ref).
    `shift` is a scalar, the running mean of the rewards: the paper takes the mean of both kinds' means, which is the
    same if both are equally many.
    """
    lead = beta * (policy - ref) - shift
    return -_logsigmoid(xp, xp.where(desirable, lead, -lead))


def reward(xp: X, chosen: X, rejected: X) -> X:
    """Bradley-Terry on scalar scores (InstructGPT, arXiv:2203.02155, equation 1): -log sigmoid(s_c - s_r)."""
    return -_logsigmoid(xp, chosen - rejected)


def grpo(
    xp: X,
    logps: X,
    old: X,
    ref: X,
    weights: X,
    advantages: X,
    epsilon: tuple[float, float] = (0.2, 0.2),
    *,
    beta: float = 0.04,
) -> X:
    """Group relative policy optimization (arXiv:2402.03300, equations 3 and 4): (rows, width) -> (rows,).

    For each token, with q = pi / pi_old and d = log ref - log pi:
    -min(q A, clip(q, 1 - low, 1 + high) A) + beta (exp(d) - d - 1), averaged over the answer. `epsilon` is (low, high).
    `advantages` (rows,), `old` and `ref` are constants. Log-ratios count up to 20 either way: beyond, a token pushes
    no further and nothing overflows.
    """
    low, high = epsilon
    each = advantages[:, None]
    ratio = xp.exp(xp.clip(logps - old, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO))
    gain = xp.minimum(ratio * each, xp.clip(ratio, 1 - low, 1 + high) * each)
    return row_means(xp, beta * divergence(xp, logps, ref) - gain, weights)


def divergence(xp: X, logps: X, ref: X) -> X:
    """The KL divergence from the reference by token, exp(d) - d - 1 with d = log ref - log pi: never negative."""
    drift = xp.clip(ref - logps, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
    return xp.expm1(drift) - drift


def group_advantages(xp: X, rewards: X, size: int, scale: bool) -> X:
    """How much better than its group each answer is: rewards (n,) less the mean of their groups of `size`.

    With `scale` divided by the group's standard deviation (size - 1 degrees of freedom) as in arXiv:2402.03300;
    without, as arXiv:2503.20783 proposes. A group of one or of equal rewards teaches nothing: zeros, within rounding.
    """
    groups = rewards.reshape(-1, size)
    centred = groups - xp.mean(groups, axis=1)[:, None]
    if scale and size > 1:
        deviation = xp.sqrt(xp.sum(centred**2, axis=1) / (size - 1))
        centred = centred / (deviation + _LEAST_DEVIATION)[:, None]
    return centred.reshape(-1)


def embedding(xp: X, anchors: X, candidates: X, right: X, *, embedding_scale: float = 20.0) -> X:
    """Multiple negatives ranking (arXiv:1705.00652), on cosines: -log softmax(scale cos(anchor, candidates))[right].

    anchors (n, width); candidates (m, width), m >= n. `right` (n,) says which candidate belongs to each anchor; every
    other one, hard negatives too, is a wrong answer to it. `embedding_scale` is one over the temperature.
    """
    scaled = embedding_scale * cosines(xp, anchors, candidates)
    return xp.logsumexp(scaled, 1) - xp.take_along_axis(scaled, right[:, None], 1)[:, 0]


def cosines(xp: X, anchors: X, candidates: X) -> X:
    """(n, width), (m, width) -> (n, m)."""
    return _unit(xp, anchors) @ _unit(xp, candidates).T


def _unit(xp: X, vectors: X) -> X:
    norm = xp.sqrt(xp.clip(xp.sum(vectors**2, axis=-1), _LEAST_NORM**2, None))
    return vectors / norm[:, None]


def _logsigmoid(xp: X, x: X) -> X:
    # In this order: MLX's gradient of the second argument is one minus a sigmoid, which has lost its digits near 1.
    return -xp.logaddexp(-x, 0.0 * x)


def _logistic(xp: X, lead: X, label_smoothing: float) -> X:
    if not label_smoothing:
        return -_logsigmoid(xp, lead)
    return -(1 - label_smoothing) * _logsigmoid(xp, lead) - label_smoothing * _logsigmoid(xp, -lead)


def _log_odds(xp: X, logps: X) -> X:
    logps = xp.clip(logps, None, -_LEAST_LOSS)
    # expm1 keeps the digits of 1 - p for a p near 1; for a small p they vanish beside log p.
    return logps - xp.log(-xp.expm1(logps))
