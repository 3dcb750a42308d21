"""Binary classifier optimization."""

from __future__ import annotations

from soup_xb.core.objectives import losses
from soup_xb.core.tasks.task import JUDGED, Task

TASK = Task(
    name="bco",
    about="Learn from answers that were judged good or bad, as a classifier whose logit is the reward.",
    formats=JUDGED,
    kind="judged",
    loss=losses.bco,
    objective="judged",
    balances_router=True,
    feature="bco",
)
