"""The output folder of a run: one owner at a time, by a lock that the system drops, and nothing half written."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from attrs import define, frozen

from soup_xb.core import disk
from soup_xb.core.disk import (
    disk_errors,
    disk_full,
    free_bytes,
    json_text,
    write_all,
    write_bytes,
    write_text,
)
from soup_xb.core.errors import CheckpointError, ConfigError, Problem, ResourceError
from soup_xb.core.run import checkpoint, events
from soup_xb.core.run.events import Event, Notice, SaveEvent, StartEvent
from soup_xb.core.run.record import RECORD, RunRecord, read_record, record_text

__all__ = ["RunFolder", "RunRecord", "open_run_folder", "read_record"]

METRICS = "metrics.jsonl"
REPORT = "report.html"
ADAPTER = "adapter"
ADAPTER_CONFIG = "adapter_config.json"
CHECKPOINTS = "checkpoints"
REFERENCE = "reference.safetensors"


@define(eq=False)
class RunFolder:
    """An open, locked output folder, let go at the end of `with`; `notices` tell what opening found."""

    path: Path
    lock: RunLock
    notices: tuple[Notice, ...] = ()
    _metrics_handle: int = -1
    _last_step: int = 0

    @property
    def adapter(self) -> Path:
        """Where the portable adapter goes."""
        return self.path / ADAPTER

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return self.path / CHECKPOINTS

    @property
    def report(self) -> Path:
        """The page that a person reads."""
        return self.path / REPORT

    @property
    def metrics(self) -> Path:
        """The events, one a line."""
        return self.path / METRICS

    def check_space(self, bytes_needed: int) -> None:
        """Raise ResourceError where the disk has less room than that."""
        free = free_bytes(self.path)
        if free is not None and free < bytes_needed:
            raise disk_full(self.path, bytes_needed, "the disk is too small")

    def write_record(self, record: RunRecord) -> None:
        """Replace `run.json` in one piece."""
        text = record_text(record)
        with disk_errors(self.path / RECORD, len(text)):
            write_text(self.path / RECORD, text)

    def record_event(self, event: Event) -> None:
        """Append one line to `metrics.jsonl`. A checkpoint's line brings the file to the disk."""
        if not isinstance(event, Notice | StartEvent):
            self._last_step = event.step
        line = events.encode_event(event, self._last_step).encode() + b"\n"
        with disk_errors(self.metrics, len(line)):
            if self._metrics_handle < 0:
                self._metrics_handle = _open_to_append(self.metrics)
            write_all(self._metrics_handle, line)
            if isinstance(event, SaveEvent):
                os.fsync(self._metrics_handle)

    def truncate_metrics(self, step: int) -> None:
        """Drop events after `step` and a torn last line: a run resumed there then has each step once."""
        self._close_metrics()
        self._last_step = step
        if not self.metrics.exists():
            return
        with disk_errors(self.metrics):
            write_bytes(self.metrics, events.kept_lines(self.metrics, step))

    def close(self) -> None:
        """Close the files and release the lock; a second call does nothing."""
        self._close_metrics()
        self.lock.release()

    def _close_metrics(self) -> None:
        if self._metrics_handle >= 0:
            os.close(self._metrics_handle)
            self._metrics_handle = -1

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_run_folder(path: Path, *, overwrite: bool = False, resume: bool = False) -> RunFolder:
    """Create or enter an output folder and lock it.

    Raises ResourceError where it is a file, cannot be written, belongs to a live process, or holds a run and
    neither `resume` nor `overwrite` is given. `overwrite` removes what that run left, and nothing else; a run that
    failed before its first step left nothing to keep, and is replaced without it.
    """
    if overwrite and resume:
        raise ConfigError("contradiction", "--resume and --overwrite exclude each other")
    with disk_errors(path):
        _make(path)
        lock = acquire(path)
    try:
        if overwrite:
            _remove_run(path)
        _refuse_in_the_way(path)
        if not (overwrite or resume):
            _refuse_run(path)
    except BaseException:
        lock.release()
        raise
    found = lock.taken_over
    notices = (Notice(takeover_notice(path, found), warning=True),) if found else ()
    return RunFolder(path, lock, notices)


def _open_to_append(path: Path) -> int:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    size = os.fstat(handle).st_size
    # A kill may have torn the last line; what follows must not become a part of it.
    if size and os.pread(handle, 1, size - 1) != b"\n":
        write_all(handle, b"\n")
    return handle


def _make(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ResourceError(
            "output-is-file",
            "the output is a file, or below one; it must be a folder",
            where=str(path),
            help="choose another `output`.",
        ) from error


def _what_a_run_left(path: Path) -> list[Path]:
    """What a run wrote here, the record last: a folder that merely has the name of ours is not ours."""
    left = []
    if any((path / CHECKPOINTS).glob("*step-*")):
        left.append(path / CHECKPOINTS)
    if (path / ADAPTER / ADAPTER_CONFIG).exists():
        left.append(path / ADAPTER)
    files = (path / name for name in (REFERENCE, REPORT, METRICS, RECORD))
    return left + [file for file in files if file.exists() or file.is_symlink()]


def _refuse_run(path: Path) -> None:
    with disk_errors(path):
        left = _what_a_run_left(path)
    if not left:
        return
    if _never_stepped(path, left):
        _remove_run(path)
        return
    names = ", ".join(f"`{item.name}`" for item in reversed(left))
    raise ResourceError(
        "output-holds-a-run",
        f"this folder already holds a run ({names})",
        where=str(path),
        help="`--resume` goes on with it, `--overwrite` starts anew, or choose another `--output`.",
    )


def _never_stepped(path: Path, left: list[Path]) -> bool:
    """Whether all that lies there is the record of a run that failed before its first step."""
    if any(item.name not in (REFERENCE, METRICS, RECORD) or item.is_symlink() for item in left):
        return False
    try:
        failed = read_record(path).status == "failed"
    except CheckpointError:
        return False
    return failed and not events.last_step(path / METRICS)


def _remove_run(path: Path) -> None:
    with disk_errors(path):
        disk.clean_staging(path, ADAPTER)
        left = _what_a_run_left(path)
        for item in left:
            _refuse_foreign(item)
        for name in (REFERENCE, REPORT, METRICS, RECORD):
            (path / f".{name}.tmp").unlink(missing_ok=True)
        for item in left:
            if item.name == CHECKPOINTS:
                checkpoint.remove_all(item)
            else:
                disk.discard(item)


def _refuse_in_the_way(path: Path) -> None:
    """What a run would fail on only when it writes its results."""
    with disk_errors(path):
        for name, is_folder in (
            (ADAPTER, True),
            (CHECKPOINTS, True),
            (REPORT, False),
            (METRICS, False),
            (REFERENCE, False),
            (RECORD, False),
        ):
            item = path / name
            if item.exists() and item.is_dir() != is_folder:
                raise ResourceError(
                    "in-the-way",
                    f"is in the way of the run's own {'folder' if is_folder else 'file'}",
                    where=str(item),
                    help="move it away, or choose another `output`.",
                )


def _refuse_foreign(item: Path) -> None:
    if item.is_symlink() or item.is_dir() == (item.name in (REFERENCE, REPORT, METRICS, RECORD)):
        raise ResourceError(
            "not-from-a-run",
            "a run writes no links and no such folder, so this is not removed",
            where=str(item),
            help="move it away, or choose another `--output`.",
        )


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
