"""Rows of tables: CSV, TSV and Parquet."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from soup_xb.core.errors import DataError
from soup_xb.core.rows.examples import Row, Source
from soup_xb.core.rows.json_rows import decoded

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# The csv module's own limit is 131,072 characters, less than a long document.
_LONGEST_FIELD = 2**26
_BATCH = 1024


def csv_rows(path: Path) -> Iterator[Row]:
    """The rows of a .csv file; the first line names the columns."""
    return _delimited(path, ",")


def tsv_rows(path: Path) -> Iterator[Row]:
    """The rows of a .tsv file; the first line names the columns."""
    return _delimited(path, "\t")


def _delimited(path: Path, delimiter: str) -> Iterator[Row]:
    columns: list[str] = []
    for source, cells in _records(path, delimiter):
        if not columns:
            columns = _checked_columns(cells, source)
            continue
        if len(cells) != len(columns):
            raise DataError(
                "ragged-row",
                f"has {len(cells)} field{'s' * (len(cells) != 1)}, and the first line names {len(columns)} columns",
                where=str(source),
                help="a field that holds the separator or a line break goes in double quotes.",
            )
        yield source, dict(zip(columns, cells, strict=True))


def _records(path: Path, delimiter: str) -> Iterator[tuple[Source, list[str]]]:
    with path.open("rb") as file:
        lines = csv.reader(_text_lines(file, path), delimiter=delimiter, strict=True)
        first_line = 1
        while True:
            # The limit belongs to the whole process, so it is ours for the time of one record alone.
            before = csv.field_size_limit(_LONGEST_FIELD)
            try:
                cells = next(lines, None)
            except csv.Error as error:
                raise DataError("bad-csv", f"is not CSV: {error}", where=f"{path}:{first_line}") from error
            finally:
                csv.field_size_limit(before)
            if cells is None:
                return
            if cells:
                yield Source(str(path), first_line), cells
            first_line = lines.line_num + 1


def _text_lines(file: BinaryIO, path: Path) -> Iterator[str]:
    for number, raw in enumerate(file, start=1):
        line = raw.removeprefix(_BYTE_ORDER_MARK) if number == 1 else raw
        yield decoded(line, Source(str(path), number))


def _checked_columns(names: list[str], source: Source) -> list[str]:
    names = [name.strip() for name in names]
    for name in names:
        if not name or names.count(name) > 1:
            raise DataError(
                "bad-columns",
                f"the column `{name}` is named twice" if name else "a column has no name",
                where=str(source),
                help="the first line names the columns.",
            )
    return names


def parquet_rows(path: Path) -> Iterator[Row]:
    """The rows of a Parquet file, read in batches; a source's line is the row's number."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise DataError(
            "pyarrow-missing",
            "reading Parquet needs pyarrow, which is not installed",
            where=str(path),
            help="`pip install pyarrow`, or save the rows as JSON lines.",
        ) from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(str(path)) as table:
            _checked_columns(list(table.schema_arrow.names), Source(str(path), 1))
            for batch in table.iter_batches(batch_size=_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield Source(str(path), number), row
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        what = "is not a whole Parquet file" if number == 0 else f"is damaged after row {number}"
        raise DataError(
            "bad-parquet",
            f"{what}: {(str(error).splitlines() or [''])[0]}",
            where=str(path),
            help="download or write the file again.",
        ) from error
