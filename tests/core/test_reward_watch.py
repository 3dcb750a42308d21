"""Steps in which no answer earned more than another: when they are worth a warning, and when an error."""

from __future__ import annotations

import pytest

from soup_xb.core.errors import ModelError
from soup_xb.core.run.events import StepEvent
from soup_xb.core.run.loop import RewardWatch, check_rewards


def warnings(shares: list[float], total_steps: int = 1000) -> list[int]:
    """The steps after which a run warns whose groups are equal to these shares."""
    watch = RewardWatch(total_steps)
    told = [
        watch.after(step, {"equal_groups": share, "reward": 0.5})
        for step, share in enumerate(shares, start=1)
    ]
    return [step for step, problem in enumerate(told, start=1) if problem]


def test_a_warning_comes_once_and_only_after_steps_in_a_row() -> None:
    assert warnings([1.0] * 40) == [10]
    assert warnings([1.0] * 40, total_steps=50) == [5]
    assert warnings(([1.0] * 9 + [0.75]) * 4) == []
    assert warnings([0.5] * 7 + [1.0] * 30) == [17]


def test_tasks_that_sample_nothing_are_not_followed() -> None:
    watch = RewardWatch(10)
    assert [watch.after(step, {}) for step in range(1, 11)] == [None] * 10
    check_rewards([StepEvent(1, 0.1, 0.1, 0.0, 1, 1, 1.0)], "soup.yaml")


def test_one_group_that_told_answers_apart_is_no_error() -> None:
    def steps(*shares: float) -> list[StepEvent]:
        return [
            StepEvent(step, 0.0, 0.1, 0.0, 1, 1, 1.0, {"equal_groups": share, "reward": step / 4})
            for step, share in enumerate(shares)
        ]

    check_rewards(steps(1.0, 0.875, 1.0), "soup.yaml")
    check_rewards([], "soup.yaml")
    with pytest.raises(ModelError, match=r"in none of 2 steps .* 0 to 0\.25 on average"):
        check_rewards(steps(1.0, 1.0), "soup.yaml")
