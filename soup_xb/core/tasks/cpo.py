"""Contrastive preference optimization."""

from __future__ import annotations

from soup_xb.core.objectives import losses
from soup_xb.core.tasks.task import PAIRS, Task

TASK = Task(
    name="cpo",
    about="Prefer the chosen answer and learn it at once, without a reference.",
    formats=PAIRS,
    kind="pair",
    loss=losses.cpo,
    objective="pairs",
    balances_router=True,
    feature="cpo",
)
