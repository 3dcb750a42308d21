from __future__ import annotations

import errno
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from soup_xb.core.errors import CheckpointError, ResourceError
from soup_xb.core.run.checkpoint import (
    CheckpointFacts,
    fingerprint,
    newest_whole,
    read_checkpoint,
    remove_after,
    remove_all,
    rotate,
    write_checkpoint,
)

FACTS = CheckpointFacts("mlx", 2, fingerprint({"lr": 1e-4}), fingerprint([1, 2]), {"mlx": "0.32.4"}, "ab12")
FILES = ("adapter.safetensors", "optimizer.safetensors", "state.json")


def fill(folder: Path) -> None:
    save_file({"a": np.arange(6, dtype=np.float32)}, folder / "adapter.safetensors")
    save_file({"m": np.ones(3, np.float32)}, folder / "optimizer.safetensors")
    (folder / "state.json").write_text('{"restarts": 1}')


def save(root: Path, *steps: int) -> None:
    for step in steps:
        write_checkpoint(root, step, fill, FACTS)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_a_checkpoint_comes_back_with_its_step_facts_and_files(tmp_path: Path) -> None:
    saved = write_checkpoint(tmp_path / "checkpoints", 100, fill, FACTS)
    assert saved.path == tmp_path / "checkpoints" / "step-00000100"
    found = read_checkpoint(saved.path)
    assert (found.step, found.facts, found.path) == (100, FACTS, saved.path)
    assert tuple(file.name for file in found.files) == FILES
    assert saved.bytes == sum((saved.path / name).stat().st_size for name in FILES)
    assert load_file(saved.path / "adapter.safetensors")["a"].tolist() == [0, 1, 2, 3, 4, 5]


def test_the_manifest_has_the_documented_shape(tmp_path: Path) -> None:
    saved = write_checkpoint(tmp_path, 5, lambda folder: (folder / "x").write_bytes(b"ab") and None, FACTS)
    content = json.loads((saved.path / "manifest.json").read_text())
    digest = content.pop("sha256")
    assert content == {
        "version": 1,
        "step": 5,
        "backend": "mlx",
        "processes": 2,
        "config": FACTS.config,
        "data": FACTS.data,
        "versions": {"mlx": "0.32.4"},
        "base": "ab12",
        "files": [
            {
                "name": "x",
                "bytes": 2,
                "sha256": "fb8e20fc2e4c3f248c60c39bd652f3c1347298bb977b8b4d5903b85055620603",
            }
        ],
    }
    assert digest == fingerprint(content)


def test_files_get_the_mode_of_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        saved = write_checkpoint(tmp_path, 1, fill, FACTS)
    finally:
        os.umask(previous)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in saved.path.iterdir()}
    assert modes == {0o640}


def empty(path: Path) -> None:
    path.write_bytes(b"")


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def remove(path: Path) -> None:
    path.unlink()


def rename(path: Path) -> None:
    path.rename(path.with_name("other"))


def link(path: Path) -> None:
    twin = path.parent.parent / f"twin-{path.name}"
    path.rename(twin)
    path.symlink_to(twin)


@pytest.mark.parametrize("harm", [empty, halve, flip, remove, rename, link])
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_harmed_state_file_is_never_taken_for_whole(
    tmp_path: Path, name: str, harm: Callable[[Path], None]
) -> None:
    save(tmp_path, 1, 2)
    newest = tmp_path / "step-00000002"
    harm(newest / name)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(newest)
    assert caught.value.exit_code == 5
    assert name in str(caught.value)
    found, skipped = newest_whole(tmp_path)
    assert found is not None and found.step == 1
    (problem,) = skipped
    assert problem.code == "checkpoint-damaged"
    assert problem.where == str(newest)
    assert name in problem.message


def test_a_folder_that_became_a_link_is_not_entered(tmp_path: Path) -> None:
    def nested(folder: Path) -> None:
        (folder / "rank-0").mkdir()
        (folder / "rank-0" / "state.json").write_text("{}")

    write_checkpoint(tmp_path, 1, nested, FACTS)
    inner = tmp_path / "step-00000001" / "rank-0"
    inner.rename(tmp_path / "elsewhere")
    inner.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="symbolic link"):
        read_checkpoint(tmp_path / "step-00000001")


def test_each_byte_of_the_manifest_counts(tmp_path: Path) -> None:
    save(tmp_path, 1)
    manifest = tmp_path / "step-00000001" / "manifest.json"
    whole = manifest.read_bytes()
    original = read_checkpoint(manifest.parent)
    for place in range(len(whole)):
        manifest.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            found = read_checkpoint(manifest.parent)
        except CheckpointError:
            continue
        # Between the values a changed blank is still a blank; then nothing it says has changed.
        assert found == original
        assert whole[place : place + 1].isspace()


@pytest.mark.parametrize(
    "name",
    ["../outside", "/etc/hostname", "a/../../outside", "a\\b", "nul\x00", "", ".", "a//b", "line\nbreak"],
)
def test_a_manifest_may_not_name_a_file_outside_its_folder(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1)
    (tmp_path / "outside").write_bytes(b"ab")
    rewrite(tmp_path / "step-00000001", lambda content: content["files"][0].update(name=name))
    with pytest.raises(CheckpointError, match="leaves the folder"):
        read_checkpoint(tmp_path / "step-00000001")


def rewrite(folder: Path, change: Callable[[dict], object]) -> None:
    """Change a manifest as an attacker would, its own sha256 included."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    change(content)
    path.write_text(json.dumps({**content, "sha256": fingerprint(content)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(step=True), "step"),
        (lambda content: content.update(step=-1), "step"),
        (lambda content: content.update(processes="2"), "processes"),
        (lambda content: content.update(version=2), "format version 2"),
        (lambda content: content.update(files={}), "files"),
        (lambda content: content.update(files=content["files"][:1] * 5000), "at most"),
        (lambda content: content.update(files=content["files"][:1] * 2), "twice"),
        (lambda content: content.update(versions=["torch"]), "versions"),
        (lambda content: content["files"][0].update(sha256="no"), "sha256"),
        (lambda content: content["files"][0].update(bytes=1.5), "bytes"),
        (lambda content: content.pop("config"), "config"),
        (lambda content: content.update(step=2), "not that of its step"),
    ],
)
def test_a_manifest_with_other_types_or_too_much_is_refused(
    tmp_path: Path, change: Callable[[dict], object], message: str
) -> None:
    save(tmp_path, 1)
    rewrite(tmp_path / "step-00000001", change)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "step-00000001")


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "nul", '{"a": NaN}', "9" * 5000])
def test_a_manifest_that_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-00000001" / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match="manifest"):
        read_checkpoint(tmp_path / "step-00000001")


def test_a_checkpoint_under_another_steps_name_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000009")
    with pytest.raises(CheckpointError, match="not that of its step 1"):
        read_checkpoint(tmp_path / "step-00000009")


def test_a_missing_folder_is_an_error_and_an_empty_place_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "step-00000001")
    assert newest_whole(tmp_path / "checkpoints") == (None, ())


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 4)
    rotate(tmp_path, None)
    assert len(names(tmp_path)) == 4
    rotate(tmp_path, 2)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]


def test_rotation_never_deletes_the_newest_whole_one(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3)
    flip(tmp_path / "step-00000003" / "state.json")
    rotate(tmp_path, 1)
    assert names(tmp_path) == ["step-00000002"]
    flip(tmp_path / "step-00000002" / "state.json")
    save(tmp_path, 4)
    flip(tmp_path / "step-00000004" / "state.json")
    rotate(tmp_path, 1)
    assert names(tmp_path) == ["step-00000002", "step-00000004"]


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    remove(tmp_path / "step-00000002" / "optimizer.safetensors")
    save(tmp_path, 2)
    found, skipped = newest_whole(tmp_path)
    assert found is not None and found.step == 2
    assert skipped == ()
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_later_steps_go_when_a_run_resumes_before_them(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3)
    remove_after(tmp_path, 1)
    assert names(tmp_path) == ["step-00000001"]


def test_removing_all_leaves_foreign_files_and_follows_no_link(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    save(root, 1)
    save(elsewhere, 2)
    (root / "notes.txt").write_text("mine")
    (root / "step-00000002").symlink_to(elsewhere / "step-00000002")
    remove_all(root)
    assert names(root) == ["notes.txt", "step-00000002"]
    assert read_checkpoint(elsewhere / "step-00000002").step == 2


def test_a_failing_writer_leaves_the_last_checkpoint_and_its_own_error(tmp_path: Path) -> None:
    save(tmp_path, 1)

    def fail(folder: Path) -> None:
        (folder / "half").write_bytes(b"x")
        raise RuntimeError("a bug of the backend")

    with pytest.raises(RuntimeError, match="a bug of the backend"):
        write_checkpoint(tmp_path, 2, fail, FACTS)
    found, skipped = newest_whole(tmp_path)
    assert found is not None and found.step == 1
    assert skipped == ()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_names_the_path_and_the_need(tmp_path: Path, code: int) -> None:
    save(tmp_path, 1)

    def fail(folder: Path) -> None:
        fill(folder)
        raise OSError(code, os.strerror(code))

    with pytest.raises(ResourceError) as caught:
        write_checkpoint(tmp_path, 2, fail, FACTS)
    (problem,) = caught.value.problems
    assert (caught.value.exit_code, problem.code) == (7, "disk-full")
    assert problem.where == str(tmp_path / "step-00000002")
    assert "this write needs" in problem.message
    assert names(tmp_path) == ["step-00000001"]


def test_a_need_beyond_the_disk_is_refused_before_the_first_byte(tmp_path: Path) -> None:
    facts = CheckpointFacts("torch", 1, "c", "d", {}, bytes_expected=2**60)
    with pytest.raises(ResourceError, match="the disk is too small"):
        write_checkpoint(tmp_path, 1, lambda folder: pytest.fail("was written"), facts)


LIMITED = """
import resource, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
from soup_xb.core.run.checkpoint import CheckpointFacts, newest_whole, write_checkpoint
from soup_xb.core.errors import ResourceError

root, kind = Path(sys.argv[1]), sys.argv[2]
facts = CheckpointFacts("torch", 1, "c", "d", {})
big = np.zeros(100_000, np.float32)

def tensors(folder):
    save_file({"a": big}, folder / "a.safetensors")

def plain(folder):
    (folder / "a.bin").write_bytes(big.tobytes())

write_checkpoint(root, 1, tensors, facts)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    write_checkpoint(root, 2, {"tensors": tensors, "plain": plain}[kind], facts)
except ResourceError as error:
    print(error)
    print(newest_whole(root)[0].step, sorted(path.name for path in root.iterdir()))
"""


@pytest.mark.parametrize("kind", ["tensors", "plain"])
def test_a_write_that_the_system_cuts_off_leaves_the_last_checkpoint_whole(tmp_path: Path, kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path), kind], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert f"error[disk-full] {tmp_path}/step-00000002" in done.stdout
    assert re.search(r"this write needs 39\d\.\d KiB", done.stdout)
    assert "1 ['step-00000001']" in done.stdout


def test_a_fingerprint_depends_on_the_value_alone() -> None:
    assert fingerprint({"a": 1, "b": [1.5]}) == fingerprint({"b": [1.5], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 1.5})
    assert fingerprint(None) == "74234e98afe7498fb5daf1f36ac2d78acc339464f950703b8c019892f982b90b"
    with pytest.raises(ValueError, match="JSON"):
        fingerprint(float("nan"))
