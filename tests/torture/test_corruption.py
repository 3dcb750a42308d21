"""Each file of a checkpoint emptied, cut in half, changed in one byte, or taken away."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def empty(file: Path) -> None:
    file.write_bytes(b"")


def halve(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) * 2 // 3] ^= 0x10
    file.write_bytes(bytes(content))


def take_away(file: Path) -> None:
    file.unlink()


DAMAGES = [empty, halve, flip, take_away]


@pytest.mark.parametrize("backend", ["torch", "mlx"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_never_trained_on(
    config: Callable[..., Path],
    soupx: Callable[..., Any],
    result: Callable[[Path], Any],
    tally: Callable[..., None],
    tmp_path: Path,
    backend: str,
    damage: Callable[[Path], None],
) -> None:
    file = config(backend, max_steps=4)
    whole = soupx("train", file, "--output", tmp_path / "whole")
    assert whole.code == 0, whole.err
    names = sorted(path.name for path in (tmp_path / "whole" / "checkpoints" / "step-00000003").iterdir())
    assert len(names) >= 4
    for name in names:
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", out)
        shutil.rmtree(out / "checkpoints" / "step-00000004")
        shutil.rmtree(out / "adapter")
        damaged = out / "checkpoints" / "step-00000003"
        damage(damaged / name)
        named = soupx("train", file, "--resume-from", damaged)
        assert named.code == 5, (name, named.err)
        assert "error[checkpoint-damaged]" in named.err
        assert str(damaged) in named.err
        newest = soupx("train", file, "--resume")
        assert newest.code == 0, newest.err
        assert str(damaged) in newest.err
        assert "going on after step 2" in newest.err
        assert result(out) == result(tmp_path / "whole")
        tally(f"damaged checkpoint files, {backend}: named, then resumed from the one before", 2)
