"""The turns of a conversation, as a row holds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from soup_xb.core.errors import DataError
from soup_xb.core.examples import Message, Source
from soup_xb.core.json_rows import kind
from soup_xb.core.suggest import did_you_mean

# The names that datasets give to a role -> the name that chat templates know.
ROLES: Mapping[str, str] = MappingProxyType(
    {
        "system": "system",
        "developer": "system",
        "user": "user",
        "human": "user",
        "assistant": "assistant",
        "gpt": "assistant",
        "chatgpt": "assistant",
        "model": "assistant",
        "tool": "tool",
        "function": "tool",
        "function_response": "tool",
        "observation": "tool",
        "ipython": "tool",
    }
)
# How a turn spells its role and its text.
_SPELLINGS = (("role", "content"), ("from", "value"))
# Keys of a turn that change what the model should learn; dropping them would train on something else.
_MEANINGFUL = (
    "tool_calls",
    "function_call",
    "reasoning_content",
    "reasoning",
    "thinking",
    "weight",
    "train",
    "loss",
)
_SAYS_NOTHING: tuple[Any, ...] = (None, "", [], {}, 1)


def read_turns(row: Mapping[str, Any], column: str, source: Source) -> tuple[Message, ...]:
    """The turns in a column: `{role, content}` or `{from, value}` each, content a text or a list of texts.

    Raises DataError naming the turn and the field.
    """
    turns = row[column]
    if not isinstance(turns, list):
        raise mistyped(f"{source}: {column}", "a list of turns", turns)
    return tuple(_turn(turn, f"{source}: {column}[{index}]") for index, turn in enumerate(turns))


def extra_turn_keys(row: Mapping[str, Any], column: str) -> Iterator[str]:
    """The keys of the turns that nothing is made of."""
    known = {key for spelling in _SPELLINGS for key in spelling} | set(_MEANINGFUL)
    for turn in row[column]:
        yield from (
            f"{column}[].{key}" for key, value in turn.items() if key not in known and value is not None
        )


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


def mistyped(where: str, wanted: str, value: Any) -> DataError:
    """The error of a value that is null or of another type."""
    code = "null-field" if value is None else "mistyped-field"
    return DataError(code, f"must be {wanted}, got {kind(value)}", where=where)


def _turn(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise mistyped(where, "an object", turn)
    role_key, text_key = next((keys for keys in _SPELLINGS if keys[0] in turn), _SPELLINGS[0])
    for key in _MEANINGFUL:
        if key in turn and turn[key] not in _SAYS_NOTHING:
            raise DataError(
                "unsupported-turn",
                f"`{key}` is not supported in a turn",
                where=where,
                help=f"put what should be learned into `{text_key}`, or remove the row.",
            )
    written = read_text(turn, role_key, f"{where}.")
    role = ROLES.get(written)
    if role is None:
        raise DataError(
            "unknown-role",
            f"`{written[:50]}` is not a known role",
            where=f"{where}.{role_key}",
            help=did_you_mean(written.lower()[:50], ROLES) or f"known roles: {', '.join(ROLES)}.",
        )
    return Message(role, _content(turn, text_key, where))


def _content(turn: Mapping[str, Any], key: str, where: str) -> str:
    parts = turn.get(key)
    if not isinstance(parts, list):
        return read_text(turn, key, f"{where}.")
    return "".join(_part(part, f"{where}.{key}[{index}]") for index, part in enumerate(parts))


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict):
        raise mistyped(where, 'an object such as {"type": "text", "text": …}', part)
    if part.get("type") != "text":
        raise DataError(
            "unsupported-content",
            f"is a part of type `{str(part.get('type'))[:50]}`; only text can be trained on",
            where=where,
        )
    return read_text(part, "text", f"{where}.")
