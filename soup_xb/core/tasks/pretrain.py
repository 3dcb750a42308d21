"""Continued pretraining: plain text, every token of it, packed into full sequences."""

from __future__ import annotations

from soup_xb.core.tasks.task import Task

TASK = Task(
    name="pretrain",
    about="Learn every token of plain text, in full sequences.",
    formats=("text",),
    packing="always",
    balances_router=True,
)
