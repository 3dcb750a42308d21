"""Reinforcement learning from a reward model, with the group relative policy gradient."""

from __future__ import annotations

from soup_xb.core.objectives import losses
from soup_xb.core.tasks.task import EQUALLY_OFTEN, ROLLOUT_KEYS, Required, Task

TASK = Task(
    name="rlhf",
    about="Learn from a reward model's scores of the model's own answers.",
    formats=("prompt",),
    kind="prompt",
    loss=losses.grpo,
    objective="groups",
    keys=(*ROLLOUT_KEYS, "training.reward_model"),
    required=(
        Required(
            "training.reward_model",
            "learns from what a reward model thinks, and none is named",
            "train one with `task: reward`, and write its output folder here.",
        ),
    ),
    no_sharding=EQUALLY_OFTEN,
    feature="rlhf",
)
