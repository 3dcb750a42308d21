"""Rows out of data files, each with its place; the format of the file is its ending."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from soup_xb.core.errors import DataError
from soup_xb.core.rows.examples import Row
from soup_xb.core.rows.json_rows import json_lines, json_rows
from soup_xb.core.rows.table_rows import csv_rows, parquet_rows, tsv_rows
from soup_xb.core.text import did_you_mean

READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = MappingProxyType(
    {
        ".jsonl": json_lines,
        ".ndjson": json_lines,
        ".json": json_rows,
        ".csv": csv_rows,
        ".tsv": tsv_rows,
        ".parquet": parquet_rows,
    }
)


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file, one at a time, in order.

    A row is `(source, {column: value})`. JSON lines are streamed; blank lines are skipped. Raises DataError
    at once for a file that cannot be read at all, and while iterating for a row that is damaged, with its
    line; a file without a single row is an error too.
    """
    _refuse_what_is_no_file(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            "unknown-file-type",
            f"`{path.suffix or path.name}` is not a known kind of data file",
            where=str(path),
            help=f"use one of {', '.join(READERS)}; unpack what is compressed.",
        )
    return _guarded(path, reader)


def _refuse_what_is_no_file(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        near = did_you_mean(path.name, _neighbours(path))
        help = near or "a relative path starts at the current directory."
        raise DataError("data-missing", "no such file", where=str(path), help=help) from error
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if stat.S_ISDIR(mode):
        raise DataError("data-is-folder", "is a folder", where=str(path), help="name a file in it.")
    if not stat.S_ISREG(mode):
        help = "rows are read more than once: write them to a file first."
        raise DataError("data-not-a-file", "is a pipe or a device", where=str(path), help=help)


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = getattr(error, "strerror", None) or str(error)
    return DataError("data-unreadable", f"cannot be read: {reason}", where=str(path))


def _guarded(path: Path, reader: Callable[[Path], Iterator[Row]]) -> Iterator[Row]:
    empty = True
    try:
        for row in reader(path):
            empty = False
            yield row
    except OSError as error:
        raise _unreadable(path, error) from error
    if empty:
        raise DataError("data-empty", "holds no rows", where=str(path), help="each row is one example.")


def _neighbours(path: Path) -> list[str]:
    try:
        return [entry.name for entry in path.parent.iterdir() if entry.suffix.lower() in READERS]
    except OSError:
        return []
