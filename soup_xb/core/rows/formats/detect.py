"""Which format a row has, what it means, and what is wrong with rows whose columns are not those of their format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from types import MappingProxyType
from typing import Any

from attrs import frozen

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
from soup_xb.core.rows.fields import checked_text, mistyped, read_text
from soup_xb.core.rows.tools import check_declared, read_tools
from soup_xb.core.rows.turns import extra_turn_keys, read_turns


@frozen
class Detection:
    """A format, and why it was taken."""

    name: str
    reason: str


@frozen
class Format:
    """A way to write rows: the columns it needs, those it knows besides, and how a row becomes an example.

    `aliases` are other names of its columns. With `keeps_all` every other column is part of the example too.
    """

    required: tuple[str, ...]
    read: Callable[[Mapping[str, Any], Source], AnyExample]
    optional: tuple[str, ...] = ()
    turns: tuple[str, ...] = ()
    aliases: Mapping[str, str] = MappingProxyType({})
    keeps_all: bool = False

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has the columns that the format needs."""
        named = self.named(row)
        return all(column in named for column in self.required)

    def named(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row with the format's own names for its columns; an alias beside the own name keeps its name."""
        if not self.aliases:
            return row
        named = dict(row)
        for alias, column in self.aliases.items():
            if alias in named and column not in named:
                named[column] = named.pop(alias)
        return named

    def written(self, row: Mapping[str, Any]) -> list[str]:
        """The columns that the format needs, as this row names them."""
        names: dict[str, str] = {}
        for alias, column in self.aliases.items():
            if alias in row:
                names.setdefault(column, alias)
        return [column if column in row else names[column] for column in self.required]


Formats = Mapping[str, Format]


def detect_format(rows: Iterable[Row], formats: Formats | None = None) -> Detection:
    """The format of the first row, judged by its columns; a column of nulls counts less than a filled one.

    `formats` are those to choose from, by default the ones of `sft`.

    >>> detect_format([(Source("rows.jsonl", 1), {"text": "Once upon a time"})])
    Detection(name='text', reason='the first row has the column `text`')
    """
    known = FORMATS if formats is None else formats
    source, row = next(iter(rows))
    filled = {column: value for column, value in row.items() if value is not None}
    for columns in (filled, row):
        fitting = [name for name, format_ in known.items() if format_.fits(columns)]
        if fitting:
            return Detection(fitting[0], _reason(fitting, known, columns))
    raise unknown_columns(row, source, known)


def to_example(
    row: Mapping[str, Any], source: Source, format: str, formats: Formats | None = None
) -> AnyExample:
    """What a row means. Raises DataError naming file, line and field."""
    formats = FORMATS if formats is None else formats
    if format not in formats:
        raise DataError(
            "unsupported-format",
            f"`{format}` rows cannot be trained on by this task",
            where=str(source),
            help=f"formats: {known_formats(formats)}.",
        )
    known = formats[format]
    named = known.named(row)
    missing = [column for column in known.required if column not in named]
    if missing:
        raise other_format(row, source, format, missing, formats)
    return known.read(named, source)


def extra_columns(row: Mapping[str, Any], format: str, formats: Formats | None = None) -> list[str]:
    """The columns, and keys of turns, of a row that `to_example` accepts and does not use."""
    known = (FORMATS if formats is None else formats)[format]
    named = {*known.required, *known.optional}
    extra = [
        column for column, value in known.named(row).items() if column not in named and value is not None
    ]
    if known.keeps_all:
        extra = []
    for column in known.turns:
        if isinstance(row[column], list):
            extra += extra_turn_keys(row, column)
    return extra


def _reason(fitting: list[str], formats: Formats, row: Mapping[str, Any]) -> str:
    required = formats[fitting[0]].written(row)
    names = " and ".join(f"`{column}`" for column in required)
    reason = f"the first row has the column{'s' * (len(required) > 1)} {names}"
    if len(fitting) > 1:
        reason += f"; it also fits {', '.join(fitting[1:])}, which `data.format` can ask for"
    return reason


def _read_alpaca(row: Mapping[str, Any], source: Source) -> Example:
    where = f"{source}: "
    parts = [read_text(row, "instruction", where)]
    if row.get("input") is not None:
        parts.append(read_text(row, "input", where))
    user = "\n\n".join(part for part in parts if part.strip())
    turns = [*_history(row, source), Message("user", user)]
    turns.append(Message("assistant", read_text(row, "output", where)))
    return ChatExample(with_system(row, turns, source), source)


def _history(row: Mapping[str, Any], source: Source) -> list[Message]:
    """Earlier exchanges: a list of pairs, the user's text and the assistant's."""
    history = row.get("history")
    if history is None:
        return []
    where = f"{source}: history"
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


def _read_conversation(column: str) -> Callable[[Mapping[str, Any], Source], Example]:
    def read(row: Mapping[str, Any], source: Source) -> Example:
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
    return DataError(
        "unknown-columns",
        f"no known format has the columns {_listed(row)}",
        where=str(source),
        help=f"rename them: {known_formats(formats)}.",
    )


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
    if not {"prompt", "completion", "label"} <= row.keys() or formats.keys() != {"preference"}:
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
    fitting = [name for name, other in formats.items() if other.fits(row)]
    if fitting:
        return DataError(
            "mixed-formats",
            f"is a row of the format {fitting[0]} among rows of the format {format}",
            where=str(source),
            help="keep one format a file; `data.train` takes a list of files.",
        )
    return DataError(
        "missing-field",
        f"is missing; found {_listed(row)}",
        where=f"{source}: {missing[0]}",
        help=f"a row of the format {format} has {', '.join(f'`{name}`' for name in formats[format].required)}.",
    )


def _listed(row: Mapping[str, Any]) -> str:
    names = [f"`{str(name)[:40]}`" for name in row]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "(none)"


def known_formats(formats: Formats) -> str:
    """Each format with the columns that it needs."""
    return "; ".join(f"{name} ({', '.join(format_.required)})" for name, format_ in formats.items())


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
