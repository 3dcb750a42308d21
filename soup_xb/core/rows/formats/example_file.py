"""Rows -> examples, with the format found and what was left out counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import chain

from soup_xb.core.errors import Problem
from soup_xb.core.rows.examples import AnyExample, Row
from soup_xb.core.rows.formats.detect import (
    FORMATS,
    Detection,
    Formats,
    detect_format,
    extra_columns,
    to_example,
)


class ExampleReader:
    """An iterator over the examples in rows; `count` and `dropped` (column -> rows) grow while it runs.

    `format` is a name of `formats` or `auto`. Raises DataError, when made for columns that no format has, and while
    iterating for a row that is not of the format.
    """

    def __init__(self, rows: Iterator[Row], format: str, name: str, formats: Formats = FORMATS) -> None:
        self.name = name
        self.count = 0
        self.dropped: Counter[str] = Counter()
        self.detection = Detection(format, "`data.format` says so")
        self._rows, self._formats = rows, formats
        if format == "auto":
            head = next(rows)
            self.detection = detect_format([head], formats)
            self._rows = chain([head], rows)

    def __iter__(self) -> Iterator[AnyExample]:
        for source, row in self._rows:
            example = to_example(row, source, self.detection.name, self._formats)
            self.count += 1
            self.dropped.update(set(extra_columns(row, self.detection.name, self._formats)))
            yield example

    def notices(self) -> Iterator[Problem]:
        """The format with its reason, and the columns that nothing was made of."""
        yield Problem("data-format", f"{self.detection.name}: {self.detection.reason}", where=self.name)
        if self.dropped:
            listed = ", ".join(f"`{column}` (in {rows:,})" for column, rows in sorted(self.dropped.items()))
            yield Problem("extra-columns", f"not used: {listed}", where=self.name)
