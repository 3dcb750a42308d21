"""A column in a file: what is asked for is read, and nothing of it is kept."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from soup_xb.core.errors import ResourceError

Array = np.ndarray[Any, Any]


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
