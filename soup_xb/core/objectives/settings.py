"""What a preference or reinforcement task optimizes, as numbers; defaults are those of the papers, or of TRL."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from attrs import field, frozen
from attrs.validators import ge, gt, in_, lt

from soup_xb.core.config.schema import POOLINGS


def _above_zero(default: float) -> Any:
    return field(default=default, validator=gt(0))


def _zero_or_more(default: float) -> Any:
    return field(default=default, validator=ge(0))


def _label_noise() -> Any:
    return field(default=0.0, validator=[ge(0), lt(0.5)])


@frozen
class Dpo:
    """`beta` holds the model at the reference; `label_smoothing` is the share of pairs judged the wrong way round."""

    beta: float = _above_zero(0.1)
    label_smoothing: float = _label_noise()


@frozen
class Ipo:
    """`beta` is the paper's tau: the margin that is aimed at is 1 / (2 beta), in nats a token."""

    beta: float = _above_zero(0.1)


@frozen
class Kto:
    """`beta` is how soon a gain saturates; the weights balance good and bad answers where one kind is rare."""

    beta: float = _above_zero(0.1)
    desirable_weight: float = _zero_or_more(1.0)
    undesirable_weight: float = _zero_or_more(1.0)


@frozen
class Bco:
    """`beta` scales the log-ratio to the reference into the logit of a classifier."""

    beta: float = _above_zero(0.1)


@frozen
class Orpo:
    """`beta` is the paper's lambda: the weight of the odds ratio beside the likelihood of the chosen answer."""

    beta: float = _above_zero(0.1)


@frozen
class Simpo:
    """`beta` scales mean log-probabilities; `gamma` is the margin that the chosen answer's must win by."""

    beta: float = _above_zero(2.0)
    gamma: float = _zero_or_more(1.0)
    label_smoothing: float = _label_noise()


@frozen
class Reward:
    """The logistic loss of two scores has no number to set."""


@frozen
class Grpo:
    """`beta` weighs the KL term; a token's ratio counts between 1 - `epsilon_low` and 1 + `epsilon_high`.

    `scale_rewards` divides a group's advantages by their standard deviation. `group_size` answers are sampled to each
    prompt, at `temperature`.
    """

    beta: float = _zero_or_more(0.04)
    epsilon_low: float = field(default=0.2, validator=[gt(0), lt(1)])
    epsilon_high: float = _above_zero(0.2)
    scale_rewards: bool = True
    group_size: int = field(default=8, validator=ge(2))
    temperature: float = _above_zero(1.0)


@frozen
class Embedding:
    """`scale` multiplies cosines before the softmax: one over the temperature.

    `pooling` says which tokens a text's vector is made of: mean, cls (the first), last, or auto.
    """

    scale: float = _above_zero(20.0)
    pooling: str = field(default="auto", validator=in_(POOLINGS))


OBJECTIVES: Mapping[str, type] = MappingProxyType(
    {
        "dpo": Dpo,
        "ipo": Ipo,
        "kto": Kto,
        "bco": Bco,
        "orpo": Orpo,
        "simpo": Simpo,
        "reward": Reward,
        "grpo": Grpo,
        "rlhf": Grpo,
        "embedding": Embedding,
    }
)


@frozen
class RewardMean:
    """The mean of all rewards so far, which BCO shifts its rewards by. Two numbers are its whole state.

    >>> RewardMean().after(total=3.0, count=2).after(total=0.0, count=1)
    RewardMean(mean=1.0, count=3)
    """

    mean: float = 0.0
    count: int = 0

    def after(self, total: float, count: int) -> RewardMean:
        """The mean with `count` more rewards that sum to `total`: those of all micro-batches and processes."""
        if not count:
            return self
        together = self.count + count
        return RewardMean(self.mean + (total - count * self.mean) / together, together)
