"""Tokenized rows kept on the disk: one folder a file and way of tokenizing it, whole or not there, bounded in all.

An entry is named by a hash of everything that its rows depend on. It is opened only where every file has the size and
the hash that were written down with it. What was used longest ago goes first where all entries together grow too large.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen

from soup_xb.core import disk
from soup_xb.core.disk import json_text, write_bytes
from soup_xb.core.errors import ResourceError
from soup_xb.core.rows.row import KINDS
from soup_xb.core.rows.table import COLUMNS, Columns, column_digest
from soup_xb.core.run.folder import UNSUPPORTED

Array = np.ndarray[Any, Any]

# Raise it when the columns or their meaning change.
LAYOUT = 3
LARGEST_BYTES = 20 * 2**30
_ABOUT = "about.json"
_LARGEST_ABOUT = 2**20


class DamagedEntryError(Exception):
    """An entry that is not what was written; the message says in what."""


@frozen(eq=False)
class Entry:
    """An open entry: its columns, and what its writer told about the file."""

    columns: Columns
    told: Mapping[str, Any]
    bytes: int


class FileColumn:
    """An array in a file that is open as long as this object lives, so that it may be deleted meanwhile.

    A file that is mapped into memory would count as this process's own as far as it was read, and one that is cut
    short from outside would end the process (SIGBUS). A read that comes back short is an error with a message.
    """

    def __init__(self, path: Path, kind: np.dtype[Any]) -> None:
        """Open a regular file, never a symbolic link. Raises OSError."""
        self._path, self._kind = path, kind
        self._handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._handle)
        self.bytes = os.fstat(self._handle).st_size

    def __len__(self) -> int:
        return self.bytes // self._kind.itemsize

    def __getitem__(self, part: slice) -> Array:
        start, stop, _ = part.indices(len(self))
        wanted = max(0, stop - start) * self._kind.itemsize
        data = self._read(wanted, start * self._kind.itemsize)
        return np.frombuffer(data, dtype=self._kind)

    def _read(self, wanted: int, place: int) -> bytes:
        data = os.pread(self._handle, wanted, place)
        while len(data) < wanted:
            # One call reads at most 2 GiB.
            more = os.pread(self._handle, wanted - len(data), place + len(data))
            if not more:
                raise ResourceError(
                    "token-cache-cut",
                    "the file was cut while the run reads it",
                    where=str(self._path),
                    help="start again with `--resume`: the rows are tokenized anew.",
                )
            data += more
        return data


def entry_name(key: Mapping[str, Any]) -> str:
    """The folder's name for everything that rows depend on."""
    return hashlib.sha256(json.dumps({**key, "layout": LAYOUT}, sort_keys=True).encode()).hexdigest()[:40]


def open_entry(folder: Path, key: Mapping[str, Any]) -> Entry | None:
    """The entry in a folder, every byte of it checked; None where there is none.

    Raises DamagedEntryError where it is not whole, or belongs to another key.
    """
    if not folder.is_dir() or folder.is_symlink():
        return None
    about = _read_about(folder / _ABOUT)
    if about.get("key") != dict(key) or about.get("layout") != LAYOUT:
        raise DamagedEntryError("it belongs to other data or settings")
    try:
        columns = {name: FileColumn(folder / name, kind) for name, kind in COLUMNS.items()}
        for name, column in columns.items():
            if column.bytes != about["columns"][name]["bytes"]:
                raise DamagedEntryError(f"`{name}` has {column.bytes:,} bytes")
            if column_digest(column) != about["columns"][name]["sha256"]:
                raise DamagedEntryError(f"`{name}` has other bytes than were written")
        _check_sizes(columns)
        digests = {name: about["columns"][name]["sha256"] for name in COLUMNS}
        entry = Entry(
            Columns(KINDS[about["kind"]], columns, digests),
            about["told"],
            sum(column.bytes for column in columns.values()),
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DamagedEntryError(f"it cannot be read: {error}") from error
    # The time of the last use, by which old entries go.
    with suppress(OSError):
        os.utime(folder / _ABOUT)
    return entry


class EntryWriter:
    """An entry in the making, under a staging name until `publish`."""

    def __init__(self, folder: Path) -> None:
        """Begin the entry that will be `folder`. Raises OSError where nothing can be written there."""
        self._target, self._staged = folder, disk.stage(folder)
        self._files = {name: (self._staged / name).open("xb") for name in COLUMNS}
        self._digests = {name: hashlib.sha256() for name in COLUMNS}
        self.bytes = 0

    def append(self, columns: Mapping[str, Array]) -> None:
        """Add the columns of the rows that follow. Raises OSError."""
        for name, array in columns.items():
            data = np.ascontiguousarray(array, dtype=COLUMNS[name]).tobytes()
            self._files[name].write(data)
            self._digests[name].update(data)
            self.bytes += len(data)

    def publish(self, kind: str, key: Mapping[str, Any], told: Mapping[str, Any]) -> None:
        """Make the entry appear, synced and whole. Raises OSError."""
        sizes = {name: file.tell() for name, file in self._files.items()}
        for file in self._files.values():
            file.close()
        columns = {
            name: {"bytes": sizes[name], "sha256": digest.hexdigest()}
            for name, digest in self._digests.items()
        }
        about = {"layout": LAYOUT, "kind": kind, "key": dict(key), "columns": columns, "told": dict(told)}
        text = json_text({**about, "sha256": _about_digest(about)}, indent=1)
        write_bytes(self._staged / _ABOUT, text.encode())
        disk.publish(self._staged, self._target)

    def discard(self) -> None:
        """Leave nothing behind; after `publish` this does nothing."""
        for file in self._files.values():
            with suppress(OSError):
                file.close()
        with suppress(OSError):
            disk.discard(self._staged)


@contextmanager
def entry_lock(folder: Path) -> Iterator[None]:
    """Inside, no other process makes this entry: who comes second waits, and finds it made.

    Where the file system has no locks nobody waits; entries appear whole all the same. Raises OSError.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock_file(folder) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
        yield


@contextmanager
def _lock_file(folder: Path) -> Iterator[int]:
    path = folder.with_name(f"{folder.name}.lock")
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        yield handle
    finally:
        os.close(handle)


def evict(parent: Path, keep: Path, largest: int = LARGEST_BYTES) -> int:
    """Delete the entries used longest ago until the rest fit in `largest` bytes; `keep` stays. Returns how many.

    What a kill left of an entry in the making goes too. Raises OSError.
    """
    for staged in parent.glob(f"{disk.STAGING}*"):
        _discard_dead(staged)
    entries = sorted(_entries(parent), key=lambda entry: entry[1])
    total, gone = sum(size for _, _, size in entries), 0
    for folder, _, size in entries:
        if total <= largest:
            break
        if folder == keep:
            continue
        # Processes that have it open read on.
        disk.discard(folder)
        total, gone = total - size, gone + 1
    return gone


def _discard_dead(staged: Path) -> None:
    """Delete an entry in the making that nobody makes."""
    target = staged.with_name(staged.name.removeprefix(disk.STAGING))
    with _lock_file(target) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return
        disk.discard(staged)


def cache_size(parent: Path) -> tuple[int, int]:
    """Number of entries and their bytes."""
    sizes = [size for _, _, size in _entries(parent)]
    return len(sizes), sum(sizes)


def clear(parent: Path) -> None:
    """Delete every entry, and what a kill left of one in the making."""
    disk.clean_staging(parent, "")
    for folder, _, _ in _entries(parent):
        disk.discard(folder)
    for lock in parent.glob("*.lock"):
        lock.unlink(missing_ok=True)


def _entries(parent: Path) -> list[tuple[Path, float, int]]:
    """Each entry with the time of its last use and its bytes."""
    found = []
    for about in parent.glob(f"[!.]*/{_ABOUT}"):
        with suppress(OSError):
            size = sum(file.stat().st_size for file in about.parent.iterdir())
            found.append((about.parent, about.stat().st_mtime, size))
    return found


def _read_about(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > _LARGEST_ABOUT:
            raise DamagedEntryError(f"`{_ABOUT}` is too large")
        about = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedEntryError(f"`{_ABOUT}` cannot be read: {error}") from error
    if not isinstance(about, dict) or about.pop("sha256", None) != _about_digest(about):
        raise DamagedEntryError(f"`{_ABOUT}` is not as it was written")
    return about


def _about_digest(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _check_sizes(columns: Mapping[str, FileColumn]) -> None:
    """Raise DamagedEntryError where columns do not belong together."""
    lengths, counts, extras = (columns[name][:] for name in ("lengths", "counts", "extra_lengths"))
    weighted = columns["weighted"][:]
    fits = (
        (lengths > 0).all()
        and (counts > 0).all()
        and (extras >= 0).all()
        and int(lengths.sum(dtype=np.int64)) == len(columns["tokens"]) == len(columns["trained"])
        and int(counts.sum(dtype=np.int64)) == len(lengths) == len(columns["targets"])
        and int(extras.sum(dtype=np.int64)) == len(columns["extras"])
        and len(counts) == len(columns["lines"])
        and len(extras) in (0, len(counts))
        and len(columns["prompt_lengths"]) == len(columns["prompt_keys"]) in (0, len(lengths))
        and len(weighted) == len(lengths)
        and int(weighted.sum()) == len(columns["weight_sums"])
        and int(lengths[weighted].sum(dtype=np.int64)) == len(columns["weights"])
    )
    if not fits:
        raise DamagedEntryError("its columns do not belong together")
