"""The scalar head of a reward model: its start, and its place in a saved adapter, as stock libraries look for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from soup_xb.core.adapter.peft_file import HEAD, HEAD_KEY, SETTINGS, WEIGHTS, read_adapter, write_tensors
from soup_xb.core.errors import ModelError
from soup_xb.core.random_numbers import uniform

# The deviation that most bases' new layers start with (`initializer_range`).
_DEVIATION = 0.02

Array = np.ndarray[Any, Any]


def head_start(width: int, seed: int) -> Array:
    """The head before the first step, float32 (1, width): uniform, mean 0, standard deviation 0.02."""
    values = uniform(width, HEAD, seed)
    start: Array = ((2.0 * values - 1.0) * _DEVIATION * np.sqrt(3.0)).astype(np.float32).reshape(1, width)
    return start


def write_head(folder: Path, head: Array) -> None:
    """Put the head into an adapter that was just written, which becomes one for sequence classification."""
    from safetensors.numpy import load_file

    write_tensors(folder / WEIGHTS, {**load_file(folder / WEIGHTS), HEAD_KEY: head})
    file = folder / SETTINGS
    settings = json.loads(file.read_text("utf-8")) | {"task_type": "SEQ_CLS", "modules_to_save": [HEAD]}
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")


def check_head(folder: Path, head: Array) -> None:
    """Raise ModelError where the head read back from the disk is not the trained one, or tells nothing apart."""
    saved = read_adapter(folder)
    if saved.head is None or not np.array_equal(saved.head, head) or not told_as_reward(saved.settings):
        raise ModelError(
            "adapter-not-saved",
            "the head read back from the disk is not the one that was trained",
            where=str(folder),
            help="check the disk; the last checkpoint can be resumed.",
        )
    if not head.any():
        raise ModelError(
            "adapter-inert",
            "the head is zero: every answer gets the same score",
            where=str(folder),
            help="look at `training.lr` and `training.weight_decay`.",
        )


def told_as_reward(settings: Mapping[str, Any]) -> bool:
    """Whether an adapter's settings say that it scores and does not write."""
    return settings.get("task_type") == "SEQ_CLS" and settings.get("modules_to_save") == [HEAD]


def is_reward_model(folder: Path) -> ModelError:
    """The error for an adapter that scores, where one that writes is asked for."""
    return ModelError(
        "adapter-is-reward-model",
        "is a reward model: it scores answers, and writes none",
        where=str(folder),
        help="name it as `training.reward_model` of a `task: rlhf` file; its README shows how to ask for scores.",
    )
