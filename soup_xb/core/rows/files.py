"""Rows out of data files (JSON lines, JSON, CSV, TSV, Parquet), each with its place; the ending names the format."""

from __future__ import annotations

import csv
import json
import re
import shlex
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NoReturn

from soup_xb.core.errors import DataError
from soup_xb.core.rows.examples import Row, Source
from soup_xb.core.text import did_you_mean

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SPACE = " \t\r\n"
# Python refuses to convert longer ones (a guard against quadratic time), in words about its own settings.
_MOST_DIGITS = 4300
_ONE_OBJECT = 'each line holds one JSON object, such as `{"text": "…"}`.'


class _RefusedError(ValueError):
    """JSON that Python would read and that has no one meaning."""


def _refuse_constant(name: str) -> NoReturn:
    raise _RefusedError(f"{name} is not JSON; write null, or leave the key out")


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise _RefusedError(f"an integer of {len(digits):,} digits")
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _RefusedError(f"the key `{twice}` is given twice in one object")
    return row


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_constant=_refuse_constant, strict=True
)


def json_lines(path: Path) -> Iterator[Row]:
    """The rows of a .jsonl file, streamed; a JSON array is accepted. Raises DataError with the line."""
    first = True
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            line = raw.removeprefix(_BYTE_ORDER_MARK) if number == 1 else raw
            if not line.strip():
                continue
            source = Source(str(path), number)
            if first and line.lstrip().startswith(b"["):
                yield from _array_rows(decoded(line + file.read(), source), source)
                return
            first = False
            text = decoded(line.strip(), source)
            yield source, _row(_parsed(text, source, last=not raw.endswith(b"\n")), source)


def read_object_line(line: str, source: Source) -> dict[str, Any]:
    """One line as a row. Raises DataError with the line."""
    return _row(_parsed(line, source, last=True), source)


def json_rows(path: Path) -> Iterator[Row]:
    """The rows of a .json file: an array of objects, or objects one after the other."""
    raw = path.read_bytes().removeprefix(_BYTE_ORDER_MARK)
    first = Source(str(path), 1)
    text = decoded(raw, first)
    if text.lstrip(_SPACE).startswith("["):
        yield from _array_rows(text, first)
        return
    cursor = _Cursor(text, first)
    while cursor.more():
        yield cursor.value()


def decoded(raw: bytes, source: Source) -> str:
    """Bytes that begin at `source` as text. Raises DataError with the line of the first byte that is not UTF-8."""
    if source.line == 1 and (wide := _wide_encoding(raw[:4])):
        raise DataError("not-utf8", f"is {wide}, not UTF-8", where=str(source), help=_convert(source, wide))
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = source.line + raw.count(b"\n", 0, error.start)
        likely = _narrow_encoding(raw)
        guess = f"; it is likely {likely}, as Windows writes it" if likely else ""
        raise DataError(
            "not-utf8",
            f"is not UTF-8: byte 0x{raw[error.start]:02x}{guess}",
            where=f"{source.file}:{line}",
            help=_convert(source, likely) if likely else "save the file as UTF-8, or mend that line.",
        ) from error


def _wide_encoding(head: bytes) -> str:
    """The name of an encoding whose characters are two or four bytes, told by the mark or the zeros of ASCII text."""
    if head in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
        return "UTF-32"
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "UTF-16"
    zeros = [place for place, byte in enumerate(head) if not byte]
    return "UTF-16LE" if zeros == [1, 3] else "UTF-16BE" if zeros == [0, 2] else ""


# Of the bytes of a text in a language of Western Europe, far fewer are accented letters.
_MOST_ACCENTS = 0.3


def _narrow_encoding(raw: bytes) -> str:
    """cp1252 for bytes that are likely text in it; empty where they are something else, or damaged UTF-8."""
    high = sum(byte >= 0x80 for byte in raw)
    undefined = any(byte in raw for byte in (0x00, 0x81, 0x8D, 0x8F, 0x90, 0x9D))
    if undefined or high > _MOST_ACCENTS * len(raw) or not raw.decode("utf-8", "ignore").isascii():
        return ""
    return "cp1252"


def _convert(source: Source, encoding: str) -> str:
    """How to write the file as UTF-8."""
    path = Path(source.file)
    copy = path.with_name(f"{path.stem}-utf8{path.suffix}")
    command = f"iconv -f {encoding.upper()} -t UTF-8 {shlex.quote(str(path))} > {shlex.quote(str(copy))}"
    return f"save the file as UTF-8, or convert it: `{command}`."


def strict_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError (or RecursionError) for what no row may hold either."""
    return _DECODER.decode(text)


class _Cursor:
    """A walk over the values in a text, counting lines."""

    def __init__(self, text: str, first: Source) -> None:
        self.text = text
        self.position = 0
        self._file, self._line, self._counted = first.file, first.line, 0

    @property
    def source(self) -> Source:
        self._line += self.text.count("\n", self._counted, self.position)
        self._counted = self.position
        return Source(self._file, self._line)

    def more(self) -> bool:
        """Skip white space; whether anything is left."""
        while self.text[self.position : self.position + 1] in _SPACE and self.position < len(self.text):
            self.position += 1
        return self.position < len(self.text)

    def take(self, mark: str) -> bool:
        """Skip white space and `mark`, if it stands here."""
        found = self.more() and self.text.startswith(mark, self.position)
        self.position += found
        return found

    def value(self) -> Row:
        """The object that stands here."""
        self.more()
        source = self.source
        value, self.position = _decode(self.text, self.position, source)
        return source, _row(value, source)


def _array_rows(text: str, first: Source) -> Iterator[Row]:
    cursor = _Cursor(text, first)
    cursor.take("[")
    if not cursor.take("]"):
        yield cursor.value()
        while not cursor.take("]"):
            if not cursor.take(","):
                _fail_between(cursor)
            yield cursor.value()
    if cursor.more():
        raise DataError(
            "bad-json",
            "text after the end of the array",
            where=str(cursor.source),
            help="a file holds either one array of objects, or one object a line.",
        )


def _fail_between(cursor: _Cursor) -> NoReturn:
    if cursor.more():
        raise DataError("bad-json", "a `,` or `]` is missing here", where=str(cursor.source))
    raise _cut_off(cursor.source)


def _row(value: Any, source: Source) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            "row-not-object", f"must be an object, got {kind(value)}", where=str(source), help=_ONE_OBJECT
        )
    return value


def _parsed(text: str, source: Source, last: bool) -> Any:
    value, end = _decode(text, 0, source, last)
    if text[end:].strip(_SPACE):
        raise DataError(
            "bad-json", f"text after the object, at column {end + 1}", where=str(source), help=_ONE_OBJECT
        )
    return value


def _decode(text: str, position: int, source: Source, last: bool = True) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        if last and _reaches_the_end(text, error):
            raise _cut_off(source) from error
        line = source.line + error.doc.count("\n", position, error.pos)
        raise DataError(
            "bad-json",
            f"is not JSON: {error.msg}, at column {error.colno}",
            where=f"{source.file}:{line}",
            help=_ONE_OBJECT,
        ) from error
    except RecursionError as error:
        raise DataError("bad-json", "is nested too deep", where=str(source)) from error
    except _RefusedError as error:
        raise DataError("bad-json", str(error), where=str(source)) from error


def _reaches_the_end(text: str, error: json.JSONDecodeError) -> bool:
    unclosed = error.msg.startswith(("Unterminated string", "Invalid \\"))
    return error.pos >= len(text.rstrip(_SPACE)) or (unclosed and '"' not in text[error.pos + 1 :])


def _cut_off(source: Source) -> DataError:
    return DataError(
        "cut-off",
        "is cut off: the file ends in the middle of a row",
        where=str(source),
        help="write the file again, or remove the row.",
    )


def kind(value: Any) -> str:
    """What a JSON value is, in words.

    >>> kind(None), kind(True), kind([1]), kind("a")
    ('null', 'a boolean', 'a list', 'text')
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    names: tuple[tuple[type, str], ...] = (
        (int, "a number"),
        (float, "a number"),
        (str, "text"),
        (list, "a list"),
        (dict, "an object"),
    )
    return next((name for type_, name in names if isinstance(value, type_)), f"a {type(value).__name__}")


# The csv module's own limit is 131,072 characters, less than a long document.
_LONGEST_FIELD = 2**26
_BATCH = 1024


class Cells(dict[str, Any]):
    """A row of a table that knows texts alone: an empty cell says the same as a null."""


def csv_rows(path: Path) -> Iterator[Row]:
    """The rows of a .csv file; the first line names the columns. The separator is looked for."""
    return _delimited(path, ",")


def tsv_rows(path: Path) -> Iterator[Row]:
    """The rows of a .tsv file; the first line names the columns."""
    return _delimited(path, "\t")


def _delimited(path: Path, delimiter: str) -> Iterator[Row]:
    delimiter, is_told = _separator(path, delimiter)
    records = _records(path, delimiter)
    if is_told:
        next(records, None)
    head = next(records, None)
    if head is None:
        return
    first, names = head
    columns = _named_columns(names, first)
    nameless = [place for place, name in enumerate(columns) if not name]
    for source, cells in records:
        if len(cells) != len(columns):
            cells = _without_padding(cells, columns, source)
        # Spreadsheets write the separators of rows that are empty.
        if not cells[0] and len(cells) > 1 and not any(cells):
            continue
        if nameless:
            if any(cells[place] for place in nameless):
                raise _unnamed(first)
            yield source, Cells((name, cell) for name, cell in zip(columns, cells, strict=True) if name)
            continue
        yield source, Cells(zip(columns, cells, strict=True))


_SEPARATORS = ",;\t|"
# Excel begins a file so whose separator its reader should not have to guess.
_TOLD = re.compile(r"\"?sep=([,;\t|])\"?\s*")
_HEAD = 2**16


def _separator(path: Path, usual: str) -> tuple[str, bool]:
    """What stands between the columns, and whether the first line tells it.

    It is the usual one unless another one cuts head and first row into as many columns, and more than one.
    """
    with path.open("rb") as file:
        text = file.read(_HEAD).removeprefix(_BYTE_ORDER_MARK).decode("utf-8", "replace")
    lines = text.splitlines(keepends=True)
    if lines and (told := _TOLD.fullmatch(lines[0])):
        return told[1], True
    widths = {mark: _widths(lines, mark) for mark in (usual, *_SEPARATORS.replace(usual, ""))}
    fitting = [mark for mark, (head, row) in widths.items() if head == row > 1]
    return fitting[0] if fitting else max(widths, key=lambda mark: widths[mark][0]), False


def _widths(lines: list[str], delimiter: str) -> tuple[int, int]:
    """The columns of the first two records."""
    records = (record for record in csv.reader(lines, delimiter=delimiter) if record)
    try:
        return len(next(records, ())), len(next(records, ()))
    except csv.Error:
        return 0, 0


def _named_columns(names: list[str], source: Source) -> list[str]:
    """The names of a table's columns: pandas' name for an index that it wrote without one, empty for others."""
    names = [name.strip() for name in names]
    for place, name in enumerate(names):
        if name or not any(names[place:]):
            break
        numbers = (f"Unnamed: {number}" for number in range(place, len(names) + 1 + place))
        names[place] = next(free for free in numbers if free not in names)
    _check_columns([name for name in names if name], source)
    return names


def _without_padding(cells: list[str], columns: list[str], source: Source) -> list[str]:
    """The cells without empty ones behind the last column."""
    if len(cells) < len(columns) or any(cells[len(columns) :]):
        raise DataError(
            "ragged-row",
            f"has {len(cells)} field{'s' * (len(cells) != 1)}, and the first line names {len(columns)} columns",
            where=str(source),
            help="a field that holds the separator or a line break goes in double quotes.",
        )
    return cells[: len(columns)]


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
                raise DataError(
                    "bad-csv", f"is not CSV: {_in_words(error)}", where=f"{path}:{first_line}"
                ) from error
            finally:
                csv.field_size_limit(before)
            if cells is None:
                return
            if cells:
                yield Source(str(path), first_line), cells
            first_line = lines.line_num + 1


def _in_words(error: csv.Error) -> str:
    """What the csv module found, without its advice to a programmer."""
    if "new-line character seen in unquoted field" in str(error):
        return "a line ends with a carriage return alone; write the file with line feeds"
    return str(error)


def _text_lines(file: BinaryIO, path: Path) -> Iterator[str]:
    for number, raw in enumerate(file, start=1):
        line = raw.removeprefix(_BYTE_ORDER_MARK) if number == 1 else raw
        try:
            text = "" if number == 1 else line.decode("utf-8")
        except UnicodeDecodeError:
            text = ""
        # Whatever is wrong with the bytes is told there; the first line tells other encodings.
        yield text or decoded(line, Source(str(path), number))


def _check_columns(names: list[str], source: Source) -> None:
    for name in names:
        if not name:
            raise _unnamed(source)
        if names.count(name) > 1:
            raise DataError(
                "bad-columns",
                f"the column `{name}` is named twice",
                where=str(source),
                help="the first line names the columns.",
            )


def _unnamed(source: Source) -> DataError:
    help = "the first line names the columns."
    return DataError("bad-columns", "a column has no name", where=str(source), help=help)


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
            _check_columns([name.strip() for name in table.schema_arrow.names], Source(str(path), 1))
            holds_numbers = _NUMBERS.search(str(table.schema_arrow)) is not None
            for batch in table.iter_batches(batch_size=_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield Source(str(path), number), _without_nan(row) if holds_numbers else row
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        what = "is not a whole Parquet file" if number == 0 else f"is damaged after row {number}"
        raise DataError(
            "bad-parquet",
            f"{what}: {(str(error).splitlines() or [''])[0]}",
            where=str(path),
            help="download or write the file again.",
        ) from error


# What pandas writes for a value that is missing where a column or a field holds numbers.
_NUMBERS = re.compile(r"\b(float|double|halffloat)\b")


def _without_nan(value: Any) -> Any:
    """A value of a table with null in place of every NaN."""
    if type(value) is float:
        return None if value != value else value
    if type(value) is dict:
        return {key: _without_nan(one) for key, one in value.items()}
    return [_without_nan(one) for one in value] if type(value) is list else value


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
