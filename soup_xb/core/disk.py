"""Files and folders that are whole or not there, and errors of libraries that read files somebody else wrote.

A file is written beside its place, synced and renamed, and its folder is synced. A folder is filled under a staging
name, synced and renamed; one that is in the way is set aside first and deleted only once the new one stands.
Deleting renames first too, so that a half-deleted folder never carries a name that somebody reads.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from soup_xb.core.errors import ResourceError, SoupError
from soup_xb.core.text import bytes_text

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
NOT_WRITABLE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
# Some network file systems cannot sync a folder; there the rename itself is what they offer.
NO_FOLDER_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EBADF})


def write_bytes(path: Path, data: bytes) -> None:
    """Put `data` at `path`; a reader, or a kill at any moment, finds the old file or the new one, whole.

    The file gets the umask's mode. Only one process may write a path at a time. Raises OSError.
    """
    staged = path.with_name(f".{path.name}.tmp")
    write_new(staged, data)
    staged.replace(path)
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for text, as UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_new(path: Path, data: bytes) -> None:
    """Write and sync a file that nobody reads yet; a symbolic link at `path` is refused (ELOOP)."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)
    try:
        write_all(handle, data)
        _sync(handle)
    finally:
        os.close(handle)


def write_all(handle: int, data: bytes) -> None:
    """Write every byte of `data`, however many calls the system makes of it."""
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def sync_file(path: Path) -> None:
    """Bring a file's content to the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        _sync(handle)
    finally:
        os.close(handle)


def sync_folder(path: Path) -> None:
    """Bring a folder's names (new, renamed, removed) to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
    finally:
        os.close(handle)


def _sync(handle: int) -> None:
    # On macOS fsync leaves the bytes in the drive's cache; F_FULLFSYNC writes them out.
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is None:
        os.fsync(handle)
        return
    try:
        fcntl.fcntl(handle, full)
    except OSError:
        os.fsync(handle)


def json_text(value: Any, indent: int | None = None) -> str:
    """`value` as JSON that every parser reads: NaN and infinities become null.

    >>> json_text({"loss": float("nan"), "step": 3})
    '{"loss":null,"step":3}'
    """
    separators = (",", ":") if indent is None else None
    return json.dumps(
        _finite(value), indent=indent, separators=separators, ensure_ascii=False, allow_nan=False
    )


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


@contextmanager
def disk_errors(path: Path, bytes_needed: int = 0) -> Iterator[None]:
    """Turn what a disk or its permissions refuse inside the block into a ResourceError that names `path`."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, path, bytes_needed) from error


def disk_error(error: OSError, path: Path, bytes_needed: int = 0) -> ResourceError:
    """What the user reads when the system refuses a write below `path`."""
    if error.errno in FULL:
        return disk_full(path, bytes_needed, os.strerror(error.errno or 0))
    if error.errno in NOT_WRITABLE:
        return ResourceError(
            "not-writable",
            f"cannot write here: {os.strerror(error.errno or 0)}",
            where=str(path),
            help="choose another `output`, or change the folder's permissions.",
        )
    return ResourceError("write-failed", f"cannot write: {error.strerror or error}", where=str(path))


def disk_full(path: Path, bytes_needed: int, reason: str) -> ResourceError:
    """The error for a disk without room, with the bytes that the write needs where they are known."""
    need = f"; this write needs {bytes_text(bytes_needed)}" if bytes_needed else ""
    free = free_bytes(path)
    left = f", {bytes_text(free)} are free" if free is not None else ""
    return ResourceError(
        "disk-full",
        f"no room: {reason}{need}{left}",
        where=str(path),
        help="free some space, lower `training.save_total_limit`, or choose another `output`.",
    )


def free_bytes(path: Path) -> int | None:
    """Bytes that this user may still write below `path` or its nearest existing parent; None if unknown."""
    for folder in (path, *path.absolute().parents):
        try:
            stat = os.statvfs(folder)
        except FileNotFoundError:
            continue
        except OSError:
            return None
        return stat.f_bavail * stat.f_frsize
    return None


STAGING = ".staging-"
REPLACED = ".replaced-"
TRASH = ".trash-"


@contextmanager
def published(target: Path) -> Iterator[Path]:
    """A fresh folder that stands at `target` once the block has filled it; where the block fails, nothing stays."""
    staged = stage(target)
    try:
        yield staged
        publish(staged, target)
    except BaseException:
        with suppress(OSError):
            discard(staged)
        raise


def stage(target: Path) -> Path:
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


def clean_staging(parent: Path, prefix: str) -> None:
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


_NO_MEMORY = ("out of memory", "allocate memory")


@contextmanager
def foreign_errors(refusal: Callable[[str], SoupError]) -> Iterator[None]:
    """Inside, whatever a library raises over a foreign file becomes `refusal(the first line of it)`.

    A lack of memory passes: it says nothing about the file. Nothing but calls into libraries belongs inside.
    """
    try:
        yield
    except (SoupError, MemoryError):
        raise
    except Exception as error:
        # A damaged file makes a parser raise anything, a bare Exception too.
        text = str(error).strip()
        if isinstance(error, RuntimeError) and any(words in text for words in _NO_MEMORY):
            raise
        lines = [line.strip() for line in text.splitlines()] or [type(error).__name__]
        # Some say what is wrong only under a heading.
        raise refusal(" ".join(lines[:2]) if lines[0].endswith(":") else lines[0]) from error


def local_path(text: str) -> Path:
    """The path with `~` as the home folder; where there is no such home, the text as it is.

    >>> local_path("./rows.jsonl").name
    'rows.jsonl'
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def user_cache(name: str) -> Path:
    """The folder of one kind of them: `$XDG_CACHE_HOME/soupx/NAME`, on a Mac `~/Library/Caches/soupx/NAME`."""
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    if chosen and Path(chosen).is_absolute():
        return Path(chosen) / "soupx" / name
    parent = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return parent / "soupx" / name
