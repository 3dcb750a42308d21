"""Identity preference optimization."""

from __future__ import annotations

from soup_xb.core.objectives import losses
from soup_xb.core.tasks.task import PAIRS, Task

TASK = Task(
    name="ipo",
    about="Prefer the chosen answer by a fixed margin, which keeps the model from overfitting clear preferences.",
    formats=PAIRS,
    kind="pair",
    loss=losses.ipo,
    objective="pairs",
    balances_router=True,
    feature="ipo",
)
