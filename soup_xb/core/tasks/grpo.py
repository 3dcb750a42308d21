"""Group relative policy optimization, with rewards by rule or by a function."""

from __future__ import annotations

from soup_xb.core.objectives import losses
from soup_xb.core.tasks.task import EQUALLY_OFTEN, ROLLOUT_KEYS, Required, Task

TASK = Task(
    name="grpo",
    about="Learn from the rewards of the model's own answers, compared within a group.",
    formats=("prompt",),
    kind="prompt",
    loss=losses.grpo,
    objective="groups",
    keys=ROLLOUT_KEYS,
    required=(
        Required(
            "training.rewards",
            "learns from what answers earn, and no reward is named",
            "write `exact-match`, `format`, or a function of yours as `./rewards.py:function`.",
        ),
    ),
    no_sharding=EQUALLY_OFTEN,
    feature="grpo",
)
