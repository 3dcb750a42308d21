"""What a person sees while a run trains: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from soup_xb.core.run.events import (
    ACCURACIES,
    EvalEvent,
    Event,
    Notice,
    RestartEvent,
    SaveEvent,
    StartEvent,
    StepEvent,
)
from soup_xb.core.text import bytes_text, count_text, duration_text, rate_text

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

RECENT_STEPS = 32


class ProgressListener:
    """Shows the events of a run on `stream`; a listener and a context manager.

    On a terminal a bar carries loss, speed and time left; elsewhere a line comes with the first and the last
    step and every `logging_steps`. Evaluations, saves, restarts and notices are lines on both.
    """

    def __init__(self, total_steps: int, logging_steps: int, stream: TextIO) -> None:
        self.total_steps = total_steps
        self.logging_steps = max(1, logging_steps)
        self.stream = stream
        self._recent: deque[StepEvent] = deque(maxlen=RECENT_STEPS)
        self._first = True
        self._is_lost = False
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> ProgressListener:
        if self.stream.isatty():
            self._progress = _bar(self.stream)
            self._task = self._progress.add_task("", total=self.total_steps, figures="")
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            with suppress(OSError):
                self._progress.stop()
            self._progress = None

    def __call__(self, event: Event) -> None:
        """Show one event. Where the stream takes no more, nothing further is shown, and the run goes on."""
        if self._is_lost:
            return
        try:
            self._show(event)
        except OSError:
            # The terminal or the pipe is gone, or the log's disk is full; `metrics.jsonl` has every event.
            self._is_lost = True

    def _show(self, event: Event) -> None:
        if isinstance(event, StartEvent):
            self._begin(event)
        elif isinstance(event, StepEvent):
            self._show_step(event)
        else:
            self._write(event_line(event))

    def _begin(self, event: StartEvent) -> None:
        self.total_steps = event.total_steps
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, total=event.total_steps, completed=event.done)

    def _show_step(self, event: StepEvent) -> None:
        self._recent.append(event)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=event.step, figures="  ".join(self._figures(event)))
        elif self._first or event.step % self.logging_steps == 0 or event.step == self.total_steps:
            loss, *speed = self._figures(event)
            rate = f"lr {rate_text(event.learning_rate)}"
            self._write("  ".join([f"step {event.step}/{self.total_steps}", loss, rate, *speed]))
        self._first = False

    def _figures(self, event: StepEvent) -> list[str]:
        seconds = sum(step.seconds for step in self._recent)
        tokens = sum(step.tokens for step in self._recent)
        loss = "  ".join([f"loss {event.loss:.4f}", *means_words(event.means)])
        if seconds <= 0:
            return [loss]
        left = (self.total_steps - event.step) * seconds / len(self._recent)
        return [loss, f"{tokens / seconds:,.0f} tok/s", f"{duration_text(left)} left"]

    def _write(self, line: str) -> None:
        if self._progress is not None:
            # Not `print`: markup, wrapping and highlighting would change what the text says.
            self._progress.console.out(line, highlight=False)
            return
        self.stream.write(line + "\n")
        self.stream.flush()


def event_line(event: EvalEvent | RestartEvent | SaveEvent | Notice) -> str:
    """One event in words.

    >>> event_line(SaveEvent(step=100, path="out/checkpoints/step-00000100", bytes=4_200_000, seconds=0.5))
    'saved step 100  out/checkpoints/step-00000100  4.0 MiB  0.5s'
    """
    if isinstance(event, Notice):
        return notice_line(event)
    if isinstance(event, EvalEvent):
        # The loss of some tasks is no mean over tokens, and has no perplexity.
        further = [] if math.isnan(event.perplexity) else [f"perplexity {event.perplexity:.2f}"]
        loss = "  ".join([f"loss {event.loss:.4f}", *further, *means_words(event.means)])
        return f"eval step {event.step}  {loss}  {duration_text(event.seconds)}"
    if isinstance(event, RestartEvent):
        entries = f"{count_text(event.pruned)} of {count_text(event.entries)} entries pruned"
        return f"restart step {event.step}  {entries}  loss {event.loss_before:.4f} -> {event.loss_after:.4f}"
    return f"saved step {event.step}  {event.path}  {bytes_text(event.bytes)}  {duration_text(event.seconds)}"


def means_words(means: Mapping[str, float]) -> list[str]:
    """The means that say how a task that compares or rewards texts goes.

    >>> means_words({"reward_accuracy": 0.75, "reward_margin": 0.125, "reward_chosen": 0.1})
    ['accuracy 75%', 'margin 0.125']
    >>> means_words({"reward": 0.5, "reward/format": 1.0, "kl": 0.02, "completion_tokens": 31.5})
    ['reward 0.500', 'kl 0.020', 'tokens 31.5']
    """
    words = [f"reward {means['reward']:.3f}"] if "reward" in means else []
    if "kl" in means:
        words.append(f"kl {means['kl']:.3f}")
    if "completion_tokens" in means:
        words.append(f"tokens {means['completion_tokens']:.1f}")
    words += [f"accuracy {means[name]:.0%}" for name in ACCURACIES if name in means]
    if "reward_margin" in means:
        words.append(f"margin {means['reward_margin']:.3f}")
    return words


def notice_line(notice: Notice) -> str:
    """A notice in the shape of an error, `warning[code]` or `note:`."""
    problem = notice.problem
    if notice.warning:
        return problem.render("warning")
    place = f"{problem.where}: " if problem.where else ""
    return f"note: {place}{problem.message}" + (f"\n  help: {problem.help}" if problem.help else "")


def _bar(stream: TextIO) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    return Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[figures]}", markup=False),
        console=Console(file=stream),
        # What a command prints for another program stays on stdout.
        redirect_stdout=False,
    )
