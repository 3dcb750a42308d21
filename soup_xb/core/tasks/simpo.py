"""Simple preference optimization."""

from __future__ import annotations

from soup_xb.core.objectives import losses
from soup_xb.core.tasks.task import PAIRS, Task

TASK = Task(
    name="simpo",
    about="Prefer the chosen answer by its mean log-probability and a margin, without a reference.",
    formats=PAIRS,
    kind="pair",
    loss=losses.simpo,
    objective="pairs",
    balances_router=True,
    feature="simpo",
)
