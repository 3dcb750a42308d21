"""A kill at each file-system call of one save, with the real state of a run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("kill_at_call.py")


@pytest.mark.parametrize("backend", ["torch", "mlx"])
@pytest.mark.parametrize("stride", [29, pytest.param(1, marks=pytest.mark.torture)])
def test_a_run_killed_in_any_call_of_a_save_goes_on_to_the_same_adapter(
    config: Callable[..., Path], tally: Callable[..., None], tmp_path: Path, backend: str, stride: int
) -> None:
    file = config(backend, max_steps=4, save_total_limit=1)
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(file), str(tmp_path / "out"), str(stride)],
        capture_output=True,
        text=True,
        timeout=10_000,
    )
    assert done.returncode == 0, done.stderr
    kills = int(done.stdout)
    assert kills * stride >= 50, "the save made fewer calls than a whole one can"
    tally(f"a kill at a file-system call of one save, {backend}: resumed, byte-equal", kills)
