"""How rows with pictures or sounds are written: turns with parts, LLaVA's marks in the text, and transcripts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from attrs import evolve

from soup_xb.core.errors import DataError
from soup_xb.core.rows.examples import Attachment, ChatExample, CompletionExample, Message, Source
from soup_xb.core.rows.fields import listed, mistyped, parsed, read_text
from soup_xb.core.rows.formats.detect import Format, with_system
from soup_xb.core.rows.turns import read_turn

Parts = tuple[str | Attachment, ...]

_NOUNS = {"image": "image", "audio": "sound"}
# LLaVA and its kin write this where a picture stands, most with a line break beside it.
_MARKS = {"image": re.compile(r"\n?<image>\n?"), "audio": re.compile(r"\n?<audio>\n?")}


def media_formats(kind: str) -> Mapping[str, Format]:
    """Every format of rows that hold files of a kind, image or audio."""
    columns = ("system", kind, f"{kind}s")
    known = {
        "messages": Format(("messages",), _conversation("messages", kind), columns, ("messages",)),
        "sharegpt": Format(
            ("conversations",), _conversation("conversations", kind), columns, ("conversations",)
        ),
    }
    transcript = Format(("audio", "text"), _read_transcript, ("language",))
    return MappingProxyType({"transcript": transcript, **known})


def _read_transcript(row: Mapping[str, Any], source: Source) -> CompletionExample:
    where = f"{source}: "
    language = read_text(row, "language", where) if row.get("language") is not None else ""
    sound = _attachment(row["audio"], "audio", f"{where}audio")
    return CompletionExample("", read_text(row, "text", where), source, (sound,), language)


def _conversation(column: str, kind: str) -> Callable[[Mapping[str, Any], Source], ChatExample]:
    def read(row: Mapping[str, Any], source: Source) -> ChatExample:
        turns = row[column]
        if not isinstance(turns, list):
            raise mistyped(f"{source}: {column}", "a list of turns", turns)
        waiting = iter(named := _named(row, kind, source))
        messages = [
            _turn(turn, kind, waiting, f"{source}: {column}[{index}]") for index, turn in enumerate(turns)
        ]
        left = sum(1 for _ in waiting)
        if left:
            raise DataError(
                "unplaced-file",
                f"names {_counted(len(named), kind)} and its turns have a place for {len(named) - left}",
                where=str(source),
                help=f"write `<{kind}>` in a turn's text, or a part of type `{kind}`, once for each.",
            )
        return ChatExample(with_system(row, messages, source), source)

    return read


def _counted(count: int, kind: str) -> str:
    return f"{count} {_NOUNS[kind]}{'s' * (count != 1)}"


def _named(row: Mapping[str, Any], kind: str, source: Source) -> list[Attachment]:
    """What the columns `image` and `images` (or `audio` and `audios`) name, in order."""
    found: list[Attachment] = []
    for column in (kind, f"{kind}s"):
        value, where = row.get(column), f"{source}: {column}"
        if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
            value = parsed(value, where)
        value = listed(value, where)
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        found += [_attachment(one, kind, where) for one in values]
    return found


def _turn(turn: Any, kind: str, waiting: Iterator[Attachment], where: str) -> Message:
    key = "content" if isinstance(turn, dict) and turn.get("role") is not None else "value"
    written = listed(turn.get(key), f"{where}.{key}") if isinstance(turn, dict) else None
    if isinstance(written, list):
        places = enumerate(written)
        parts = tuple(_part(part, kind, waiting, f"{where}.{key}[{index}]") for index, part in places)
        message = read_turn({**turn, key: ""}, where)
    else:
        message = read_turn(turn, where)
        parts = tuple(_marked(message.content, kind, waiting, where))
    message = evolve(message, content="".join(part for part in parts if isinstance(part, str)), parts=parts)
    if message.role == "assistant" and message.attachments:
        raise DataError(
            "file-in-answer",
            f"an assistant's turn holds a place for {_NOUNS[kind]} data; only its words can be learned",
            where=where,
            help=f"show the {_NOUNS[kind]} in the turn before it.",
        )
    return message


def _marked(text: str, kind: str, waiting: Iterator[Attachment], where: str) -> Iterator[str | Attachment]:
    """A text in pieces around its marks, the line break beside a mark left to the chat template."""
    for index, piece in enumerate(_MARKS[kind].split(text)):
        if index:
            yield _next(waiting, kind, where)
        if piece:
            yield piece


def _part(part: Any, kind: str, waiting: Iterator[Attachment], where: str) -> str | Attachment:
    if not isinstance(part, dict):
        raise mistyped(where, 'an object such as {"type": "text", "text": …}', part)
    if part.get("type") == "text":
        return read_text(part, "text", f"{where}.")
    if part.get("type") not in (kind, f"{kind}_url", f"input_{kind}"):
        raise DataError(
            "unsupported-content",
            f"is a part of type `{str(part.get('type'))[:50]}`; this task reads `text` and `{kind}`",
            where=where,
        )
    for key in (kind, "path", "url", f"{kind}_url", "file"):
        if part.get(key) is not None:
            return _attachment(part[key], kind, f"{where}.{key}")
    return _next(waiting, kind, where)


def _next(waiting: Iterator[Attachment], kind: str, where: str) -> Attachment:
    found = next(waiting, None)
    if found is None:
        raise DataError(
            "missing-file",
            f"has a place for {_NOUNS[kind]} data that the row names no file for",
            where=where,
            help=f'name the file in the part ({{"type": "{kind}", "path": "…"}}), or all of them in the '
            f"column `{kind}s`.",
        )
    return found


def _attachment(value: Any, kind: str, where: str) -> Attachment:
    """The file that a value names: a path, or an object with a `path` or `url` as datasets write it."""
    if isinstance(value, dict):
        value = next((value[key] for key in ("path", "url") if value.get(key) is not None), None)
    if not isinstance(value, str) or not value:
        raise mistyped(where, "the path of a file", value)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", value):
        raise DataError(
            "file-is-url",
            "is no path: nothing is fetched while training",
            where=where,
            help="download it beside the data file and write its path, relative to that file's folder.",
        )
    return Attachment(kind, value)
