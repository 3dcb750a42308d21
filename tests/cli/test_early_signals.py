"""Signals that come before the first step, or for the second time."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Soupx = Callable[..., Any]


@pytest.fixture
def config(tmp_path: Path, tiny_llama: Path, chat_file: Path) -> Path:
    content = {
        "base": str(tiny_llama),
        "backend": "torch",
        "data": {"train": str(chat_file), "max_length": 128},
        "training": {"max_steps": 4, "save_steps": 2, "batch_size": 4, "lora": {"r": 4}},
        "output": str(tmp_path / "out"),
    }
    file = tmp_path / "soup.yaml"
    file.write_text(json.dumps(content))
    return file


@pytest.fixture
def when(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`when("module.function", SIGINT, SIGINT)` sends these signals whenever the function is called, before it runs."""

    def arrange(name: str, *signals: signal.Signals) -> None:
        module, _, function = name.rpartition(".")
        original = getattr(__import__(module, fromlist=[function]), function)

        def signalled(*words: Any, **named: Any) -> Any:
            for number in signals:
                os.kill(os.getpid(), number)
            return original(*words, **named)

        monkeypatch.setattr(name, signalled)

    return arrange


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


def test_a_sigusr1_while_the_base_is_opened_stops_after_the_first_step(
    soupx: Soupx, config: Path, when: Callable[..., None], tmp_path: Path
) -> None:
    when("soup_xb.runs.open.open_session", signal.SIGUSR1)
    answer = soupx("train", config)
    assert answer.code == 75, answer.err
    assert record(tmp_path / "out")["status"] == "interrupted"
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_second_interrupt_says_that_saved_checkpoints_stay(
    soupx: Soupx, config: Path, when: Callable[..., None], tmp_path: Path
) -> None:
    when("soup_xb.runs.finish.prove", signal.SIGINT, signal.SIGINT)
    answer = soupx("train", config)
    assert answer.code == 130
    assert "nothing was written" not in answer.err
    assert "what was saved before stays, and `--resume` goes on from it" in answer.err
    assert record(tmp_path / "out")["error"].startswith("stopped at once")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "checkpoints",
        "metrics.jsonl",
        "run.json",
    ]
