"""`soupx parity` and `soupx doctor`, with both engines for real."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Soupx = Callable[..., Any]


@pytest.fixture
def config(tmp_path: Path, tiny_llama: Path, chat_file: Path) -> Path:
    content = {
        "base": str(tiny_llama),
        "data": {"train": str(chat_file), "max_length": 128},
        "training": {
            "max_steps": 30,
            "lr": 5e-3,
            "gradient_accumulation_steps": 2,
            "warmup_ratio": 0.1,
            "lora": {"r": 4},
        },
    }
    (tmp_path / "soup.yaml").write_text(json.dumps(content))
    return tmp_path / "soup.yaml"


def test_both_engines_give_the_same_numbers(soupx: Soupx, config: Path, tmp_path: Path) -> None:
    answer = soupx("parity", config, "--steps", 6, "--json", "--report", tmp_path / "parity.html")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert found["same"] is True
    assert len(found["losses"]["torch"]) == len(found["losses"]["mlx"]) == 6
    assert 0 < found["loss_difference"] < 2e-5
    assert found["losses"]["torch"][0] > found["losses"]["torch"][-1]
    page = (tmp_path / "parity.html").read_text()
    assert page.count("<svg") == 1
    assert "the engines agree" in page


@pytest.mark.parametrize("task", ["dpo", "grpo", "reward", "embedding"])
def test_every_mean_of_a_task_is_compared(soupx: Soupx, config: Path, tmp_path: Path, task: str) -> None:
    rows = {
        "grpo": {"prompt": "3+4?", "answer": 7},
        "embedding": {"anchor": "a tide", "positive": "a sea", "negative": "a hill"},
    }.get(task, {"prompt": "3+4?", "chosen": "7, sir", "rejected": "Whatever"})
    rows = [{**rows, next(iter(rows)): f"{index}+{index % 3}?"} for index in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = json.loads(config.read_text()) | {"task": task}
    content["data"]["train"] = str(tmp_path / "rows.jsonl")
    if task == "grpo":
        (tmp_path / "rewards.py").write_text("def short(completion, row):\n    return -len(completion) / 8\n")
        content["training"] |= {
            "rewards": [f"{tmp_path / 'rewards.py'}:short"],
            "group_size": 3,
            "max_new_tokens": 5,
        }
    config.write_text(json.dumps(content))
    answer = soupx("parity", config, "--steps", 3, "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    means = {"dpo": "reward_margin", "grpo": "kl", "reward": "reward_accuracy", "embedding": "accuracy"}
    assert means[task] in found["means_differences"]
    assert all(0 <= difference < 2e-5 for difference in found["means_differences"].values())
    assert found["loss_difference"] < 2e-5


def test_what_one_engine_refuses_is_told_before_anything_runs(soupx: Soupx, config: Path) -> None:
    answer = soupx("parity", config, "--set", "training.relora_steps=5", "--set", "training.precision=fp16")
    assert answer.code == 2
    assert "error[mlx-no-relora]" in answer.err
    assert "error[torch-no-fp16]" in answer.err


def test_an_engine_that_stops_is_named_with_its_words(soupx: Soupx, config: Path) -> None:
    answer = soupx("parity", config, "--set", "training.lora.target_modules=nothing_like_it")
    assert answer.code == 2
    assert "error[parity-run-failed] the torch engine stopped" in answer.err


def test_the_doctor_measures_both_engines(soupx: Soupx) -> None:
    answer = soupx("doctor", "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert found["torch"]["gflops_float32"] > 1
    assert found["mlx"]["gflops_float32"] > 1
    assert found["torch"]["distributed"] == ["gloo"]
    assert "ring" in found["mlx"]["distributed"]
    shown = soupx("doctor").out
    assert "OpenBLAS" in shown
    assert "several processes: gloo" in shown
