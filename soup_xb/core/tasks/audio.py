"""Transcripts and conversations about sounds."""

from __future__ import annotations

from soup_xb.core.tasks.task import EQUALLY_OFTEN, FILES_OF_ROWS, WORDS_ALONE, No, Task

TASK = Task(
    name="audio",
    about="Learn transcripts of sounds, or the assistant's turns of conversations about them.",
    formats=("transcript", "messages"),
    media="audio",
    keys=("data.train_on",),
    peft_type=None,
    no_packing=FILES_OF_ROWS,
    no_sharding=EQUALLY_OFTEN,
    feature="audio",
    mlx=No("mlx-lm loads neither speech-to-text models nor audio encoders", WORDS_ALONE),
)
