"""The turns of a conversation, as a row holds them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from attrs import evolve

from soup_xb.core.errors import DataError
from soup_xb.core.rows.examples import Message, Source, ToolCall
from soup_xb.core.rows.fields import checked_text, listed, mistyped, parsed, read_text
from soup_xb.core.rows.files import strict_json
from soup_xb.core.rows.tools import read_calls, read_said_calls
from soup_xb.core.text import did_you_mean

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
        "tool_response": "tool",
        "function_call": "assistant",
        "tool_call": "assistant",
    }
)
# Roles whose text is not said but calls tools, as sharegpt rows write it.
_CALLING = ("function_call", "tool_call")
# How a turn spells its role and its text.
_SPELLINGS = (("role", "content"), ("from", "value"))
# Keys of a turn that say what an assistant thinks before its words, and what its tokens count for in the loss.
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_WEIGHTS = ("weight", "loss_weight", "train", "loss")
_LARGEST_WEIGHT = 1e6
_OF_TOOLS = ("tool_calls", "function_call", "tool_call_id")
_USED = frozenset((*_THOUGHTS, *_WEIGHTS, *_OF_TOOLS, *(key for spelling in _SPELLINGS for key in spelling)))
_SAYS_NOTHING: tuple[Any, ...] = (None, "", [], {})


def read_turns(row: Mapping[str, Any], column: str, source: Source) -> tuple[Message, ...]:
    """The turns in a column: `{role, content}` or `{from, value}` each, content a text or a list of texts.

    An assistant's turn may hold tool calls, and a tool's what it answered. Raises DataError naming the turn and the
    field.
    """
    turns, where = row[column], f"{source}: {column}"
    if not isinstance(turns, list):
        turns = written_turns(turns, where)
    if not isinstance(turns, list):
        raise mistyped(where, "a list of turns", turns)
    return _with_names([read_turn(turn, f"{where}[{index}]") for index, turn in enumerate(turns)])


def written_turns(value: Any, where: str, may_be_text: bool = False) -> Any:
    """The list of turns that a value is another spelling of: its JSON text, or an object of lists.

    With `may_be_text` the value may be a plain text as well, which stays one, or a turn by itself. Raises DataError for
    text that stands for turns and is no JSON.
    """
    if isinstance(value, dict):
        value = listed(value, where)
        return (
            [value] if may_be_text and isinstance(value, dict) and _is_turn(value, any_role=True) else value
        )
    if not isinstance(value, str) or value[:1] not in ("[", "{", " ", "\n", "\t", "\r"):
        return value
    if value.lstrip()[:1] not in ("[", "{"):
        return value
    if not may_be_text or _is_python(value):
        return listed(parsed(value, where), where)
    return _turns_in(value, where)


def _is_python(text: str) -> bool:
    """Whether a text is a list of turns as Python shows it, which no answer is."""
    keys = (f"'{key}': " for pair in _SPELLINGS for key in pair)
    return text.lstrip().startswith("[{'") and sum(key in text for key in keys) > 1


def _turns_in(text: str, where: str) -> Any:
    """The turns of a JSON text; a text that is none, or whose objects are no turns, as it is."""
    if not any(f'"{role}"' in text for role, _ in _SPELLINGS):
        return text
    try:
        found = listed(strict_json(text), where)
    except (ValueError, RecursionError, DataError):
        return text
    turns = [found] if isinstance(found, dict) else found
    return turns if isinstance(turns, list) and all(map(_is_turn, turns)) else text


def _is_turn(value: Any, any_role: bool = False) -> bool:
    return isinstance(value, dict) and any(
        isinstance(value.get(role), str)
        and (any_role or value[role] in ROLES)
        and (text in value or "tool_calls" in value)
        for role, text in _SPELLINGS
    )


def extra_turn_keys(row: Mapping[str, Any], column: str) -> Iterator[str]:
    """The keys of the turns that nothing is made of."""
    for turn in row[column]:
        if turn.keys() <= _USED:
            continue
        role = ROLES.get(turn.get("role") or turn.get("from"))
        for key, value in turn.items():
            if key not in _USED and value is not None and not (key == "name" and role == "tool"):
                yield f"{column}[].{key}"


def read_turn(turn: Any, where: str) -> Message:
    """One turn. Raises DataError naming the field, `where` being the turn's place."""
    if not isinstance(turn, dict):
        raise mistyped(where, "an object", turn)
    # Of a table's turns with the keys of both, one has nulls.
    is_sharegpt = turn.get("role") is None and turn.get("from") is not None
    role_key, text_key = _SPELLINGS[is_sharegpt]
    written = read_text(turn, role_key, f"{where}.")
    role = ROLES.get(written)
    if role is None:
        raise DataError(
            "unknown-role",
            f"`{written[:50]}` is not a known role",
            where=f"{where}.{role_key}",
            help=did_you_mean(written.lower()[:50], ROLES) or f"known roles: {', '.join(ROLES)}.",
        )
    if written in _CALLING:
        said = read_text(turn, text_key, f"{where}.")
        calls = read_said_calls(said, f"{where}.{text_key}")
        thought, weight = _thought(turn, role, where), _weight(turn, role, where)
        return Message(role, "", calls=calls, thought=thought, weight=weight)
    calls, thought, weight = (
        read_calls(turn, role, where),
        _thought(turn, role, where),
        _weight(turn, role, where),
    )
    if role == "assistant" and isinstance(turn.get(text_key), list):
        turn, thought = _without_thoughts(turn, text_key, where, thought)
    content = _content(turn, text_key, where, calls=bool(calls), free=role == "tool")
    if role != "tool":
        content = _said_once(content, thought, f"{where}.{text_key}") if thought else content
        return Message(role, content, calls, thought=thought, weight=weight)
    name, call_id = (_optional(turn, key, where) for key in ("name", "tool_call_id"))
    return Message(role, content, name=name, call_id=call_id)


def _with_names(turns: Sequence[Message]) -> tuple[Message, ...]:
    """The turns, each tool's with the name of the function that it answers for.

    That is the call of its id, else the next one of the assistant's turn before.
    """
    named, waiting = [], list[ToolCall]()
    for turn in turns:
        if turn.role == "assistant":
            waiting = list(turn.calls)
        elif turn.role == "tool" and waiting:
            by_id = next((call for call in waiting if call.id and call.id == turn.call_id), waiting[0])
            waiting.remove(by_id)
            turn = evolve(turn, name=turn.name or by_id.name)
        named.append(turn)
    return tuple(named)


def _thought(turn: Mapping[str, Any], role: str, where: str) -> str:
    """What an assistant thinks before its words, under any of its names. Raises DataError naming the key."""
    found: dict[str, str] = {}
    for key in _THOUGHTS:
        value = turn.get(key)
        if value in _SAYS_NOTHING or is_nan(value):
            continue
        thought = _content(turn, key, where, calls=False, free=False)
        if thought.strip():
            found[key] = thought
    if not found:
        return ""
    key, thought = next(iter(found.items()))
    if role != "assistant":
        raise DataError(
            "misplaced-thought",
            f"`{key}` is for an assistant's turn; this is `{role}`",
            where=where,
            help="move it to the assistant's turn, or remove it.",
        )
    if len(set(found.values())) > 1:
        raise _two_values(found, where)
    return thought


def _without_thoughts(
    turn: Mapping[str, Any], key: str, where: str, thought: str
) -> tuple[Mapping[str, Any], str]:
    """The turn without the parts of its content that are thoughts, and what it thinks."""
    thoughts, said = list[str](), list[Any]()
    for index, part in enumerate(turn[key]):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _THOUGHTS:
            said.append(part)
            continue
        inner = next((name for name in (kind, "text", "content") if part.get(name) is not None), "")
        if inner:
            thoughts.append(_content(part, inner, f"{where}.{key}[{index}]", calls=False, free=False))
    if not thoughts:
        return {**turn, key: said}, thought
    inside = "".join(thoughts)
    if thought.strip() and thought.strip() != inside.strip():
        raise _two_values(dict.fromkeys((key, "thinking")), where)
    return {**turn, key: said}, inside


def _said_once(content: str, thought: str, where: str) -> str:
    """The content without a thought that stands in front of it too. Raises DataError where that is another one."""
    if not content.lstrip().startswith("<think>"):
        return content
    inside, end, said = content.lstrip().removeprefix("<think>").partition("</think>")
    if not end:
        return content
    if inside.strip() not in ("", thought.strip()):
        raise DataError(
            "contradicting-keys",
            "begins with another thought than the one beside it",
            where=where,
            help="keep one of them.",
        )
    return said.lstrip("\n")


def _weight(turn: Mapping[str, Any], role: str, where: str) -> float:
    """What a turn's tokens count for in the loss, under any of its names; 1 where it tells none."""
    found = {key: _as_weight(turn[key], f"{where}.{key}") for key in _WEIGHTS if key in turn}
    known = {key: weight for key, weight in found.items() if weight is not None}
    if len(set(known.values())) > 1:
        raise _two_values(known, where)
    key, weight = next(iter(known.items()), ("", 1.0))
    if role == "assistant":
        return weight
    if key and weight:
        raise DataError(
            "weighted-prompt",
            f"`{key}` asks to train on a turn of the role {role}, and only an assistant's turns are trained on",
            where=where,
            help=f"set `{key}` to 0 or remove it; `data.train_on: all` trains on every token of every turn.",
        )
    return 1.0


def _as_weight(value: Any, where: str) -> float | None:
    """A number of 0 or more, or a yes or no; None for null and for the NaN that tables write for it."""
    if value is None or is_nan(value):
        return None
    if not isinstance(value, bool | int | float):
        raise mistyped(where, "a number, true or false", value)
    if not 0 <= value <= _LARGEST_WEIGHT:
        raise DataError(
            "weight-range",
            f"must be from 0 to {_LARGEST_WEIGHT:,.0f}, got {value:g}",
            where=where,
            help="0 keeps the turn out of the loss, 1 is what every other token counts for.",
        )
    return float(value)


def is_nan(value: Any) -> bool:
    """Whether it is a float that is no number."""
    return isinstance(value, float) and value != value


def _two_values(found: Mapping[str, Any], where: str) -> DataError:
    names = " and ".join(f"`{key}`" for key in found)
    return DataError(
        "contradicting-keys", f"{names} do not say the same", where=where, help="keep one of them."
    )


def _optional(turn: Mapping[str, Any], key: str, where: str) -> str:
    return "" if turn.get(key) is None else read_text(turn, key, f"{where}.")


def _content(turn: Mapping[str, Any], key: str, where: str, calls: bool, free: bool) -> str:
    """The text of a turn; it may be missing beside `calls`, and any JSON where it is `free`."""
    content = turn.get(key)
    if content is None and calls:
        return ""
    if free and isinstance(content, dict):
        return checked_text(json.dumps(content, ensure_ascii=False), f"{where}.{key}")
    if isinstance(content, dict):
        content = listed(content, f"{where}.{key}")
    if not isinstance(content, list):
        return read_text(turn, key, f"{where}.")
    return "".join(_part(part, f"{where}.{key}[{index}]") for index, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict):
        raise mistyped(where, 'an object such as {"type": "text", "text": …}', part)
    if part.get("type") != "text":
        raise DataError(
            "unsupported-content",
            f"is a part of type `{str(part.get('type'))[:50]}`; only text can be trained on",
            where=where,
            help="pictures are for `task: vision`, sounds for `task: audio`.",
        )
    return read_text(part, "text", f"{where}.")
