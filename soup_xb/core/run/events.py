"""What happens during a run, as plain values, and `metrics.jsonl`, which holds one event a line in order."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import asdict, field, fields, frozen

from soup_xb.core.disk import json_text
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


KINDS: dict[str, Callable[..., Event]] = {
    "step": StepEvent,
    "eval": EvalEvent,
    "restart": RestartEvent,
    "save": SaveEvent,
}
NAMES = {StepEvent: "step", EvalEvent: "eval", RestartEvent: "restart", SaveEvent: "save"}
MAX_LINE_BYTES = 64 * 1024
TAIL_BYTES = 64 * 1024


def encode_event(event: Event, step: int = 0) -> str:
    """One line without its newline. `step` is where a notice stands, which has none of its own.

    Numbers that are not finite become null, so that every line is valid JSON.
    """
    if isinstance(event, Notice):
        problem = asdict(event.problem)
        return json_text({"event": "notice", "step": step, **problem, "warning": event.warning})
    content = asdict(event)
    if not content.get("means", True):
        del content["means"]
    return json_text({"event": NAMES[type(event)], **content})


def decode_event(line: str | bytes) -> Event:
    """The event of a line; null is NaN again. Raises ValueError for a line that no run wrote."""
    try:
        content: Any = json.loads(line)
    except RecursionError as error:
        raise ValueError("too deep") from error
    if not isinstance(content, dict):
        raise ValueError("not an object")
    kind = content.pop("event", None)
    try:
        if kind == "notice":
            return Notice(
                Problem(*(str(content[key]) for key in ("code", "message", "where", "help"))),
                content["warning"] is True,
            )
        if kind not in KINDS:
            raise ValueError(f"unknown event {kind!r}")
        values = {name: _value(content[name], kind_of) for name, kind_of in _columns(kind)}
        return KINDS[kind](**values, **_means(content))
    except KeyError as error:
        raise ValueError(f"{error} is missing") from error


def read_events(path: Path) -> tuple[Event, ...]:
    """Every event of a run, without a torn last line; other unreadable lines become one warning."""
    events: list[Event] = []
    unreadable = []
    for number, line in _lines(path):
        try:
            events.append(decode_event(line))
        except ValueError:
            if line.endswith(b"\n"):
                unreadable.append(number)
    if unreadable:
        message = f"{len(unreadable)} lines cannot be read, the first is line {unreadable[0]}"
        events.append(Notice(Problem("metrics-damaged", message, where=str(path)), warning=True))
    return tuple(events)


def kept_lines(path: Path, step: int) -> bytes:
    """The lines of events up to and with `step`; what cannot be read, as a torn last line, is dropped."""
    kept = []
    for _, line in _lines(path):
        if not line.endswith(b"\n"):
            continue
        try:
            decode_event(line)
        except ValueError:
            continue
        found = json.loads(line).get("step")
        if isinstance(found, int) and found <= step:
            kept.append(line)
    return b"".join(kept)


def last_step(path: Path) -> StepEvent | None:
    """The newest step of a run, read from the end of the file; None where there is none."""
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(max(0, size - TAIL_BYTES))
            lines = stream.read(TAIL_BYTES).splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            event = decode_event(line)
        except ValueError:
            continue
        if isinstance(event, StepEvent):
            return event
    return None


def losses_until(path: Path, step: int, count: int) -> tuple[float, ...]:
    """The losses of `count` steps in a row that end with `step`, or of as many of them as the file has."""
    found = {event.step: event.loss for event in read_events(path) if isinstance(event, StepEvent)}
    losses: list[float] = []
    while step in found and len(losses) < count:
        losses.append(found[step])
        step -= 1
    return tuple(reversed(losses))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    if not path.is_file():
        return
    with path.open("rb") as stream:
        number = 0
        while line := stream.readline(MAX_LINE_BYTES):
            number += 1
            yield number, line


def _columns(kind: str) -> list[tuple[str, str]]:
    named = [(attribute.name, str(attribute.type)) for attribute in fields(_class(kind))]
    return [(name, kind_of) for name, kind_of in named if name != "means"]


def _means(content: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The further means of a step or an evaluation of a preference task; other events have none."""
    means = content.get("means")
    if means is None:
        return {}
    if not isinstance(means, dict):
        raise ValueError("`means` must be an object")
    return {"means": {str(name): _value(value, "float") for name, value in means.items()}}


def _class(kind: str) -> Any:
    return KINDS[kind]


def _value(value: Any, kind: str) -> Any:
    if kind == "str":
        if not isinstance(value, str):
            raise ValueError("text is missing")
        return value
    if kind == "float" and value is None:
        return float("nan")
    if (
        not isinstance(value, (int, float))
        or isinstance(value, bool)
        or (kind == "int" and isinstance(value, float))
    ):
        raise ValueError(f"not a number: {value!r}")
    try:
        return float(value) if kind == "float" else value
    except OverflowError as error:
        raise ValueError("a number beyond every float") from error
