"""`task: pretrain` and `data.packing`, from file to adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from soup_xb.core.config.support_rows import BACKENDS

Soupx = Callable[..., Any]


@pytest.fixture
def config(tmp_path: Path, tiny_llama: Path) -> Callable[..., Path]:
    """Writes a config on plain text; keyword arguments are keys of `data`."""

    def write(backend: str, task: str = "pretrain", **data: Any) -> Path:
        texts = tmp_path / "text.jsonl"
        rows = [{"text": f"Chapter {index}. " + "It rained again. " * (index % 9 + 1)} for index in range(40)]
        texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        content = {
            "base": str(tiny_llama),
            "task": task,
            "backend": backend,
            "data": {"train": str(texts), "max_length": 96, **data},
            "training": {"max_steps": 5, "lr": 0.005, "batch_size": 2, "lora": {"r": 4}},
            "output": str(tmp_path / f"out-{backend}-{task}"),
        }
        file = tmp_path / "soup.yaml"
        file.write_text(json.dumps(content))
        return file

    return write


def steps(folder: Path) -> list[dict[str, Any]]:
    events = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [event for event in events if event["event"] == "step"]


@pytest.mark.parametrize("task", ["pretrain", "sft"])
def test_packed_runs_have_the_same_losses_on_both_backends(
    soupx: Soupx, config: Callable[..., Path], tmp_path: Path, task: str
) -> None:
    runs = []
    for backend in BACKENDS:
        done = soupx("train", config(backend, task, packing=True, val_split=0.2))
        assert done.code == 0, done.err
        assert "sequences of 96 tokens" in done.err
        runs.append(steps(tmp_path / f"out-{backend}-{task}"))
    for one, other in zip(*runs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert one["tokens"] == other["tokens"]
    # Two sequences of 96 tokens a step; single rows would be far shorter.
    assert min(step["tokens"] for step in runs[0]) > 150


def test_pretraining_loses_nothing_of_a_long_document(
    soupx: Soupx, config: Callable[..., Path], tmp_path: Path
) -> None:
    file = config("torch", max_length=32)
    plan = soupx("plan", file, "--json")
    assert plan.code == 0, plan.err
    sequences = json.loads(plan.out)["rows"]["train"]
    characters = sum(
        len(json.loads(line)["text"]) for line in (tmp_path / "text.jsonl").read_text().splitlines()
    )
    assert sequences >= characters // 32
    assert "cut at" not in plan.err


def test_pretraining_reads_plain_text_alone(
    soupx: Soupx, config: Callable[..., Path], chat_file: Path
) -> None:
    wrong = soupx("check", config("torch", format="alpaca"))
    assert wrong.code == 2
    assert "use `format: auto` with rows of text" in wrong.err
    chats = soupx("train", config("torch"), "--set", f"data.train={chat_file}")
    assert chats.code == 3
    assert "text" in chats.err
