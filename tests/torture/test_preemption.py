"""Signals: the step is finished, a checkpoint written, exit 75; the resumed run is the whole one."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import free_ports

STEPS = 200
CASES = [
    ("mlx", "alone", "SIGUSR1"),
    *(
        pytest.param(backend, "alone", name, marks=pytest.mark.torture)
        for backend in ("torch", "mlx")
        for name in ("SIGTERM", "SIGINT", "SIGUSR1")
        if (backend, name) != ("mlx", "SIGUSR1")
    ),
    *(
        pytest.param("torch", "two", name, marks=pytest.mark.torture)
        for name in ("SIGTERM", "SIGINT", "SIGUSR1")
    ),
    pytest.param("torch", "torchrun", "SIGTERM", marks=pytest.mark.torture),
]


def trained(folder: Path) -> list[int]:
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [event["step"] for event in map(json.loads, lines) if event["event"] == "step"]


class Started:
    """One run in one process, in two that find each other by their environment, or behind a launcher."""

    def __init__(self, start: Callable[..., Any], way: str, words: tuple[object, ...]) -> None:
        port = str(free_ports(1)[0])
        if way == "torchrun":
            launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port)
            self.all = [start(*words, launcher=launcher)]
            return
        two = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
        environments: list[dict[str, str]] = [{}]
        if way == "two":
            environments = [{**two, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
        self.all = [start(*words, environment=environment) for environment in environments]

    def ended(self) -> tuple[set[int], str]:
        """The exit codes and what was written to stderr, once all have ended."""
        errors = "".join(process.communicate(timeout=600)[1] for process in self.all)
        return {process.returncode for process in self.all}, errors


@pytest.mark.parametrize(("backend", "way", "name"), CASES)
def test_a_signal_to_one_process_stops_all_after_the_step_and_nothing_is_lost(
    config: Callable[..., Path],
    in_a_process: Callable[..., Any],
    result: Callable[[Path], Any],
    tally: Callable[..., None],
    tmp_path: Path,
    backend: str,
    way: str,
    name: str,
) -> None:
    file = config(backend, max_steps=STEPS, save_steps=1000)
    codes, errors = Started(in_a_process, way, ("train", file, "--output", tmp_path / "whole")).ended()
    assert codes == {0}, errors
    run, out = Started(in_a_process, way, ("train", file)), tmp_path / "out"
    deadline = time.monotonic() + 300
    while len(trained(out)) < 9 and time.monotonic() < deadline:
        time.sleep(0.005)
    seen = len(trained(out))
    run.all[-1].send_signal(getattr(signal, name))
    codes, errors = run.ended()
    # The launcher has an exit code of its own; `run.json` tells.
    assert codes == {1 if way == "torchrun" else 75}, errors
    assert "go on with the same command and `--resume`" in errors
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "interrupted"
    # Steps of a few milliseconds go by between looking and the signal's arrival.
    assert seen <= record["steps"] <= seen + 40
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{record['steps']:08d}"]
    codes, errors = Started(in_a_process, way, ("train", file, "--resume")).ended()
    assert codes == {0}, errors
    assert result(out) == result(tmp_path / "whole")
    tally(f"preemption, {backend}, {way}: stopped with a checkpoint, resumed byte-equal")
