"""What preference and reinforcement tasks optimize, in numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from soup_xb.core.config.load import parse_config
from soup_xb.core.config.schema import KEYS
from soup_xb.core.errors import ConfigError
from soup_xb.core.objectives.objective import Objective
from soup_xb.core.run.plan import objective_of
from soup_xb.core.tasks import TASKS


def objective(task: str, training: str = "") -> Objective:
    text = f"base: tiny\ntask: {task}\ndata: {{train: rows.jsonl}}\ntraining: {{{training}}}\n"
    return objective_of(parse_config(text, "soup.yaml").config)


def after(objective: Objective, rewards: Any) -> Objective:
    objective.after_step({"reward": (float(rewards.sum()), float(len(rewards)))})
    return objective


def test_the_mean_reward_is_the_same_however_a_step_is_split() -> None:
    rewards = np.random.default_rng(3).normal(size=12)
    whole, parts = after(objective("bco"), rewards), objective("bco")
    for part in (rewards[:0], rewards[:5], rewards[5:]):
        after(parts, part)
    assert parts.state() == pytest.approx(whole.state())
    assert whole.state() == {"mean": pytest.approx(rewards.mean()), "count": 12.0}
    # The next step's losses are measured from it.
    assert whole.before_step(None, []) == {"shift": whole.state()["mean"]}  # type: ignore[arg-type]


def test_the_mean_reward_goes_on_where_a_checkpoint_left_it() -> None:
    rewards = np.random.default_rng(4).normal(size=12)
    whole, first, second = (objective("bco") for _ in range(3))
    after(first, rewards[:7])
    second.load(first.state())
    assert after(second, rewards[7:]).state() == pytest.approx(after(whole, rewards).state())


@pytest.mark.parametrize("task", [name for name in TASKS if name != "bco"])
def test_other_tasks_carry_nothing_from_step_to_step(task: str) -> None:
    carried = objective(task, {"grpo": "rewards: format", "rlhf": "reward_model: x"}.get(task, ""))
    if task != "kto":
        assert carried.before_step(None, []) == {}  # type: ignore[arg-type]
    assert after(carried, np.ones(3)).state() == {}


def test_every_number_of_a_loss_is_a_key_that_stands_by_default_and_refuses_what_means_nothing() -> None:
    for name, task in TASKS.items():
        for setting, default in task.settings.items():
            key = KEYS[f"training.{setting}"]
            assert key.range.holds(key.default if default is None else default)
            with pytest.raises(ConfigError, match=setting):
                objective(name, f"{setting}: -0.1")
    for task, text in (
        ("dpo", "label_smoothing: 0.5"),
        *((task, "beta: 0") for task in ("dpo", "ipo", "orpo", "simpo", "cpo", "kto", "bco")),
        ("embedding", "embedding_scale: 0"),
    ):
        with pytest.raises(ConfigError, match=text.split(":", maxsplit=1)[0]):
            objective(task, text)
