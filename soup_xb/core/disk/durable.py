"""Files that are whole or not there: written beside their place, synced, renamed, and the folder synced."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from soup_xb.core.errors import ResourceError
from soup_xb.core.units import bytes_text

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
