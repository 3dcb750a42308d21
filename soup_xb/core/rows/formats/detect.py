"""Which format a row has, what it means, and what is wrong with rows whose columns are not those of their format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from re import fullmatch
from shlex import quote
from types import MappingProxyType
from typing import Any

from attrs import evolve, field, frozen

from soup_xb.core.errors import DataError, Problem
from soup_xb.core.rows.examples import (
    AnyExample,
    ChatExample,
    CompletionExample,
    Example,
    Message,
    Row,
    Source,
)
from soup_xb.core.rows.fields import (
    checked_text,
    columns_text,
    count_nulls,
    mistyped,
    parsed,
    proposed_columns,
    read_text,
    renamed,
)
from soup_xb.core.rows.files import Cells
from soup_xb.core.rows.tools import check_declared, read_tools
from soup_xb.core.rows.turns import extra_turn_keys, read_turns, written_turns
from soup_xb.core.text import did_you_mean


@frozen
class Detection:
    """A format, and why it was taken."""

    name: str
    reason: str


# What JSON text of turns can begin with.
_OPENING = frozenset("[{ \n\t\r")
# Columns that hold turns and never a plain text.
CONVERSATIONS = ("messages", "conversations")


@frozen
class Format:
    """A way to write rows: the columns it needs, those it knows besides, and how a row becomes an example.

    `turns` are the columns that may hold turns, `aliases` other names of its columns. With `keeps_all` every other
    column is part of the example too. `variants` are other sets of columns that mean the same, asked before its own.
    """

    required: tuple[str, ...]
    read: Callable[[Mapping[str, Any], Source], AnyExample]
    optional: tuple[str, ...] = ()
    turns: tuple[str, ...] = ()
    aliases: Mapping[str, str] = MappingProxyType({})
    keeps_all: bool = False
    variants: tuple[Format, ...] = ()
    needed: frozenset[str] = field(init=False, repr=False, eq=False)
    columns: frozenset[str] = field(init=False, repr=False, eq=False)

    @needed.default
    def _needed_columns(self) -> frozenset[str]:
        return frozenset(self.required)

    @columns.default
    def _all_columns(self) -> frozenset[str]:
        return frozenset((*self.required, *self.optional))

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has the columns that the format needs."""
        named = self.named(row)
        return named.keys() >= self.variant(named).needed

    def variant(self, named: Mapping[str, Any]) -> Format:
        """The set of columns that a row by the format's own names has."""
        for variant in self.variants:
            for column in variant.required:
                if named.get(column) is None:
                    break
            else:
                return variant
        return self

    def named(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row with the format's own names for its columns; an alias beside the own name keeps its name."""
        if not self.aliases:
            return row
        named = dict(row)
        for alias, column in self.aliases.items():
            if named.get(alias) is not None and named.get(column) is None:
                named[column] = named.pop(alias)
        return named

    def written(self, row: Mapping[str, Any]) -> list[str]:
        """The columns that the format needs, as this row names them."""
        names: dict[str, str] = {}
        for alias, column in self.aliases.items():
            if alias in row:
                names.setdefault(column, alias)
        required = self.variant(self.named(row)).required
        return [names.get(column, column) if row.get(column) is None else column for column in required]

    def shaped(self, named: Mapping[str, Any], source: Source) -> Mapping[str, Any]:
        """The row with a list in place of every other spelling of turns. Raises DataError."""
        changed = {}
        for column in self.turns:
            value = named.get(column)
            if value is None or type(value) is list:
                continue
            if type(value) is not str or value[:1] in _OPENING:
                found = written_turns(value, f"{source}: {column}", column not in CONVERSATIONS)
                if found is not value:
                    changed[column] = found
        return {**named, **changed} if changed else named


Formats = Mapping[str, Format]


def detect_format(rows: Iterable[Row], formats: Formats | None = None) -> Detection:
    """The format of the first row, judged by its columns; a column of nulls counts less than a filled one.

    `formats` are those to choose from, by default the ones of `sft`.

    >>> detect_format([(Source("rows.jsonl", 1), {"text": "Once upon a time"})])
    Detection(name='text', reason='the first row has the column `text`')
    """
    known = FORMATS if formats is None else formats
    source, row = next(iter(rows))
    for columns in (*([_without_blanks(row)] if isinstance(row, Cells) else []), _filled(row), row):
        fitting = [name for name, format_ in known.items() if format_.fits(columns)]
        if fitting:
            return Detection(fitting[0], _reason(fitting, known, columns))
    raise unknown_columns(row, source, known)


def _filled(row: Mapping[str, Any]) -> dict[str, Any]:
    return {column: value for column, value in row.items() if value is not None}


def _without_blanks(row: Mapping[str, Any]) -> dict[str, Any]:
    return {column: cell for column, cell in row.items() if cell != ""}


def to_example(
    row: Mapping[str, Any], source: Source, format: str, formats: Formats | None = None
) -> AnyExample:
    """What a row means. Raises DataError naming file, line and field."""
    variant, named = _meant(row, source, format, FORMATS if formats is None else formats)
    return variant.read(named, source)


def _meant(
    row: Mapping[str, Any], source: Source, format: str, formats: Formats
) -> tuple[Format, Mapping[str, Any]]:
    """The set of columns that a row of a format has, and the row by their names, turns as lists."""
    known = formats.get(format)
    if known is None:
        raise DataError(
            "unsupported-format",
            f"`{format}` rows cannot be trained on by this task",
            where=str(source),
            help=f"formats: {known_formats(formats)}.",
        )
    if isinstance(row, Cells) and "" in row.values():
        row = _without_blank_columns(row, known, formats)
    named = known.named(row)
    variant = known.variant(named)
    for column in variant.required:
        if named.get(column) is None:
            _check_same_format(row, source, format, formats)
            break
    return variant, variant.shaped(named, source)


def _without_blank_columns(row: Cells, known: Format, formats: Formats) -> Mapping[str, Any]:
    """The row of a table without its empty cells, but for those that its format needs and no other one does."""
    filled = _without_blanks(row)
    if known.fits(filled) or _fitting(filled, known.variant(known.named(row)), formats):
        return filled
    needed = {*known.variant(known.named(row)).needed, *known.aliases}
    return {column: cell for column, cell in row.items() if cell != "" or column in needed}


def _check_same_format(row: Mapping[str, Any], source: Source, format: str, formats: Formats) -> None:
    """Raise DataError for a row that has not every column of its file's format, or has nulls for those of another."""
    named = formats[format].named(row)
    missing = [column for column in formats[format].variant(named).required if column not in named]
    filled = _filled(row)
    if missing or _fitting(filled, formats[format].variant(named), formats):
        raise other_format(filled, source, format, missing, formats)


def _fitting(filled: Mapping[str, Any], known: Format, formats: Formats) -> list[str]:
    """The formats that a row fits by columns of which the known one does not need each."""
    return [
        name
        for name, other in formats.items()
        if other.fits(filled) and not other.variant(other.named(filled)).needed <= known.needed
    ]


def extra_columns(row: Mapping[str, Any], format: str, formats: Formats | None = None) -> list[str]:
    """The columns, and keys of turns, of a row that `to_example` accepts and does not use."""
    nowhere = Source("", 0)
    return _extra(*_meant(row, nowhere, format, FORMATS if formats is None else formats))


def _extra(known: Format, named: Mapping[str, Any]) -> list[str]:
    extra = []
    if not known.keeps_all and not named.keys() <= known.columns:
        extra = [
            column for column, value in named.items() if column not in known.columns and value is not None
        ]
    for column in known.turns:
        if isinstance(named.get(column), list):
            extra += extra_turn_keys(named, column)
    return extra


def _reason(fitting: list[str], formats: Formats, row: Mapping[str, Any]) -> str:
    required = formats[fitting[0]].written(row)
    names = " and ".join(f"`{column}`" for column in required)
    reason = f"the first row has the column{'s' * (len(required) > 1)} {names}"
    if len(fitting) > 1:
        reason += f"; it also fits {', '.join(fitting[1:])}, which `data.format` can ask for"
    return reason


def _read_alpaca(row: Mapping[str, Any], source: Source) -> ChatExample:
    turns = [*instruction_turns(row, source), Message("assistant", read_text(row, "output", f"{source}: "))]
    return ChatExample(with_system(row, turns, source), source)


def instruction_turns(row: Mapping[str, Any], source: Source) -> list[Message]:
    """The turns before the answer of a row with an `instruction`."""
    where = f"{source}: "
    parts = [read_text(row, "instruction", where)]
    if row.get("input") is not None:
        parts.append(read_text(row, "input", where))
    user = "\n\n".join(part for part in parts if part.strip())
    return [*_history(row, source), Message("user", user)]


def _history(row: Mapping[str, Any], source: Source) -> list[Message]:
    """Earlier exchanges: a list of pairs, the user's text and the assistant's."""
    where = f"{source}: history"
    history = row.get("history")
    if isinstance(history, str) and history.lstrip()[:1] == "[":
        history = parsed(history, where)
    if history in (None, ""):
        return []
    if not isinstance(history, list):
        raise mistyped(where, "a list of [user, assistant] pairs", history)
    turns = []
    for index, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise mistyped(f"{where}[{index}]", "a [user, assistant] pair", pair)
        for role, text in zip(("user", "assistant"), pair, strict=True):
            if not isinstance(text, str):
                raise mistyped(f"{where}[{index}]", "a pair of texts", text)
            turns.append(Message(role, checked_text(text, f"{where}[{index}]")))
    return turns


def with_system(row: Mapping[str, Any], turns: Sequence[Message], source: Source) -> tuple[Message, ...]:
    """The turns with the column `system` in front, where there is one."""
    if row.get("system") is None:
        return tuple(turns)
    system = read_text(row, "system", f"{source}: ")
    if not system.strip():
        return tuple(turns)
    if any(turn.role == "system" for turn in turns):
        raise DataError(
            "two-system-prompts",
            "the turns hold a system prompt already",
            where=f"{source}: system",
            help="keep one of the two.",
        )
    return (Message("system", system), *turns)


def _read_conversation(column: str) -> Callable[[Mapping[str, Any], Source], ChatExample]:
    def read(row: Mapping[str, Any], source: Source) -> ChatExample:
        turns, tools = read_turns(row, column, source), read_tools(row, source)
        check_declared(turns, tools, f"{source}: {column}")
        return ChatExample(with_system(row, turns, source), source, tools=tools)

    return read


def read_prompt_completion(row: Mapping[str, Any], source: Source) -> Example:
    """A prompt and its completion, both text or both lists of turns."""
    if isinstance(row["prompt"], list) and isinstance(row["completion"], list):
        prompt = read_turns(row, "prompt", source)
        completion = read_turns(row, "completion", source)
        tools = read_tools(row, source)
        check_declared(prompt, tools, f"{source}: prompt")
        check_declared(completion, tools, f"{source}: completion")
        return ChatExample(prompt + completion, source, len(prompt), tools)
    if isinstance(row["prompt"], str) and isinstance(row["completion"], list):
        raise mistyped(f"{source}: completion", "text, as the prompt is", row["completion"])
    if isinstance(row["prompt"], list) and isinstance(row["completion"], str):
        raise mistyped(f"{source}: completion", "a list of turns, as the prompt is", row["completion"])
    where = f"{source}: "
    return CompletionExample(read_text(row, "prompt", where), read_text(row, "completion", where), source)


def _read_plain_text(row: Mapping[str, Any], source: Source) -> Example:
    return CompletionExample("", read_text(row, "text", f"{source}: "), source)


# In the order in which detection asks: datasets often carry the flat text of a conversation beside it.
FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "messages": Format(("messages",), _read_conversation("messages"), ("system", "tools"), ("messages",)),
        "sharegpt": Format(
            ("conversations",), _read_conversation("conversations"), ("system", "tools"), ("conversations",)
        ),
        "prompt-completion": Format(
            ("prompt", "completion"), read_prompt_completion, ("tools",), turns=("prompt", "completion")
        ),
        "alpaca": Format(("instruction", "output"), _read_alpaca, ("input", "system", "history")),
        "text": Format(("text",), _read_plain_text),
    }
)


def unknown_columns(row: Mapping[str, Any], source: Source, formats: Formats) -> DataError:
    """The error of a first row that no format fits."""
    for told in (_pairs_for_another_task, _verdicts_for_another_task):
        if problem := told(row, source, formats):
            return problem
    proposal = columns_help(row, formats)
    return DataError(
        "unknown-columns",
        f"no known format has the columns {_listed(row)}",
        where=str(source),
        help=f"{proposal or 'name them in `data.columns`, or '}rename them: {known_formats(formats)}.",
    )


def columns_help(row: Mapping[str, Any], formats: Iterable[str]) -> str:
    """The start of a help that proposes `data.columns` for the row; empty where nothing is near."""
    found = proposed_columns(row, formats)
    if not found:
        return ""
    told = ",".join(f"{ours}={theirs}" for ours, theirs in found.items())
    return f"write `data.columns: {columns_text(found)}` (`soupx data`: `--columns {quote(told)}`), or "


def _pairs_for_another_task(row: Mapping[str, Any], source: Source, formats: Formats) -> DataError | None:
    if not {"chosen", "rejected"} <= row.keys() or "preference" in formats:
        return None
    return DataError(
        "preference-rows",
        "preference rows (`chosen`, `rejected`) are for `task: dpo` and the other preference tasks",
        where=str(source),
        help="set `task`, or keep the chosen answer as a `completion` or an assistant turn.",
    )


def _verdicts_for_another_task(row: Mapping[str, Any], source: Source, formats: Formats) -> DataError | None:
    if formats.keys() != {"preference"} or not row.keys() & {"label", "kto_tag"}:
        return None
    answers = (("prompt", "completion"), ("instruction", "output"), ("messages",), ("conversations",))
    if not any(row.keys() >= {*columns} for columns in answers):
        return None
    return DataError(
        "unpaired-rows",
        "is an answer with a verdict (`label`), and this task compares two answers (`chosen`, `rejected`)",
        where=str(source),
        help="use `task: kto` or `task: bco`, which learn from such rows.",
    )


def other_format(
    row: Mapping[str, Any], source: Source, format: str, missing: list[str], formats: Formats
) -> DataError:
    """The error of a row that lacks a column of its file's format."""
    if problem := _verdicts_for_another_task(row, source, formats):
        return problem
    fitting = _fitting(row, formats[format].variant(row), formats)
    if fitting:
        return DataError(
            "mixed-formats",
            f"is a row of the format {fitting[0]} among rows of the format {format}",
            where=str(source),
            help="keep one format a file; `data.train` takes a list of files.",
        )
    needed = ", ".join(f"`{name}`" for name in formats[format].required)
    proposal = columns_help(row, [format])
    return DataError(
        "missing-field",
        f"is missing; found {_listed(row)}",
        where=f"{source}: {missing[0]}",
        help=f"{proposal}{'rename them: ' if proposal else ''}a row of the format {format} has {needed}.",
    )


def _listed(row: Mapping[str, Any]) -> str:
    names = [f"`{str(name)[:40]}`" for name in row]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "(none)"


def known_formats(formats: Formats) -> str:
    """Each format with the columns that it needs."""
    return "; ".join(f"{name} ({', '.join(format_.required)})" for name, format_ in formats.items())


class ExampleReader:
    """An iterator over the examples in rows; `count` and `dropped` (column -> rows) grow while it runs.

    `format` is a name of `formats` or `auto`; `columns` are our names for columns of the file, ours -> the file's.
    Raises DataError, when made for columns that no format has, and while iterating for a row that is not of the format.
    """

    def __init__(
        self,
        rows: Iterator[Row],
        format: str,
        name: str,
        formats: Formats = FORMATS,
        columns: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.name = name
        self.count = 0
        self.dropped: Counter[str] = Counter()
        self.nulls: Counter[str] = Counter()
        self.detection = Detection(format, "`data.format` says so")
        self._formats, self._columns = formats, columns
        self._index: tuple[str, ...] = ()
        self._unseen, self._seen = set(columns.values()), dict[str, None]()
        self._rows = self._prepared(rows)
        if format == "auto":
            head = next(self._rows)
            self.detection = detect_format([head], formats)
            self._rows = chain([head], self._rows)

    def __iter__(self) -> Iterator[AnyExample]:
        format_, formats = self.detection.name, self._formats
        for source, row in self._rows:
            try:
                known, named = _meant(row, source, format_, formats)
                example = known.read(named, source)
            except DataError as error:
                if not self._columns:
                    raise
                raise self._by_their_names(error, source) from error
            self.count += 1
            if extra := _extra(known, named):
                self.dropped.update(set(extra))
            for column, value in named.items():
                if value is None or type(value) is list or type(value) is dict:
                    self._count_nulls(known, column, value)
            yield example

    def _prepared(self, rows: Iterator[Row]) -> Iterator[Row]:
        """The rows by our names for their columns, without an index that pandas wrote."""
        for source, row in rows:
            self._index = tuple(name for name in row if _is_index(name) and name not in self._unseen)
            rows = chain([(source, row)], rows)
            break
        if not self._index and not self._columns:
            yield from rows
            return
        for source, row in rows:
            yield source, self._by_our_names(row)

    def _by_our_names(self, row: dict[str, Any]) -> dict[str, Any]:
        if self._unseen:
            self._unseen -= row.keys()
            self._seen |= dict.fromkeys(row)
        lost = row.keys() & self._columns.keys() - set(self._columns.values())
        self.dropped.update(ours for ours in lost if self._columns[ours] in row)
        kept = renamed({name: row[name] for name in row if name not in self._index}, self._columns)
        return Cells(kept) if isinstance(row, Cells) else kept

    def _by_their_names(self, error: DataError, source: Source) -> DataError:
        """The error with the file's name of a column in place of ours."""
        problems = []
        for problem in error.problems:
            found = fullmatch(r"(\w+)(.*)", problem.where.removeprefix(f"{source}: "))
            theirs = self._columns.get(found[1]) if found else None
            if found and theirs:
                problem = evolve(problem, where=f"{source}: {theirs}{found[2]}")
            problems.append(problem)
        return DataError.of(problems)

    def _count_nulls(self, known: Format, column: str, value: Any) -> None:
        found = 1 if value is None else count_nulls(value) if column in known.columns else 0
        if found:
            self.nulls[column] += found

    def notices(self) -> Iterator[Problem]:
        """The format with its reason, and the columns and nulls that nothing was made of."""
        yield Problem("data-format", f"{self.detection.name}: {self.detection.reason}", where=self.name)
        for ours, theirs in self._columns.items():
            if theirs in self._unseen:
                text = f"no row has the column `{theirs}`, which `data.columns` reads as `{ours}`"
                yield Problem("unseen-column", text, self.name, did_you_mean(theirs, map(str, self._seen)))
        if self._index:
            names = ", ".join(f"`{name}`" for name in self._index)
            yield Problem(
                "index-column", f"left out, as the index that pandas writes: {names}", where=self.name
            )
        if self.dropped:
            listed = ", ".join(f"`{column}` (in {rows:,})" for column, rows in sorted(self.dropped.items()))
            yield Problem("extra-columns", f"not used: {listed}", where=self.name)
        if self.nulls:
            count = self.nulls.total()
            told = ", ".join(f"`{column}` ({found:,})" for column, found in sorted(self.nulls.items()))
            text = f"{count:,} null value{'s count' if count > 1 else ' counts'} as absent: {told}"
            yield Problem("null-values", text, where=self.name)


def _is_index(name: Any) -> bool:
    """Whether a column is what pandas calls an index without a name."""
    return fullmatch(r"Unnamed: \d+(\.\d+)*|__index_level_\d+__", str(name)) is not None
