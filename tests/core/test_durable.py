from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from soup_xb.core import disk
from soup_xb.core.disk import disk_errors, free_bytes, json_text, write_bytes, write_text
from soup_xb.core.errors import ResourceError


def test_a_file_is_replaced_in_one_piece_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    for text in ("first", "second, longer", ""):
        write_text(path, text)
        assert path.read_text() == text
    assert [item.name for item in tmp_path.iterdir()] == ["run.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    write_text(path, "old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError) as caught, disk_errors(path, 3_400_000):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert "run.json: no room: No space left on device; this write needs 3.2 MiB" in str(caught.value)


def test_a_file_gets_the_mode_of_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0o077)
    try:
        write_bytes(tmp_path / "private", b"")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o600


def test_a_link_in_place_of_the_staged_file_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("keep")
    (tmp_path / ".run.json.tmp").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"):
        write_text(tmp_path / "run.json", "x")
    assert (tmp_path / "precious").read_text() == "keep"


def test_json_replaces_what_is_not_finite_at_any_depth() -> None:
    value = {"a": [float("nan"), {"b": float("-inf")}], "c": (1.5, True, None, "ü")}
    assert json_text(value) == '{"a":[null,{"b":null}],"c":[1.5,true,null,"ü"]}'


def test_free_bytes_of_a_folder_that_is_not_there_yet_are_those_of_its_parent(tmp_path: Path) -> None:
    free = free_bytes(tmp_path / "not" / "yet")
    assert free is not None
    assert free > 0


def test_a_staged_folder_replaces_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    for text in ("one", "two"):
        staged = disk.stage(target)
        (staged / "file").write_text(text)
        disk.publish(staged, target)
        assert (target / "file").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_cleaning_puts_a_set_aside_folder_back_and_touches_no_other_name(tmp_path: Path) -> None:
    for name in (
        ".replaced-adapter",
        ".staging-adapter",
        ".trash-.replaced-adapter",
        ".trash-1000",
        "adapters",
    ):
        (tmp_path / name).mkdir()
    disk.clean_staging(tmp_path, "adapter")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".trash-1000", "adapter", "adapters"]


def test_discarding_a_link_leaves_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    disk.discard(tmp_path / "link")
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_a_link_inside_a_staged_folder_is_not_published(tmp_path: Path) -> None:
    staged = disk.stage(tmp_path / "adapter")
    (staged / "link").symlink_to("/")
    with pytest.raises(ValueError, match="not a regular file"):
        disk.publish(staged, tmp_path / "adapter")
