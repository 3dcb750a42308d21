"""SIGKILL at random moments of runs that save after every step."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# (backend, task, seed, kills in one run); the first is the sample that every test run makes.
CHAINS = [
    ("mlx", "sft", 0, 1),
    pytest.param("torch", "sft", 0, 1, marks=pytest.mark.torture),
    *(pytest.param("torch", "sft", seed, 10, marks=pytest.mark.torture) for seed in range(1, 7)),
    *(pytest.param("mlx", "sft", seed, 10, marks=pytest.mark.torture) for seed in range(1, 5)),
    *(pytest.param("mlx", task, 1, 5, marks=pytest.mark.torture) for task in ("dpo", "kto", "grpo")),
    pytest.param("torch", "grpo", 1, 5, marks=pytest.mark.torture),
]
STEPS_PER_KILL = 24


def lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.mark.parametrize(("backend", "task", "seed", "kills"), CHAINS)
def test_a_run_killed_again_and_again_ends_as_the_one_that_was_left_alone(
    config: Callable[..., Path],
    in_a_process: Callable[..., Any],
    result: Callable[[Path], Any],
    tally: Callable[..., None],
    tmp_path: Path,
    backend: str,
    task: str,
    seed: int,
    kills: int,
) -> None:
    file = config(
        backend,
        task,
        max_steps=STEPS_PER_KILL * (kills + 1),
        save_total_limit=2,
        lora={"r": 4, "dropout": 0.1},
    )
    # In a process of its own too: a BLAS that other tests have loaded into this one rounds differently.
    whole = in_a_process("train", file, "--output", tmp_path / "whole")
    _, errors = whole.communicate(timeout=600)
    assert whole.returncode == 0, errors
    chance = random.Random(f"{backend}-{seed}" if task == "sft" else f"{backend}-{task}-{seed}")
    metrics = tmp_path / "out" / "metrics.jsonl"
    for _ in range(kills):
        process = in_a_process("train", file, "--resume")
        # Until it is under way the file holds what the killed one left, or less.
        until = lines(metrics) + chance.randint(2, STEPS_PER_KILL - 6)
        deadline = time.monotonic() + 300
        while lines(metrics) < until and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.03))
        assert process.poll() is None, process.communicate()[1]
        process.kill()
        process.communicate()
    last = in_a_process("train", file, "--resume")
    _, errors = last.communicate(timeout=600)
    assert last.returncode == 0, errors
    assert "going on after step" in errors
    assert result(tmp_path / "out") == result(tmp_path / "whole")
    tally(f"random SIGKILL, {backend}: resumed without a hand, byte-equal", kills)
