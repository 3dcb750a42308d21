"""Checkpoints that are whole or not there: `step-00000100/` with the backend's files and a manifest."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen
from safetensors import SafetensorError

from soup_xb.core import disk
from soup_xb.core.disk import disk_error, disk_errors, disk_full, free_bytes, write_new
from soup_xb.core.errors import CheckpointError, Problem, ResourceError
from soup_xb.core.run.manifest import (
    MANIFEST,
    CheckpointFacts,
    Manifest,
    StoredFile,
    damaged,
    describe,
    fingerprint,
    manifest_text,
    read_manifest,
    verify,
)

__all__ = [
    "Checkpoint",
    "CheckpointFacts",
    "SavedCheckpoint",
    "checkpoint_name",
    "fingerprint",
    "newest_whole",
    "read_checkpoint",
    "remove_after",
    "remove_all",
    "rotate",
    "write_checkpoint",
]

PREFIX = "step-"
NAME = re.compile(r"step-(\d{8,12})")
# safetensors and mlx do not raise OSError for a write that the system refuses.
WRITER_FULL = re.compile(r"os error (28|27|122|69)\b|No space left|File too large|\[write\] Unable to write")


@frozen
class SavedCheckpoint:
    """A checkpoint that is whole on the disk; `bytes` without its manifest."""

    path: Path
    bytes: int


@frozen
class Checkpoint:
    """A checkpoint whose every file was read back and matches; `files` are relative names."""

    path: Path
    step: int
    facts: CheckpointFacts
    files: tuple[StoredFile, ...]


def checkpoint_name(step: int) -> str:
    """The folder of a step.

    >>> checkpoint_name(100)
    'step-00000100'
    """
    return f"step-{step:08d}"


def write_checkpoint(
    root: Path, step: int, write: Callable[[Path], None], facts: CheckpointFacts
) -> SavedCheckpoint:
    """Let `write(folder)` fill a staging folder, then make it `root/step-…` in one piece.

    A kill at any moment leaves the checkpoints that were whole before, and this one whole or unseen. An
    older checkpoint of the same step is replaced. Raises ResourceError where the disk is full or refuses,
    naming the path and the bytes needed; earlier checkpoints stay whole.
    """
    target = root / checkpoint_name(step)
    needed = facts.bytes_expected
    free = free_bytes(root)
    if free is not None and free < needed:
        raise disk_full(target, needed, "the disk is too small")
    needed = max(needed, _newest_bytes(root))
    with disk_errors(target, needed):
        disk.clean_staging(root, PREFIX)
        staged = disk.stage(target)
    try:
        manifest = _fill(staged, step, write, facts)
        disk.publish(staged, target)
    except (OSError, SafetensorError, RuntimeError) as error:
        refusal = _refusal(error, target, max(needed, _bytes_below(staged)))
        if refusal is None:
            raise
        # What was staged fills the disk that the user now has to free.
        with disk_errors(target):
            disk.discard(staged)
        raise refusal from error
    return SavedCheckpoint(target, sum(file.bytes for file in manifest.files))


def _fill(staged: Path, step: int, write: Callable[[Path], None], facts: CheckpointFacts) -> Manifest:
    write(staged)
    if (staged / MANIFEST).exists():
        raise ValueError(f"a backend may not write `{MANIFEST}`")
    # The sync comes before the manifest: a manifest on the disk means that its files are there too.
    disk.sync_tree(staged)
    manifest = describe(staged, step, facts)
    write_new(staged / MANIFEST, manifest_text(manifest).encode())
    return manifest


def _refusal(error: Exception, target: Path, needed: int) -> ResourceError | None:
    if isinstance(error, OSError):
        return disk_error(error, target, needed)
    if WRITER_FULL.search(str(error)):
        return disk_full(target, needed, "the disk or a file size limit refused the write")
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """Check a checkpoint folder file by file.

    Raises CheckpointError where it is missing, where a file is missing or differs from what was written, or
    where the manifest names something outside the folder.
    """
    if not path.is_dir():
        raise CheckpointError("no-checkpoint", "no such checkpoint folder", where=str(path))
    manifest = read_manifest(path)
    name = path.resolve().name.removeprefix(disk.REPLACED)
    if NAME.fullmatch(name) and name != checkpoint_name(manifest.step):
        raise damaged(path, f"the folder's name is not that of its step {manifest.step}")
    verify(path, manifest)
    return Checkpoint(path, manifest.step, manifest.facts, manifest.files)


def newest_whole(root: Path) -> tuple[Checkpoint | None, tuple[Problem, ...]]:
    """The newest checkpoint that is whole, and each newer one that is not, with the reason."""
    skipped: list[Problem] = []
    for path in _candidates(root):
        try:
            return read_checkpoint(path), tuple(skipped)
        except CheckpointError as error:
            skipped.extend(error.problems)
    return None, tuple(skipped)


def rotate(root: Path, keep: int | None) -> None:
    """Delete all but the newest whole checkpoint and the `keep - 1` before it; None keeps all.

    A damaged one that is newer goes too; where none is whole, nothing is deleted.
    """
    paths = _candidates(root)
    if keep is None or len(paths) <= max(keep, 1):
        return
    newest, _ = newest_whole(root)
    if newest is None:
        return
    whole_first = paths[paths.index(newest.path) :]
    kept = set(whole_first[: max(keep, 1)])
    _discard_all([path for path in paths if path not in kept])


def remove_after(root: Path, step: int) -> None:
    """Delete the checkpoints of later steps: a run resumed at `step` goes another way from there."""
    _discard_all([path for path in _candidates(root) if _step(path) > step])


def remove_all(root: Path) -> None:
    """Delete every checkpoint and what unfinished ones left, and the folder where nothing else is in it."""
    with disk_errors(root):
        disk.clean_staging(root, PREFIX)
    _discard_all(_candidates(root))
    with disk_errors(root):
        if not any(root.iterdir()):
            root.rmdir()


def _discard_all(paths: list[Path]) -> None:
    for path in paths:
        with disk_errors(path):
            disk.discard(path)


def _candidates(root: Path) -> list[Path]:
    """Checkpoint folders, newest first; one that is just being replaced counts under its set-aside name."""
    if not root.is_dir():
        return []
    names = {path.name: path for path in root.iterdir() if path.is_dir() and not path.is_symlink()}
    standing = [path for name, path in names.items() if NAME.fullmatch(name)]
    aside = [
        path
        for name, path in names.items()
        if name.startswith(disk.REPLACED)
        and NAME.fullmatch(name.removeprefix(disk.REPLACED))
        and name.removeprefix(disk.REPLACED) not in names
    ]
    return sorted(standing + aside, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _newest_bytes(root: Path) -> int:
    for path in _candidates(root)[:1]:
        return _bytes_below(path)
    return 0


def _bytes_below(folder: Path) -> int:
    try:
        return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
    except OSError:
        return 0


Array = np.ndarray[Any, Any]


def read_tensors(file: Path) -> dict[str, Array]:
    """Name -> float32 array of a safetensors file.

    Raises CheckpointError for one that is missing or damaged, and for tensors that no run wrote: of another type,
    or with values that are not finite.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors: dict[str, Array] = load_file(file)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError("checkpoint-damaged", f"cannot be read: {error}", where=str(file)) from error
    for name, array in tensors.items():
        if array.dtype != np.float32 or not np.isfinite(array).all():
            message = f"`{name}` is not a tensor of finite float32 numbers"
            raise CheckpointError("checkpoint-damaged", message, where=str(file))
    return tensors


def check_pairs(arrays: Mapping[str, Array], file: Path) -> None:
    """Raise CheckpointError where a pair beside `lora_A` and `lora_B` (`start_A`, `piece0_B`) is not their module's.

    Both are matrices, or stacks of them, with the module's sides and one rank of their own.
    """
    prefixes = {part[:-1] for part in arrays if part.endswith(("_A", "_B"))} - {"lora_"}
    width, height = arrays["lora_A"].shape[-1], arrays["lora_B"].shape[-2]
    stack = arrays["lora_A"].shape[:-2]
    for prefix in sorted(prefixes):
        a, b = arrays.get(f"{prefix}A"), arrays.get(f"{prefix}B")
        rank = b.shape[-1] if b is not None and b.ndim > 1 else 0
        sides = ((*stack, rank, width), (*stack, height, rank))
        if a is None or b is None or (a.shape, b.shape) != sides:
            message = f"`{prefix}A` and `{prefix}B` do not belong to their module"
            raise CheckpointError("foreign-checkpoint", message, where=str(file))


def grouped(tensors: dict[str, Array], separator: str) -> dict[str, dict[str, Array]]:
    """`name<separator>part` -> name -> part -> array, split at the last separator."""
    groups: dict[str, dict[str, Array]] = {}
    for key, array in tensors.items():
        name, _, part = key.rpartition(separator)
        groups.setdefault(name, {})[part] = array
    return groups


OBJECTIVE = "task.json"


def save_objective(state: Mapping[str, float], folder: Path) -> None:
    """Write what an objective carries from step to step; most carry nothing and have no file."""
    if state:
        (folder / OBJECTIVE).write_text(json.dumps(dict(state), indent=2, sort_keys=True) + "\n", "utf-8")


def load_objective(expected: Mapping[str, float], folder: Path) -> Mapping[str, float]:
    """Read back what `save_objective` wrote; `expected` has the names. Raises CheckpointError where it differs."""
    if not expected:
        return {}
    file = folder / OBJECTIVE
    try:
        state = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError("checkpoint-damaged", f"cannot be read: {error}", where=str(file)) from error
    whole = isinstance(state, dict) and state.keys() == expected.keys()
    if not whole or not all(isinstance(value, float) and math.isfinite(value) for value in state.values()):
        raise CheckpointError("foreign-checkpoint", "is not the state of this task", where=str(file))
    return {str(name): float(value) for name, value in state.items()}
