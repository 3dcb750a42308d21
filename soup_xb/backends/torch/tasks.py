"""Which loss belongs to which objective."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from attrs import frozen

from soup_xb.backends.torch.embedding_task import EmbeddingTask
from soup_xb.backends.torch.grpo_task import GrpoTask
from soup_xb.backends.torch.preference_task import PreferenceTask
from soup_xb.backends.torch.processes import Processes
from soup_xb.backends.torch.reward_task import RewardTask
from soup_xb.backends.torch.task_loss import TaskLoss, TokenLoss
from soup_xb.core.objectives.settings import Embedding, Grpo, Reward


@frozen
class Surroundings:
    """What a loss may need of the session around it.

    Inside `true_base()` the session's model is the base without its adapter. `width` is its hidden size.
    """

    processes: Processes
    place: torch.device
    true_base: Callable[[], AbstractContextManager[Any]]
    width: int
    seed: int


def task_loss(objective: Any, around: Surroundings) -> TaskLoss:
    """The loss of a session's objective (see core.objectives.settings); without one, that of target tokens."""
    if objective is None:
        return TokenLoss(around.place)
    if isinstance(objective, Grpo):
        return GrpoTask(objective, around.processes, around.place, around.true_base)
    if isinstance(objective, Reward):
        return RewardTask(around.width, around.seed, around.processes, around.place)
    if isinstance(objective, Embedding):
        return EmbeddingTask(objective, around.processes, around.place)
    return PreferenceTask(objective, around.processes, around.place)
