"""Supervised fine-tuning: answers, with cross-entropy on their tokens."""

from __future__ import annotations

from soup_xb.core.tasks.task import ANSWERS, Task

TASK = Task(
    name="sft",
    about="Learn the assistant's turns, completions or plain texts.",
    formats=ANSWERS,
    packing="optional",
    keys=("data.train_on",),
    balances_router=True,
)
