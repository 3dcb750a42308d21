"""A disk that has no room in the middle of a save."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# No file may grow beyond this many bytes: the factors fit into some of them, the optimizer's state into fewer.
CASES = [
    ("mlx", 1_000),
    *(
        pytest.param(backend, limit, marks=pytest.mark.torture)
        for backend in ("torch", "mlx")
        for limit in (1_000, 20_000, 60_000)
        if (backend, limit) != ("mlx", 1_000)
    ),
]


@pytest.mark.parametrize(("backend", "limit"), CASES)
def test_a_save_without_room_leaves_the_last_checkpoint_and_says_what_it_needs(
    config: Callable[..., Path],
    in_a_process: Callable[..., Any],
    result: Callable[[Path], Any],
    tally: Callable[..., None],
    tmp_path: Path,
    backend: str,
    limit: int,
) -> None:
    short, file = tmp_path / "short.yaml", config(backend, max_steps=6, scheduler="constant")
    short.write_text(file.read_text().replace('"max_steps": 6', '"max_steps": 3'))

    def train(*words: object, limit: int | None = None) -> tuple[int, str]:
        limits = None if limit is None else (limit, limit)
        process = in_a_process("train", *words, file_size=limits)
        _, errors = process.communicate(timeout=300)
        return process.returncode, errors

    assert train(file, "--output", tmp_path / "whole")[0] == 0
    assert train(short)[0] == 0
    code, errors = train(file, "--resume", limit=limit)
    assert code == 7, errors
    assert "error[disk-full]" in errors
    assert str(tmp_path / "out") in errors
    assert "Traceback" not in errors
    assert (tmp_path / "out" / "checkpoints" / "step-00000003").is_dir()
    code, errors = train(file, "--resume")
    assert code == 0, errors
    assert result(tmp_path / "out")[0] == result(tmp_path / "whole")[0]
    tally(f"full disk in a save, {backend}: exit 7, last checkpoint whole, resumed byte-equal")
