"""Odds ratio preference optimization."""

from __future__ import annotations

from soup_xb.core.objectives import losses
from soup_xb.core.tasks.task import PAIRS, Task

TASK = Task(
    name="orpo",
    about="Learn the chosen answer and prefer it to the rejected one at once, without a reference.",
    formats=PAIRS,
    kind="pair",
    loss=losses.orpo,
    objective="pairs",
    measures={"log_odds": losses.odds_margin},
    balances_router=True,
    feature="orpo",
)
