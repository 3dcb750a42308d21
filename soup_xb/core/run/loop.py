"""The one training loop: plain numbers in, events out; the session does the tensor work."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from attrs import frozen

from soup_xb.core.errors import NonFiniteError
from soup_xb.core.run.events import EvalEvent, Listener, Notice, RestartEvent, StepEvent
from soup_xb.core.run.plan import Plan
from soup_xb.core.run.restart_watch import RestartWatch
from soup_xb.core.run.reward_watch import RewardWatch
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
