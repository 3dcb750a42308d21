"""Readers of our output that go away, streams that are closed, and logs whose disk is full."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from soup_xb.cli.progress import ProgressListener
from soup_xb.core.run.events import StepEvent

FULL = Path("/dev/full")


@contextmanager
def nobody_reads() -> Iterator[int]:
    """The writing end of a pipe that has no reader."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


def soupx(place: Path, *words: object, closed: tuple[int, ...] = (), **streams: int) -> int:
    def close() -> None:
        for number in closed:
            os.close(number)

    command = [sys.executable, "-m", "soup_xb", *map(str, words)]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **streams}
    return subprocess.run(command, cwd=place, preexec_fn=close, check=False, **streams).returncode  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize("words", [["templates"], ["--help"]])
def test_a_reader_that_goes_away_is_no_failure(tmp_path: Path, words: list[str]) -> None:
    with nobody_reads() as pipe:
        assert soupx(tmp_path, *words, stdout=pipe) == 0


def test_the_exit_code_tells_where_the_message_cannot_be_read(tmp_path: Path) -> None:
    with nobody_reads() as pipe:
        assert soupx(tmp_path, "check", "none.yaml", stderr=pipe) == 2
    assert soupx(tmp_path, "check", "none.yaml", closed=(0, 1, 2)) == 2


def test_a_run_goes_on_where_nobody_sees_it(tmp_path: Path, tiny_llama: Path, chat_file: Path) -> None:
    content = {
        "base": str(tiny_llama),
        "backend": "torch",
        "data": {"train": str(chat_file), "max_length": 128},
        "training": {"max_steps": 2, "logging_steps": 1, "batch_size": 4, "lora": {"r": 4}},
    }
    (tmp_path / "soup.yaml").write_text(json.dumps(content, indent=1))
    with nobody_reads() as pipe:
        assert soupx(tmp_path, "train", stderr=pipe, closed=(0, 1)) == 0
    assert json.loads((tmp_path / "output" / "run.json").read_text())["status"] == "finished"
    events = [json.loads(line) for line in (tmp_path / "output" / "metrics.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 2]


@pytest.mark.skipif(not FULL.exists(), reason="there is no device that is always full")
def test_a_log_without_room_stops_no_run() -> None:
    with FULL.open("w", encoding="utf-8", buffering=1) as stream, ProgressListener(2, 1, stream) as listener:
        for step in (1, 2):
            listener(StepEvent(step, 1.0, 1e-4, 0.5, 90, 206, 0.5))
        # What is left in the buffer is nobody's, and closing would try again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
