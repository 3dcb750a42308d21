"""What preference and reinforcement tasks optimize, in numbers."""

from __future__ import annotations

import numpy as np
import pytest
from attrs import fields

from soup_xb.core.objectives.settings import (
    OBJECTIVES,
    Dpo,
    Grpo,
    Ipo,
    RewardMean,
)


def test_the_mean_reward_is_the_same_however_a_step_is_split() -> None:
    rewards = np.random.default_rng(3).normal(size=12)
    whole, parts = RewardMean().after(rewards.sum(), 12), RewardMean()
    for part in (rewards[:0], rewards[:5], rewards[5:]):
        parts = parts.after(part.sum(), len(part))
    assert (parts.mean, parts.count) == (pytest.approx(whole.mean), whole.count)
    assert whole.mean == pytest.approx(rewards.mean())


def test_every_objective_stands_by_default_and_refuses_what_means_nothing() -> None:
    for kind in OBJECTIVES.values():
        for attribute in fields(kind):
            if attribute.name != "scale_rewards":
                with pytest.raises(ValueError, match=attribute.name):
                    kind(**{attribute.name: -0.1})
    for kind, values in ((Dpo, {"label_smoothing": 0.5}), (Ipo, {"beta": 0.0}), (Grpo, {"epsilon_low": 1.0})):
        with pytest.raises(ValueError):
            kind(**values)
