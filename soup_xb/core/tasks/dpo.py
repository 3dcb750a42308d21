"""Direct preference optimization."""

from __future__ import annotations

from soup_xb.core.objectives import losses
from soup_xb.core.tasks.task import PAIRS, Task

TASK = Task(
    name="dpo",
    about="Prefer the chosen answer to the rejected one, held to the base's log-probabilities.",
    formats=PAIRS,
    kind="pair",
    loss=losses.dpo,
    objective="pairs",
    balances_router=True,
    feature="dpo",
)
