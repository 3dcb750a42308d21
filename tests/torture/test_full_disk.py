"""A disk that has no room in the middle of a save."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# No file may grow beyond this many bytes: the factors fit into some of them, the optimizer's state into fewer.
LIMITS = [1_000, pytest.param(20_000, marks=pytest.mark.torture), 60_000]


@pytest.mark.parametrize("backend", ["torch", "mlx"])
@pytest.mark.parametrize("limit", LIMITS)
def test_a_save_without_room_leaves_the_last_checkpoint_and_says_what_it_needs(
    config: Callable[..., Path],
    soupx: Callable[..., Any],
    result: Callable[[Path], Any],
    tally: Callable[..., None],
    tmp_path: Path,
    backend: str,
    limit: int,
) -> None:
    short, file = tmp_path / "short.yaml", config(backend, max_steps=6, scheduler="constant")
    short.write_text(file.read_text().replace('"max_steps": 6', '"max_steps": 3'))
    whole = soupx("train", file, "--output", tmp_path / "whole")
    assert whole.code == 0, whole.err
    first = soupx("train", short)
    assert first.code == 0, first.err
    starved = subprocess.run(
        [sys.executable, "-m", "soup_xb", "train", str(file), "--resume"],
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert starved.returncode == 7, starved.stderr
    assert "error[disk-full]" in starved.stderr
    assert str(tmp_path / "out") in starved.stderr
    assert "Traceback" not in starved.stderr
    names = [
        path.name for path in (tmp_path / "out" / "checkpoints").iterdir() if path.name.startswith("step")
    ]
    assert "step-00000003" in names
    gone_on = soupx("train", file, "--resume")
    assert gone_on.code == 0, gone_on.err
    assert result(tmp_path / "out")[0] == result(tmp_path / "whole")[0]
    tally(f"full disk in a save, {backend}: exit 7, last checkpoint whole, resumed byte-equal")
