from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from soup_xb.core.errors import ResourceError
from soup_xb.core.run.folder import acquire, live_owner, open_run_folder

OWNER = """
import sys, time
from pathlib import Path
from soup_xb.core.run.folder import open_run_folder
with open_run_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def start_owner(path: Path) -> subprocess.Popen[str]:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(path)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "held\n"
    return owner


def kill(owner: subprocess.Popen[str]) -> None:
    owner.send_signal(signal.SIGKILL)
    owner.communicate()


def test_a_live_owner_keeps_others_out_and_is_named(tmp_path: Path) -> None:
    owner = start_owner(tmp_path)
    try:
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(ResourceError) as caught:
                open_run_folder(tmp_path, **options)
            assert caught.value.problems[0].code == "output-in-use"
            assert f"process {owner.pid} " in str(caught.value)
        assert live_owner(tmp_path) is not None
    finally:
        kill(owner)


def test_a_dead_owners_lock_is_taken_over_with_a_notice(tmp_path: Path) -> None:
    owner = start_owner(tmp_path)
    kill(owner)
    assert live_owner(tmp_path) is None
    with open_run_folder(tmp_path) as folder:
        (notice,) = folder.notices
        assert notice.warning
        assert notice.problem.code == "lock-taken-over"
        assert f"process {owner.pid} " in notice.problem.message
    with open_run_folder(tmp_path) as folder:
        assert folder.notices == ()


@pytest.mark.parametrize("text", ["", "half{", "[]", '{"pid": "x", "host": 3}', '{"pid": true}', "[" * 4096])
def test_a_damaged_lock_file_without_an_owner_is_taken_over(tmp_path: Path, text: str) -> None:
    (tmp_path / ".lock").write_text(text)
    assert live_owner(tmp_path) is None
    with open_run_folder(tmp_path):
        owner = live_owner(tmp_path)
        assert owner is not None
        assert owner.pid == os.getpid()
    assert not (tmp_path / ".lock").exists()


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("keep")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(ResourceError):
        open_run_folder(tmp_path / "out")
    assert (tmp_path / "precious").read_text() == "keep"


def test_one_process_cannot_open_a_folder_twice(tmp_path: Path) -> None:
    with open_run_folder(tmp_path):
        with pytest.raises(ResourceError, match=f"process {os.getpid()}"):
            acquire(tmp_path)
        assert live_owner(tmp_path) is not None
    acquire(tmp_path).release()


def test_a_lock_on_a_file_that_its_last_owner_just_removed_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, removed = fcntl.flock, []

    def flock(handle: int, kind: int) -> None:
        if not removed:
            (tmp_path / ".lock").unlink()
            removed.append(handle)
        real(handle, kind)

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = acquire(tmp_path)
    assert removed
    assert live_owner(tmp_path) is not None
    lock.release()


def test_a_refused_folder_is_left_unlocked(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ResourceError, match="already holds a run"):
        open_run_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_of_many_that_start_at_once_one_gets_the_folder(tmp_path: Path) -> None:
    owners = [
        subprocess.Popen(
            [sys.executable, "-c", OWNER, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    # The losers end by themselves; then exactly one is left, and it says that it holds the folder.
    held = []
    for owner in owners:
        assert owner.stdout is not None
        held.append(owner.stdout.readline() == "held\n")
    for owner in owners:
        kill(owner)
    assert held.count(True) == 1
