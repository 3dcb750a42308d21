"""Who trains into a folder: a lock that the system drops by itself when its owner dies."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from attrs import define, frozen

from soup_xb.core.disk import json_text, write_all
from soup_xb.core.errors import Problem, ResourceError

LOCK = ".lock"
UNSUPPORTED = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
# `soupx runs` holds a lock for an instant while it looks, so one refusal is not the last word.
TRIES = 5
PAUSE_SECONDS = 0.05


@frozen
class LockOwner:
    """The process that wrote the lock file; `pid` is 0 where the file does not tell."""

    pid: int
    host: str

    def __str__(self) -> str:
        here = "" if self.host in ("", socket.gethostname()) else f" on {self.host}"
        return f"process {self.pid or '(unknown)'}{here}"


@define(eq=False)
class RunLock:
    """A held lock. `taken_over` names the dead owner whose lock was found."""

    path: Path
    handle: int
    taken_over: LockOwner | None = None

    def release(self) -> None:
        """Remove the lock file, then let go; a second call does nothing."""
        if self.handle < 0:
            return
        self.path.unlink(missing_ok=True)
        os.close(self.handle)
        self.handle = -1


def acquire(folder: Path) -> RunLock:
    """Take the folder's lock for this process.

    Raises ResourceError where another live process holds it, OSError where the folder cannot be written.
    """
    path = folder / LOCK
    for _ in range(TRIES):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            held = _try_lock(handle, fcntl.LOCK_EX)
            # The last owner may have removed the file since it was opened: a lock on that guards nothing.
            if held and _is_same_file(handle, path):
                return _claim(path, handle)
        except BaseException:
            os.close(handle)
            raise
        owner = _read_owner(handle)
        os.close(handle)
        if not held:
            time.sleep(PAUSE_SECONDS)
    raise _in_use(folder, owner)


def live_owner(folder: Path) -> LockOwner | None:
    """The process that trains into the folder right now, None where there is none."""
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return None if _try_lock(handle, fcntl.LOCK_SH) else _read_owner(handle)
    finally:
        os.close(handle)


def takeover_notice(folder: Path, owner: LockOwner) -> Problem:
    """What the user is told when a dead owner's lock was found."""
    return Problem(
        "lock-taken-over", f"{owner} ended without releasing it; the lock is taken over", where=str(folder)
    )


def _claim(path: Path, handle: int) -> RunLock:
    previous = _read_owner(handle) if os.fstat(handle).st_size else None
    os.ftruncate(handle, 0)
    os.lseek(handle, 0, os.SEEK_SET)
    write_all(handle, json_text({"pid": os.getpid(), "host": socket.gethostname()}).encode() + b"\n")
    return RunLock(path, handle, previous)


def _try_lock(handle: int, kind: int) -> bool:
    """Lock or learn that another holds it. Where the file system has no locks, the written pid decides."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return not _is_alive(_read_owner(handle))
    return True


def _is_alive(owner: LockOwner) -> bool:
    if owner.pid <= 0 or owner.pid == os.getpid():
        return False
    if owner.host != socket.gethostname():
        return True
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _is_same_file(handle: int, path: Path) -> bool:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    mine = os.fstat(handle)
    return (mine.st_dev, mine.st_ino) == (found.st_dev, found.st_ino)


def _read_owner(handle: int) -> LockOwner:
    try:
        content: Any = json.loads(os.pread(handle, 4096, 0))
    except (ValueError, RecursionError):
        content = None
    content = content if isinstance(content, dict) else {}
    pid, host = content.get("pid"), content.get("host")
    is_pid = isinstance(pid, int) and not isinstance(pid, bool) and 0 < pid < 2**31
    return LockOwner(pid if is_pid else 0, host if isinstance(host, str) and host.isprintable() else "")


def _in_use(folder: Path, owner: LockOwner) -> ResourceError:
    return ResourceError(
        "output-in-use",
        f"{owner} is training into this folder",
        where=str(folder),
        help="wait for it, stop it, or choose another `output`.",
    )
