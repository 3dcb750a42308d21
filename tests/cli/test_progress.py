from __future__ import annotations

import io
import math
import os
import pty
import re
import threading
from collections.abc import Sequence

from soup_xb.cli.progress import ProgressListener
from soup_xb.core.errors import Problem
from soup_xb.core.run.events import EvalEvent, Event, Notice, RestartEvent, SaveEvent, StepEvent


def step(number: int, seconds: float = 0.5) -> StepEvent:
    return StepEvent(number, 1.2345, 1.8e-4, 0.5, 90, 206, seconds)


def plain(events: Sequence[Event], total: int = 12, every: int = 5) -> list[str]:
    stream = io.StringIO()
    with ProgressListener(total, every, stream) as listener:
        for event in events:
            listener(event)
    return stream.getvalue().splitlines()


def test_plain_lines_come_with_the_first_and_last_step_and_every_logging_steps() -> None:
    assert plain([step(number) for number in range(1, 13)]) == [
        "step 1/12  loss 1.2345  lr 1.8e-4  412 tok/s  5.5s left",
        "step 5/12  loss 1.2345  lr 1.8e-4  412 tok/s  3.5s left",
        "step 10/12  loss 1.2345  lr 1.8e-4  412 tok/s  1.0s left",
        "step 12/12  loss 1.2345  lr 1.8e-4  412 tok/s  0.0s left",
    ]


def test_a_resumed_run_starts_its_lines_where_it_goes_on() -> None:
    assert [line.split("  ")[0] for line in plain([step(8), step(9), step(10)])] == [
        "step 8/12",
        "step 10/12",
    ]


def test_other_events_are_lines_of_their_own() -> None:
    assert plain(
        [
            EvalEvent(10, 1.5, 4.4817, 77, 3.2),
            EvalEvent(11, 900.0, math.inf, 77, 3.2),
            RestartEvent(10, 4_884_480, 4_396_032, 1.35, 1.78),
            SaveEvent(10, "out/checkpoints/step-00000010", 3_400_000, 0.5),
        ]
    ) == [
        "eval step 10  loss 1.5000  perplexity 4.48  3.2s",
        "eval step 11  loss 900.0000  perplexity inf  3.2s",
        "restart step 10  4.40 M of 4.88 M entries pruned  loss 1.3500 -> 1.7800",
        "saved step 10  out/checkpoints/step-00000010  3.2 MiB  0.5s",
    ]


def test_notices_have_the_shape_of_errors() -> None:
    warning = Notice(Problem("unused-rows", "3 rows are empty", "data.jsonl:7", "remove them"), warning=True)
    assert plain([warning, Notice(Problem("backend", "auto means torch"))]) == [
        "warning[unused-rows] data.jsonl:7: 3 rows are empty",
        "  help: remove them",
        "note: auto means torch",
    ]


def test_a_step_without_a_measurable_time_has_no_speed() -> None:
    assert plain([step(1, seconds=0.0)]) == ["step 1/12  loss 1.2345  lr 1.8e-4"]


def test_a_terminal_gets_a_bar_and_the_other_events_above_it(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    leader, follower = pty.openpty()
    chunks: list[bytes] = []

    def read() -> None:
        while True:
            try:
                chunk = os.read(leader, 4096)
            except OSError:
                return
            if not chunk:
                return
            chunks.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(follower, "w", encoding="utf-8") as stream, ProgressListener(12, 5, stream) as listener:
        for number in range(1, 13):
            listener(step(number))
            if number == 6:
                listener(Notice(Problem("odd", "a [red]markup[/red] look-alike"), warning=True))
    reader.join(timeout=10)
    os.close(leader)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(chunks).decode())
    assert "warning[odd] a [red]markup[/red] look-alike" in shown
    assert "12/12" in shown
    last = [line for line in re.split(r"[\r\n]+", shown) if "12/12" in line][-1]
    assert "loss 1.2345  412 tok/s  0.0s left" in last
    assert len(last) <= 80
