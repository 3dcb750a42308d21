"""One process of two is killed, hangs, or the launcher is told to stop: all end, and the restart is the whole run."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# (how it is started again, seed, kills); the first is the sample of `make test-all`, since a launcher takes a minute.
CHAINS = [
    pytest.param("torchrun --max-restarts", 0, 1, marks=pytest.mark.slow),
    *(pytest.param("torchrun --max-restarts", seed, 5, marks=pytest.mark.torture) for seed in (1, 2)),
    *(pytest.param("the same command again", seed, 5, marks=pytest.mark.torture) for seed in (3, 4)),
]
STEPS_PER_KILL = 16


def steps(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b'"event":"step"') if file.exists() else 0


def finished(launcher: Any) -> str:
    """What a launch that has to end well wrote to stderr."""
    _, errors = launcher.communicate(timeout=600)
    assert launcher.returncode == 0, errors
    return str(errors)


def workers(launcher: Any) -> dict[int, int]:
    """The processes that torchrun has started, by rank."""
    found = {}
    for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        try:
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        ranks = [entry for entry in environment if entry.startswith(b"RANK=")]
        if ranks:
            found[int(ranks[0].partition(b"=")[2])] = int(child)
    return found


def wait_for(count: int, folder: Path, launcher: Any) -> None:
    deadline = time.monotonic() + 300
    while steps(folder) < count and launcher.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)


@pytest.mark.parametrize(("way", "seed", "kills"), CHAINS)
def test_one_process_of_two_killed_again_and_again_changes_no_byte(
    config: Callable[..., Path],
    launched: Callable[..., Any],
    result: Callable[[Path], Any],
    tally: Callable[..., None],
    tmp_path: Path,
    way: str,
    seed: int,
    kills: int,
) -> None:
    file, out = _config(config, STEPS_PER_KILL * (kills + 1)), tmp_path / "out"
    finished(launched(2, "train", file, "--output", tmp_path / "whole"))
    chance = random.Random(seed)
    restarts = ("--max-restarts", str(kills)) if way.startswith("torchrun") else ()
    launcher, gone = launched(2, "train", file, "--resume", options=restarts), set()
    for _ in range(kills):
        wait_for(steps(out) + chance.randint(1, STEPS_PER_KILL - 6), out, launcher)
        time.sleep(chance.uniform(0, 0.03))
        assert launcher.poll() is None, launcher.communicate()[1]
        victim = workers(launcher)[chance.randint(0, 1)]
        assert victim not in gone
        os.kill(victim, signal.SIGKILL)
        gone.add(victim)
        if restarts:
            _wait_until_restarted(launcher, gone)
            continue
        _, errors = launcher.communicate(timeout=300)
        assert launcher.returncode == 1, errors
        launcher = launched(2, "train", file, "--resume")
    assert "going on after step" in finished(launcher)
    assert result(out) == result(tmp_path / "whole")
    tally(f"SIGKILL of one process of two, {way}: all ended, resumed byte-equal", kills)


@pytest.mark.torture
def test_a_process_that_hangs_is_given_up_and_the_restart_is_the_whole_run(
    config: Callable[..., Path],
    launched: Callable[..., Any],
    result: Callable[[Path], Any],
    tally: Callable[..., None],
    tmp_path: Path,
) -> None:
    file, out = _config(config, 40, process_timeout=5), tmp_path / "out"
    finished(launched(2, "train", file, "--output", tmp_path / "whole"))
    launcher = launched(2, "train", file, "--resume")
    wait_for(8, out, launcher)
    os.kill(workers(launcher)[1], signal.SIGSTOP)
    # torchrun gives a process 30 seconds to end before it kills it.
    _, errors = launcher.communicate(timeout=300)
    assert (
        "error[process-silent] training.process_timeout: another process did not answer within 5 s" in errors
    )
    assert json.loads((out / "run.json").read_text())["status"] == "failed"
    finished(launched(2, "train", file, "--resume"))
    assert result(out) == result(tmp_path / "whole")
    tally("one process of two hangs: named after the timeout, resumed byte-equal")


@pytest.mark.torture
def test_a_launcher_that_is_told_to_stop_leaves_a_checkpoint_of_a_sharded_run(
    config: Callable[..., Path],
    launched: Callable[..., Any],
    result: Callable[[Path], Any],
    tally: Callable[..., None],
    tmp_path: Path,
) -> None:
    file, out = _config(config, 60, save_steps=1000), tmp_path / "out"
    finished(launched(2, "train", file, "--output", tmp_path / "whole"))
    launcher = launched(2, "train", file)
    wait_for(8, out, launcher)
    launcher.send_signal(signal.SIGTERM)
    launcher.communicate(timeout=300)
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "interrupted"
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{record['steps']:08d}"]
    finished(launched(2, "train", file, "--resume"))
    assert result(out) == result(tmp_path / "whole")
    tally("SIGTERM to the launcher of a sharded run: a checkpoint, resumed byte-equal")


def _config(config: Callable[..., Path], steps: int, **training: Any) -> Path:
    lora = {"r": 4, "dropout": 0.1, "init_strategy": "pissa"}
    return config(
        "torch", **{"max_steps": steps, "save_total_limit": 2, "sharding": "fsdp", "lora": lora, **training}
    )


def _wait_until_restarted(launcher: Any, gone: set[int]) -> None:
    deadline = time.monotonic() + 300
    while launcher.poll() is None and time.monotonic() < deadline:
        now = workers(launcher)
        if len(now) == 2 and not gone & set(now.values()):
            return
        time.sleep(0.01)
