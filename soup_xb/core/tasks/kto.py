"""Kahneman-Tversky optimization."""

from __future__ import annotations

from soup_xb.core.objectives import losses
from soup_xb.core.tasks.task import JUDGED, Task

TASK = Task(
    name="kto",
    about="Learn from answers that were judged good or bad one by one, held to the base's log-probabilities.",
    formats=JUDGED,
    kind="judged",
    loss=losses.kto,
    objective="judged",
    balances_router=True,
    feature="kto",
)
