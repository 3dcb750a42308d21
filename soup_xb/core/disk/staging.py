"""Folders that appear whole: filled under a staging name, synced, then renamed into place.

A folder that is in the way is set aside first and deleted only once the new one stands. Deleting renames
first too, so that a half-deleted folder never carries a name that somebody reads.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from soup_xb.core.disk.durable import sync_file, sync_folder

STAGING = ".staging-"
REPLACED = ".replaced-"
TRASH = ".trash-"


@contextmanager
def published(target: Path) -> Iterator[Path]:
    """A fresh folder that stands at `target` once the block has filled it; where the block fails, nothing stays."""
    staged = start(target)
    try:
        yield staged
        publish(staged, target)
    except BaseException:
        with suppress(OSError):
            discard(staged)
        raise


def start(target: Path) -> Path:
    """A fresh, empty folder to fill before `publish(folder, target)`; an earlier try's leftovers go."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(STAGING + target.name)
    discard(staged)
    staged.mkdir()
    return staged


def publish(staged: Path, target: Path) -> None:
    """Sync everything in `staged` and make it `target`, replacing what was there.

    At every moment `target` or, while it is being replaced, its set-aside twin is on the disk whole.
    """
    sync_tree(staged)
    replaced = target.with_name(REPLACED + target.name)
    if target.is_dir():
        target.rename(replaced)
        sync_folder(target.parent)
    staged.rename(target)
    sync_folder(target.parent)
    discard(replaced)


def clean(parent: Path, prefix: str) -> None:
    """Mend what a kill left of the targets that begin with `prefix`.

    A set-aside folder without a successor is put back; staging and trash are removed, other names untouched.
    """
    leftover = re.compile(rf"(\.trash-)?(\.staging-|\.replaced-|\.trash-){re.escape(prefix)}.*")
    for path in sorted(parent.iterdir()) if parent.is_dir() else []:
        if not leftover.fullmatch(path.name):
            continue
        target = path.with_name(path.name.removeprefix(REPLACED))
        if path.name.startswith(REPLACED) and not target.exists():
            path.rename(target)
        else:
            discard(path)


def discard(path: Path) -> None:
    """Delete a folder; a symbolic link is removed itself, never what it points to."""
    if path.is_symlink() or path.is_file():
        path.unlink()
        return
    if not path.exists():
        return
    trash = path
    if not path.name.startswith(TRASH):
        trash = path.with_name(TRASH + path.name)
        discard(trash)
        path.rename(trash)
    shutil.rmtree(trash)


def sync_tree(folder: Path) -> None:
    """Sync each file and folder below `folder`, and give the files the umask's mode.

    Some writers (safetensors) create files as 0600; `folder` itself was made under the umask and knows it.
    """
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for path in files_below(folder):
        if stat.S_IMODE(path.stat().st_mode) != mode:
            path.chmod(mode)
        sync_file(path)
    for inner in sorted(path for path in folder.rglob("*") if path.is_dir()):
        sync_folder(inner)
    sync_folder(folder)


def files_below(folder: Path) -> Iterator[Path]:
    """The regular files below `folder`, sorted; anything but files and folders raises ValueError."""
    for current, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted([*names, *(inner for inner in folders if (Path(current) / inner).is_symlink())]):
            path = Path(current) / name
            if not stat.S_ISREG(path.lstat().st_mode):
                raise ValueError(f"{path} is not a regular file")
            yield path
