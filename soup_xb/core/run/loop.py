"""The one training loop: plain numbers in, events out; the session does the tensor work.

It warns if the loss does not recover from a ReLoRA restart, and if all answers of a group get the same reward.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

from attrs import define, field, frozen

from soup_xb.core.errors import ModelError, NonFiniteError, Problem
from soup_xb.core.run.events import EvalEvent, Event, Listener, Notice, RestartEvent, StepEvent
from soup_xb.core.run.plan import Plan
from soup_xb.core.run.session import StepSettings, TrainingSession


@frozen
class Hooks:
    """What the loop calls besides the session.

    `emit` takes an event, `save` writes the checkpoint of a step, `stop` is the signal that came, 0 if none.
    """

    emit: Listener
    save: Callable[[int], None]
    stop: Callable[[], int]


@frozen
class LoopResult:
    """How a run went. `seconds` is the whole loop; `tokens` counts real tokens of the steps done in it."""

    step: int
    tokens: int
    seconds: float
    stopped_by: int


def run_loop(
    plan: Plan, session: TrainingSession, hooks: Hooks, done: int = 0, losses: Sequence[float] = ()
) -> LoopResult:
    """Train from step `done + 1` to the end of the plan, or until a signal.

    `losses` are those of the last steps that are done, which restarts are judged by. Raises NonFiniteError before an
    update would spoil the adapter.
    """
    started = time.perf_counter()
    tokens, step, signal = 0, done, 0
    last_loss = math.nan
    restarts, rewards = RestartWatch(plan.restart_steps, losses), RewardWatch(plan.total_steps)
    while step < plan.total_steps and not signal:
        step += 1
        event = _train_step(plan, session, step, last_loss)
        last_loss, tokens = event.loss, tokens + event.tokens
        hooks.emit(event)
        for problem in (restarts.after(step, event.loss), rewards.after(step, event.means)):
            if problem:
                hooks.emit(Notice(problem, warning=True))
        if step in plan.restart_steps:
            hooks.emit(_restart(plan, session, step))
        if step in plan.eval_steps:
            hooks.emit(_evaluate(plan, session, step))
        signal = session.agree(hooks.stop())
        if step in plan.save_steps or (signal and step < plan.total_steps):
            hooks.save(step)
    return LoopResult(step, tokens, time.perf_counter() - started, signal)


def _train_step(plan: Plan, session: TrainingSession, step: int, last_loss: float) -> StepEvent:
    started = time.perf_counter()
    settings = StepSettings(
        step=step,
        learning_rate=plan.learning_rates.at(step),
        target_tokens=plan.target_tokens(step),
        examples=plan.examples(step),
        target_weight=plan.target_weight(step),
    )
    result = session.train_step(plan.micro_batches(step, session.process, session.processes), settings)
    if not result.applied:
        raise _non_finite(plan, settings, result.loss, last_loss)
    return StepEvent(
        step=step,
        loss=result.loss,
        learning_rate=settings.learning_rate,
        grad_norm=result.grad_norm,
        target_tokens=settings.target_tokens + result.sampled_tokens,
        tokens=plan.real_tokens(step) + result.sampled_tokens,
        seconds=time.perf_counter() - started,
        means=result.means,
    )


def _restart(plan: Plan, session: TrainingSession, step: int) -> RestartEvent:
    rows = plan.micro_batches(step, session.process, session.processes)
    before = session.evaluate(rows)
    result = session.restart(plan.restart(step))
    after = session.evaluate(rows)
    return RestartEvent(step, result.entries, result.pruned, before.mean, after.mean)


def _evaluate(plan: Plan, session: TrainingSession, step: int) -> EvalEvent:
    started = time.perf_counter()
    loss = session.evaluate(plan.eval_micro_batches(session.process, session.processes))
    return EvalEvent(
        step=step,
        loss=loss.mean,
        # The loss of a preference task is no mean over tokens, and has no perplexity.
        perplexity=math.nan if loss.examples else perplexity(loss.mean),
        target_tokens=loss.target_tokens,
        seconds=time.perf_counter() - started,
        means=loss.means,
    )


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that is beyond a float."""
    return math.exp(loss) if loss < 700 else math.inf


def _non_finite(plan: Plan, settings: StepSettings, loss: float, last_loss: float) -> NonFiniteError:
    rows = [str(plan.rows[row].source) for rows in plan.step_rows(settings.step) for row in rows]
    what = "gradient" if math.isfinite(loss) else "loss"
    shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
    good = f"{last_loss:.4f}" if math.isfinite(last_loss) else "none"
    return NonFiniteError(
        f"non-finite-{what}",
        f"the {what} is not finite; nothing was updated. Learning rate {settings.learning_rate:.3g}, "
        f"last good loss {good}, rows {shown}",
        where=f"step {settings.step}",
        help="lower `training.lr` or set `training.max_grad_norm`; look at these rows; saved checkpoints are sound.",
    )


WINDOW = 20
TOLERANCE = 0.05


def _window(losses: Iterable[float]) -> deque[float]:
    return deque(losses, maxlen=2 * WINDOW)


@define
class RestartWatch:
    """Compares the mean loss of the 20 steps after each restart with that of the 20 before it.

    `losses` are those of the steps just before the first one that it will be told, for a run that goes on.
    """

    restart_steps: tuple[int, ...]
    losses: deque[float] = field(default=(), converter=_window)

    def after(self, step: int, loss: float) -> Problem | None:
        """Take the loss of a step. Returns the warning when it stays more than 5% higher after a restart.

        Silent where it does not know all 40 losses.
        """
        self.losses.append(loss)
        restart = step - WINDOW
        if restart not in self.restart_steps or len(self.losses) < 2 * WINDOW:
            return None
        losses = list(self.losses)
        before, after = sum(losses[:WINDOW]) / WINDOW, sum(losses[WINDOW:]) / WINDOW
        # The loss of a task that earns rewards is below zero.
        if after <= before + TOLERANCE * abs(before):
            return None
        share = (after - before) / abs(before) if before else math.inf
        return Problem(
            "restart-hurts",
            f"mean loss {after:.4f} in the {WINDOW} steps after the restart at step {restart}, "
            f"{before:.4f} in the {WINDOW} before: {share:.0%} higher",
            where=f"step {step}",
            help="lower `training.relora_prune_ratio`, raise `training.relora_steps`, or use `relora_mode: merge`.",
        )


# Steps in a row before the warning: a tenth of the run, within these bounds.
_FEWEST, _MOST = 2, 10
_EQUAL = "equal_groups"
_WAY_OUT = (
    "read some answers (`soupx generate`). Let the prompts ask for what the rewards look for, by example; try "
    "`training.answer_pattern` on an answer; pay for a first part of the way by a function of your own; raise "
    "`training.max_new_tokens` where answers are cut off (`cut_off` in metrics.jsonl), and `training.temperature` or "
    "`training.group_size` where all answers are alike."
)


@define
class RewardWatch:
    """Follows the steps of a run of `total_steps`, and warns once."""

    total_steps: int
    equal: int = 0
    warned: bool = False

    @property
    def patience(self) -> int:
        """So many steps in a row that teach nothing are worth a warning.

        >>> [RewardWatch(total_steps).patience for total_steps in (4, 50, 1000)]
        [2, 5, 10]
        """
        return min(_MOST, max(_FEWEST, self.total_steps // 10))

    def after(self, step: int, means: Mapping[str, float]) -> Problem | None:
        """Take the means of a step. Returns the warning once `patience` steps in a row taught nothing."""
        self.equal = self.equal + 1 if means.get(_EQUAL) == 1 else 0
        if self.warned or self.equal < self.patience:
            return None
        self.warned = True
        text = (
            f"{self.equal} steps in a row, from step {step - self.equal + 1}, in which no answer earned more than "
            f"another one to the same prompt ({means['reward']:.3g} on average): nothing is learned from them"
        )
        return Problem("equal-rewards", text, f"step {step}", _WAY_OUT)


def check_rewards(events: Iterable[Event], where: str) -> None:
    """Raise ModelError where in no step of a run any answer earned more than another one to its prompt."""
    steps = [event for event in events if isinstance(event, StepEvent)]
    if not steps or any(event.means.get(_EQUAL) != 1 for event in steps):
        return
    earned = [event.means["reward"] for event in steps]
    least, most = f"{min(earned):.3g}", f"{max(earned):.3g}"
    between = least if least == most else f"{least} to {most}"
    raise ModelError(
        "equal-rewards",
        f"in none of {len(steps)} steps did any answer earn more than another to the same prompt (a step's rewards: "
        f"{between} on average), so the adapter learned nothing and adds nothing to the base",
        where=where,
        help=_WAY_OUT,
    )
