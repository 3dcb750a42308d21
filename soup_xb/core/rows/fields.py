"""What stands under the keys of a row: texts, JSON text, nulls, and columns by other names than ours."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from soup_xb.core.errors import DataError
from soup_xb.core.rows.files import kind, strict_json


def read_text(row: Mapping[str, Any], key: str, where: str) -> str:
    """A text under a key. Raises DataError where it is missing, null, or no text."""
    if key not in row:
        found = ", ".join(f"`{name}`" for name in row) or "nothing"
        raise DataError("missing-field", f"is missing; found {found}", where=f"{where}{key}")
    value = row[key]
    if not isinstance(value, str):
        raise mistyped(f"{where}{key}", "text", value)
    return checked_text(value, f"{where}{key}")


def checked_text(text: str, where: str) -> str:
    """The text itself. Raises DataError where it cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            "broken-text",
            f"holds half of a surrogate pair at character {error.start + 1}",
            where=where,
            help="write the character whole, as UTF-8.",
        ) from error
    return text


def mistyped(where: str, wanted: str, value: Any, help: str = "") -> DataError:
    """The error of a value that is null or of another type."""
    code = "null-field" if value is None else "mistyped-field"
    return DataError(code, f"must be {wanted}, got {kind(value)}", where=where, help=help)


# How pandas writes a list of objects into a cell.
_PYTHON = re.compile(r"\s*[\[{][\s\[{]*'")


def parsed(value: Any, where: str) -> Any:
    """The value, read from JSON where it is text. Raises DataError for text that is no JSON."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return strict_json(value)
    except ValueError as error:
        pandas = (
            "this is how Python shows it: turn it into JSON with `json.dumps` before the table is written."
        )
        raise DataError(
            "bad-json",
            f"is text that is not JSON: {error}",
            where=where,
            help=pandas if _PYTHON.match(value) else "write it as JSON, or as an object.",
        ) from error
    except RecursionError as error:
        raise DataError("bad-json", "is nested too deep", where=where) from error


def listed(value: Any, where: str) -> Any:
    """A list of objects that `datasets` keeps as an object of lists; any other value as it is.

    Raises DataError for lists of different lengths.

    >>> listed({"role": ["user", "assistant"], "content": ["Hi", "Hello"], "name": None}, "")
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]
    """
    if not isinstance(value, dict):
        return value
    columns = {name: column for name, column in value.items() if column is not None}
    if not columns or not all(isinstance(column, list) for column in columns.values()):
        return value
    if len({len(column) for column in columns.values()}) > 1:
        lengths = ", ".join(
            f"`{str(name)[:40]}` {len(column)}" for name, column in list(columns.items())[:12]
        )
        raise DataError(
            "ragged-lists",
            f"is an object of lists that are not equally long: {lengths}",
            where=where,
            help="each list holds one value for each of the objects.",
        )
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


# Far more than any row needs; what is deeper is refused where it is read.
_DEEPEST = 64


def without_nulls(value: Any, depth: int = _DEEPEST) -> Any:
    """The value without the keys of objects that hold null: tables with one schema for all rows fill them in."""
    if depth and isinstance(value, dict):
        return {key: without_nulls(one, depth - 1) for key, one in value.items() if one is not None}
    if depth and isinstance(value, list):
        return [without_nulls(one, depth - 1) for one in value]
    return value


def count_nulls(value: Any) -> int:
    """How many keys of objects hold null, at every depth."""
    found, pending = 0, [value]
    while pending:
        one = pending.pop()
        is_object = type(one) is dict
        for inner in one.values() if is_object else one:
            if inner is None:
                found += is_object
            elif type(inner) is dict or type(inner) is list:
                pending.append(inner)
    return found


def renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row with our names for the file's; `columns` is ours -> theirs.

    A column of the file that has one of our names gives way to the one that the name is given to.

    >>> renamed({"question": "Hi", "answer": "Hello", "id": 3}, {"instruction": "question", "output": "answer"})
    {'id': 3, 'instruction': 'Hi', 'output': 'Hello'}
    """
    found = {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
    taken = {columns[ours] for ours in found}
    return {**{name: value for name, value in row.items() if name not in taken}, **found}


_ASKED = (
    *("question", "query", "prompt", "instructions", "problem", "user", "human", "input", "inputs", "q"),
    *("user_prompt", "user_message", "user_input", "input_text", "request", "task", "source", "src"),
)
_ANSWERED = (
    *("answer", "response", "completion", "outputs", "reply", "assistant", "gpt", "bot", "solution", "a"),
    *("target", "targets", "tgt", "generation", "model_output", "output_text", "answers", "responses"),
)
_TALKS = ("conversation", "dialogue", "dialog", "turns", "chat", "message", "messages_list")
# Our name for a column -> what other datasets call it, in the order in which it is looked for.
_OTHER_NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "messages": _TALKS,
        "conversations": _TALKS,
        "instruction": _ASKED,
        "output": _ANSWERED,
        "prompt": ("instruction", *_ASKED),
        "completion": ("output", *_ANSWERED),
        "input": ("context", "inputs"),
        "system": ("system_prompt", "system_message"),
        "chosen": (
            *("chosen_response", "response_chosen", "chosen_answer", "answer_chosen", "preferred", "better"),
            *("accepted", "winner", "good", "positive", "best"),
        ),
        "rejected": (
            *("rejected_response", "response_rejected", "rejected_answer", "answer_rejected", "worse"),
            *("dispreferred", "unpreferred", "non_preferred", "loser", "bad", "negative", "worst"),
        ),
        "label": ("desirable", "is_desirable", "is_good", "thumbs_up", "feedback", "verdict", "kto_tag"),
        "anchor": ("text1", "sentence_1", "text_a", "sentence_a", "premise", "source", "input", "prompt"),
        "positive": (
            *("text2", "sentence_2", "text_b", "sentence_b", "context", "response", "output", "target"),
            *("hypothesis", "completion"),
        ),
        "negative": ("text3", "sentence3", "sentence_3", "text_c", "sentence_c", "rejected"),
        "text": (
            *("content", "document", "article", "body", "story", "passage", "page_content", "raw_text"),
            *("raw_content", "transcription", "transcript", "sentence"),
        ),
        "audio": (
            "audio_path",
            "audio_filepath",
            "file",
            "file_name",
            "filename",
            "path",
            "sound",
            "wav",
            "clip",
        ),
    }
)
# The columns of a format that are looked for under other names, those that it needs and those besides.
_PROPOSED: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("messages", ("messages",), ("system",)),
    ("sharegpt", ("conversations",), ("system",)),
    ("preference", ("instruction", "chosen", "rejected"), ("input", "system")),
    ("unpaired-preference", ("instruction", "output", "label"), ("input", "system")),
    ("alpaca", ("instruction", "output"), ("input", "system")),
    ("prompt-completion", ("prompt", "completion"), ()),
    ("prompt", ("prompt",), ()),
    ("anchor-positive", ("anchor", "positive"), ("negative",)),
    ("transcript", ("audio", "text"), ()),
    ("text", ("text",), ()),
)


def proposed_columns(row: Mapping[str, Any], formats: Iterable[str]) -> dict[str, str]:
    """The mapping of our names to the row's with which it would fit one of the formats; empty where none is near.

    >>> proposed_columns({"Question": "1 + 1?", "answer": "2"}, ["messages", "alpaca"])
    {'instruction': 'Question', 'output': 'answer'}
    """
    known = set(formats)
    written = {_plain_name(name): name for name, value in reversed([*row.items()]) if value is not None}
    for format_, required, optional in _PROPOSED:
        if format_ not in known:
            continue
        found = _matched(required, written, row)
        if len(found) < len(required):
            continue
        left = {plain: name for plain, name in written.items() if name not in found.values()}
        found |= _matched(optional, left, row)
        return {ours: theirs for ours, theirs in found.items() if ours != theirs}
    return {}


def _matched(wanted: tuple[str, ...], written: Mapping[str, str], row: Mapping[str, Any]) -> dict[str, str]:
    """Our names with the row's column for each that it has, no column for two of them."""
    left, found = dict(written), {}
    # A name of ours in the row is not another one's.
    for ours in wanted:
        if ours in left:
            found[ours] = left.pop(ours)
    for ours in wanted:
        other = next((name for name in _OTHER_NAMES.get(ours, ()) if name in left), None)
        if ours not in found and other is not None and _may_be(ours, row[left[other]]):
            found[ours] = left.pop(other)
    return {ours: found[ours] for ours in wanted if ours in found}


def _may_be(ours: str, value: Any) -> bool:
    """Whether a value may stand under our name: turns are no text, and texts no turns."""
    if ours in ("messages", "conversations"):
        return isinstance(value, list | dict) or (isinstance(value, str) and value.lstrip()[:1] == "[")
    if ours in ("instruction", "output", "input", "system", "text", "anchor", "positive", "negative"):
        return isinstance(value, str)
    return True


def _plain_name(name: Any) -> str:
    return re.sub(r"[\s-]+", "_", str(name).strip().lower())


def columns_text(columns: Mapping[str, str]) -> str:
    """A mapping as YAML writes it on one line.

    >>> columns_text({"instruction": "question", "output": "the answer"})
    '{instruction: question, output: "the answer"}'
    """
    shown = {
        ours: theirs if re.fullmatch(r"[A-Za-z_]\w*", theirs) else json.dumps(theirs, ensure_ascii=False)
        for ours, theirs in columns.items()
    }
    return "{" + ", ".join(f"{ours}: {theirs}" for ours, theirs in shown.items()) + "}"
