"""Thousands of steps and hundreds of saves: memory, files, descriptors and processes stay as they were."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("grow.py")


@pytest.mark.torture
@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_a_long_run_does_not_grow(
    config: Callable[..., Path], tally: Callable[..., None], tmp_path: Path, backend: str
) -> None:
    grown = _grown(config(backend, max_steps=4000, save_steps=20, save_total_limit=2, eval_steps=500), 1000)
    assert grown["saves"] == 200
    assert grown["mebibytes_per_1000_steps"] < 0.5, grown
    left = {path.name for path in (tmp_path / "out" / "checkpoints").iterdir()}
    assert left == {"step-00003980", "step-00004000"}
    tally(
        f"4,000 steps and 200 saves, {backend}: {grown['mebibytes_per_1000_steps']:.3f} MiB per 1,000 steps"
    )


@pytest.mark.parametrize("backend", [pytest.param("torch", marks=pytest.mark.slow), "mlx"])
def test_a_run_leaves_no_process_and_no_open_file(config: Callable[..., Path], backend: str) -> None:
    assert _grown(config(backend, max_steps=40, save_steps=20), 20)["saves"] == 2


def _grown(file: Path, warm: int) -> dict[str, float]:
    """What a run of a file in a process of its own grew by, with nothing left open."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(file), str(warm)],
        capture_output=True,
        text=True,
        timeout=10_000,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    grown: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(grown)
    assert grown["descriptors"] == 0, grown
    assert grown["children"] == 0, grown
    return grown
