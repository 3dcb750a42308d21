"""Several processes, each with the whole base or a part of it: the losses of one process, the same entries pruned."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import in_processes
from safetensors.numpy import load_file

KINDS: dict[str, dict[str, Any]] = {
    "pissa": {"lora": {"r": 4, "init_strategy": "pissa"}},
    "olora": {"lora": {"r": 4, "init_strategy": "olora"}},
    "prune": {"lora": {"r": 4}, "relora_steps": 3, "relora_prune_ratio": 0.6},
    "pissa and prune": {
        "lora": {"r": 4, "init_strategy": "pissa"},
        "relora_steps": 3,
        "relora_prune_ratio": 0.6,
    },
    "merge": {"lora": {"r": 4}, "relora_steps": 3, "relora_mode": "merge"},
    "checkpointing": {"lora": {"r": 4}, "gradient_checkpointing": True},
    "vera": {"lora": {"r": 4, "use_vera": True}},
    "cpu offload": {"lora": {"r": 4}, "sharding": "fsdp", "cpu_offload": True},
    "the head too": {"lora": {"r": 4, "target_modules": ["q_proj", "lm_head"], "init_strategy": "pissa"}},
}
# Two processes with a base that is cut, a restart and a start on base weights, are in every test run.
SAMPLE = ("fsdp", 2, "pissa and prune")
CASES = [
    SAMPLE
    if (sharding, processes, kind) == SAMPLE
    else pytest.param(sharding, processes, kind, marks=pytest.mark.torture)
    for kind in KINDS
    for sharding in ("none", "fsdp")
    for processes in (2, 4)
    if kind != "cpu offload" or sharding == "fsdp"
]
STEPS = 8


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    """Of every step and evaluation, and those on either side of a restart."""
    keys = ("loss", "loss_before", "loss_after")
    told = [event for event in events(folder) if event["event"] in ("step", "eval", "restart")]
    return [event[key] for event in told for key in keys if key in event]


def pruned(folder: Path, step: int) -> dict[str, np.ndarray[Any, Any]]:
    """Which entries of each factor are at zero, or back at their start, after the restart of a step."""
    arrays = load_file(folder / "checkpoints" / f"step-{step:08d}" / "factors.safetensors")
    found = {}
    for name, values in arrays.items():
        module, _, factor = name.rpartition(".")
        if factor in ("lora_A", "lora_B"):
            start = arrays.get(f"{module}.start_{factor[-1]}", np.zeros_like(values))
            found[name] = values == start
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The run of one process, made once for each kind; `start` starts it with an output folder."""
    place, done = tmp_path_factory.mktemp("alone"), set()

    def run(kind: str, start: Callable[[Path], Any]) -> Path:
        folder = place / kind.replace(" ", "-")
        if kind not in done:
            answer = start(folder)
            assert answer.code == 0, answer.err
            done.add(kind)
        return folder

    return run


@pytest.mark.parametrize(("sharding", "processes", "kind"), CASES)
def test_several_processes_have_the_losses_of_one_and_prune_what_it_prunes(
    config: Callable[..., Path],
    soupx: Callable[..., Any],
    alone: Callable[..., Path],
    tally: Callable[..., None],
    tmp_path: Path,
    sharding: str,
    processes: int,
    kind: str,
) -> None:
    settings = {"gradient_accumulation_steps": 2, "eval_steps": 4, "save_steps": 3, **KINDS[kind]}
    file = config("torch", max_steps=STEPS, **{"sharding": sharding, **settings})
    one = alone(kind, lambda folder: soupx("train", file, "--output", folder))
    words = ("-m", "soup_xb", "train", file, "--output", tmp_path / "several")
    several = in_processes(processes, "torch", *words, seconds=900)
    assert several.codes == (0,) * processes, several.err
    assert losses(tmp_path / "several") == pytest.approx(losses(one), abs=1e-5)
    if "relora_prune_ratio" in settings:
        mine, theirs = pruned(one, 3), pruned(tmp_path / "several", 3)
        assert mine.keys() == theirs.keys()
        assert all(np.array_equal(mine[name], theirs[name]) for name in mine)
        assert sum(int(mask.sum()) for mask in mine.values()) == next(
            event["pruned"] for event in events(tmp_path / "several") if event["event"] == "restart"
        )
    tally(f"{sharding}, {processes} processes: the losses of one, the same entries pruned")
