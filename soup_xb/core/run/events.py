"""What happens during a run, as plain values: the loop emits them, the run folder and the screen read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from attrs import field, frozen

from soup_xb.core.errors import Problem

# The means that are the share of right comparisons: of two answers, and of a text with all others of its micro-batch.
ACCURACIES = ("reward_accuracy", "accuracy")


@frozen
class StartEvent:
    """Training begins after step `done` and ends at `total_steps`. Told to listeners, not kept in a file."""

    done: int
    total_steps: int


@frozen
class StepEvent:
    """One optimizer update. `loss` is the mean over the step's target tokens, `tokens` counts real tokens.

    For tasks that compare texts it is the mean over pairs or judged answers, and `means` are further means over them.
    Of tasks that sample, `tokens` are prompts with their answers, as they are trained on; the answers are the targets.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    target_tokens: int
    tokens: int
    seconds: float
    means: Mapping[str, float] = field(factory=dict)


@frozen
class EvalEvent:
    """One evaluation on held-out rows. `loss` is the mean over `target_tokens`.

    For preference tasks it is the mean over pairs or judged answers, `perplexity` is NaN, `means` are further means.
    """

    step: int
    loss: float
    perplexity: float
    target_tokens: int
    seconds: float
    means: Mapping[str, float] = field(factory=dict)


@frozen
class RestartEvent:
    """One ReLoRA firing: `pruned` of `entries` adapter entries went; the losses are of the same rows."""

    step: int
    entries: int
    pruned: int
    loss_before: float
    loss_after: float


@frozen
class SaveEvent:
    """One checkpoint, whole on the disk."""

    step: int
    path: str
    bytes: int
    seconds: float


@frozen
class Notice:
    """Something that the user should know; `warning` says that it may be a mistake."""

    problem: Problem
    warning: bool = False


Event = StartEvent | StepEvent | EvalEvent | RestartEvent | SaveEvent | Notice
Listener = Callable[[Event], None]
