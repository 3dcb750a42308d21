"""Conversations about pictures."""

from __future__ import annotations

from soup_xb.core.tasks.task import EQUALLY_OFTEN, FILES_OF_ROWS, WORDS_ALONE, No, Task

TASK = Task(
    name="vision",
    about="Learn the assistant's turns of conversations about pictures.",
    formats=("messages", "sharegpt"),
    media="image",
    keys=("data.train_on",),
    peft_type=None,
    no_packing=FILES_OF_ROWS,
    no_sharding=EQUALLY_OFTEN,
    feature="vision",
    mlx=No("mlx-lm loads only the language model of a base, not its vision encoder", WORDS_ALONE),
)
