from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from soup_xb.core.run.checkpoint import CheckpointFacts, write_checkpoint

PROGRAM = Path(__file__).with_name("kill_at_call.py")


@pytest.mark.parametrize("scenario", ["add", "replace", "rotate"])
def test_a_kill_at_any_file_system_call_leaves_the_old_or_the_new_checkpoint_whole(
    scenario: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), scenario, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 20, "the save made fewer calls than a whole one can"


def test_every_file_is_synced_before_the_rename_and_the_parent_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str]] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(handle: int) -> None:
        calls.append(("fsync", Path(f"/proc/self/fd/{handle}").resolve().name))
        real_fsync(handle)

    def rename(source: str, target: str, **options: int) -> None:
        calls.append(("rename", Path(target).name))
        real_rename(source, target, **options)

    def write(folder: Path) -> None:
        (folder / "state.json").write_text("{}")
        (folder / "inner").mkdir()
        (folder / "inner" / "weights.bin").write_bytes(b"1234")

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to name an open file")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    root = tmp_path / "checkpoints"
    write_checkpoint(root, 7, write, CheckpointFacts("torch", 1, "c", "d", {}))

    moved = calls.index(("rename", "step-00000007"))
    before = {name for call, name in calls[:moved] if call == "fsync"}
    assert {"state.json", "weights.bin", "manifest.json", "inner", ".staging-step-00000007"} <= before
    assert ("fsync", "checkpoints") in calls[moved:]
    first_manifest = calls.index(("fsync", "manifest.json"))
    assert calls.index(("fsync", "weights.bin")) < first_manifest
