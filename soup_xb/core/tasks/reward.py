"""A reward model."""

from __future__ import annotations

from soup_xb.core.objectives import losses
from soup_xb.core.tasks.task import EQUALLY_OFTEN, PAIRS, Task

TASK = Task(
    name="reward",
    about="Train a reward model: a scalar head that scores the chosen answer higher.",
    formats=PAIRS,
    kind="pair",
    loss=losses.reward,
    objective="scores",
    no_sharding=EQUALLY_OFTEN,
    feature="reward",
)
