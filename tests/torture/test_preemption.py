"""Signals: the step is finished, a checkpoint written, exit 75; the resumed run is the whole one."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STEPS = 200
CASES = [
    ("torch", 1, "SIGTERM"),
    ("mlx", 1, "SIGUSR1"),
    *(
        pytest.param(backend, 1, name, marks=pytest.mark.torture)
        for backend in ("torch", "mlx")
        for name in ("SIGTERM", "SIGINT", "SIGUSR1")
        if (backend, name) not in (("torch", "SIGTERM"), ("mlx", "SIGUSR1"))
    ),
    *(pytest.param("torch", 2, name, marks=pytest.mark.torture) for name in ("SIGTERM", "SIGINT", "SIGUSR1")),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def trained(folder: Path) -> list[int]:
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [event["step"] for event in map(json.loads, lines) if event["event"] == "step"]


def children(parent: int) -> list[int]:
    """The training processes below a launcher."""
    found = []
    for task in Path(f"/proc/{parent}/task").iterdir():
        found += [int(word) for word in (task / "children").read_text().split()]
    return found


@pytest.mark.parametrize(("backend", "processes", "name"), CASES)
def test_a_signal_stops_after_the_step_and_nothing_is_lost(
    config: Callable[..., Path],
    in_a_process: Callable[..., Any],
    result: Callable[[Path], Any],
    tally: Callable[..., None],
    tmp_path: Path,
    backend: str,
    processes: int,
    name: str,
) -> None:
    file = config(backend, max_steps=STEPS, save_steps=1000)

    def start(*options: object) -> Any:
        launcher = ("-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port")
        return in_a_process(
            "train", file, *options, launcher=(*launcher, str(free_port())) if processes > 1 else ()
        )

    whole = start("--output", tmp_path / "whole")
    assert whole.wait(timeout=600) == 0, whole.communicate()[1]
    process, out = start(), tmp_path / "out"
    deadline = time.monotonic() + 300
    while len(trained(out)) < 9 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()[1]
    # One process of several is told; the others have to hear of it.
    told = children(process.pid)[-1] if processes > 1 else process.pid
    seen = len(trained(out))
    import os

    os.kill(told, getattr(signal, name))
    _, errors = process.communicate(timeout=300)
    # A launcher has an exit code of its own; `run.json` tells.
    assert process.returncode == 75 or processes > 1, errors
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "interrupted"
    # Steps of a few milliseconds go by between looking and the signal's arrival.
    assert seen <= record["steps"] <= seen + 40
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [f"step-{record['steps']:08d}"]
    resumed = start("--resume")
    assert resumed.wait(timeout=600) == 0, resumed.communicate()[1]
    assert result(out) == result(tmp_path / "whole")
    tally(f"preemption, {backend}, {processes} process(es): stopped with a checkpoint, resumed byte-equal")
