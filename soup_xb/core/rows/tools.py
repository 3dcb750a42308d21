"""Tools and their calls, as a row holds them: read into one form, whatever the dataset's spelling.

Objects may be written as JSON text, as tables and older datasets do; of those that are not, keys with a null are left
out. A function may stand in OpenAI's envelope (`{"type": "function", "function": {…}}`) or by itself.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from attrs import evolve

from soup_xb.core.errors import DataError
from soup_xb.core.rows.examples import Message, Source, ToolCall
from soup_xb.core.rows.fields import (
    checked_text,
    count_nulls,
    listed,
    mistyped,
    parsed,
    read_text,
    without_nulls,
)
from soup_xb.core.text import did_you_mean

_ONE_TOOL = (
    'a tool is {"type": "function", "function": {"name": "…", "description": "…", "parameters": {…}}}.'
)
_ONE_CALL = 'a call is {"type": "function", "function": {"name": "…", "arguments": {…}}}.'
# Far more than a schema needs, far less than what Python's JSON writer gives up at.
_DEEPEST = 64
_CALLS = ("tool_calls", "function_call")


def read_tools(row: Mapping[str, Any], source: Source) -> tuple[str, ...]:
    """The functions in the column `tools`, each as the JSON text of a chat template's tool; () where there are none.

    Raises DataError naming the field.
    """
    if row.get("tools") is None:
        return ()
    where = f"{source}: tools"
    written = _objects(row["tools"], where)
    if written in (None, "", []):
        return ()
    if not isinstance(written, list):
        raise mistyped(where, "a list of tools", written, _ONE_TOOL)
    tools = [_tool(tool, f"{where}[{index}]") for index, tool in enumerate(written)]
    names = [tool["function"]["name"] for tool in tools]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise DataError(
                "tool-twice",
                f"`{name[:50]}` is declared twice",
                where=f"{where}[{index}]",
                help="keep one of the two.",
            )
    return tuple(_text(tool, f"{where}[{index}]") for index, tool in enumerate(tools))


def read_calls(turn: Mapping[str, Any], role: str, where: str) -> tuple[ToolCall, ...]:
    """The calls under `tool_calls`, or the one under the older `function_call`. Raises DataError naming the field."""
    for key in _CALLS:
        if turn.get(key) is None:
            continue
        written = _objects(turn[key], f"{where}.{key}")
        if written in (None, "", [], {}):
            continue
        if role != "assistant":
            raise DataError(
                "misplaced-call", f"`{key}` belongs to an assistant turn; this is `{role}`", where=where
            )
        return written_calls(written, f"{where}.{key}", single=key == "function_call")
    return ()


def written_calls(written: Any, where: str, single: bool = False) -> tuple[ToolCall, ...]:
    """Calls in a list, or with `single` one call by itself. Raises DataError naming the field."""
    if single:
        return (_call(written, where),)
    if not isinstance(written, list):
        raise mistyped(where, "a list of calls", written, _ONE_CALL)
    return tuple(_call(call, f"{where}[{index}]") for index, call in enumerate(written))


def read_said_calls(text: str, where: str) -> tuple[ToolCall, ...]:
    """The calls of a sharegpt turn `function_call`: JSON text of one call or a list. Raises DataError."""
    written = parsed(text, where)
    return written_calls(written, where, single=not isinstance(written, list))


def check_declared(turns: Sequence[Message], tools: Sequence[str], where: str) -> None:
    """Raise DataError where tools are declared and a turn calls another one."""
    declared = [json.loads(tool)["function"]["name"] for tool in tools]
    for index, turn in enumerate(turns):
        for number, call in enumerate(turn.calls):
            if declared and call.name not in declared:
                raise DataError(
                    "undeclared-tool",
                    f"`{call.name[:50]}` is called, and `tools` does not declare it",
                    where=f"{where}[{index}].tool_calls[{number}]",
                    help=did_you_mean(call.name[:50], declared)
                    or f"declared: {', '.join(name[:50] for name in declared[:12])}.",
                )


_NINE = re.compile(r"[A-Za-z0-9]{9}")


def with_ids(turns: Sequence[Message], nine: bool) -> tuple[Message, ...]:
    """The turns with an id for every call that has none, and the same for its answer; a function of the turns alone.

    With `nine` an id that is not nine letters or digits is another one, too: the same for the same.

    >>> called, answer = with_ids([Message("assistant", "", (ToolCall("now", "{}", "call_7"),)),
    ...                            Message("tool", "noon", call_id="call_7")], nine=True)
    >>> called.calls[0].id == answer.call_id, len(answer.call_id)
    (True, 9)
    """
    done, waiting = [], list[tuple[str, ToolCall]]()
    for place, turn in enumerate(turns):
        if turn.calls:
            ids = [_id(call.id, f"{place}.{number}", nine) for number, call in enumerate(turn.calls)]
            waiting = list(zip(ids, turn.calls, strict=True))
            calls = tuple(evolve(call, id=given) for given, call in waiting)
            turn = evolve(turn, calls=calls)
        elif turn.role == "tool":
            known = turn.call_id or turn.name
            nameless = [one for one in waiting if not (turn.call_id and one[1].id)]
            named = [one for one in waiting if known and known in (one[1].id, one[1].name)]
            answered = next(iter([*named, *nameless]), None)
            if answered is not None:
                waiting.remove(answered)
            given = _id(turn.call_id, str(place), nine) if answered is None else answered[0]
            turn = evolve(turn, call_id=given)
        done.append(turn)
    return tuple(done)


def _id(written: str, place: str, nine: bool) -> str:
    if written and not (nine and not _NINE.fullmatch(written)):
        return written
    return hashlib.sha256(f"{'id' if written else 'place'} {written or place}".encode()).hexdigest()[:9]


def _objects(value: Any, where: str) -> Any:
    """What stands under a key for tools or calls: text as JSON word for word, else without the nulls of a table."""
    if isinstance(value, str):
        return parsed(value, where)
    if isinstance(value, list | dict) and count_nulls(value):
        value = without_nulls(value)
    return listed(value, where)


def _tool(tool: Any, where: str) -> dict[str, Any]:
    function, where = _function(tool, where, _ONE_TOOL)
    name = _name(function, where)
    if function.get("description") is not None:
        read_text(function, "description", f"{where}.")
    parameters = parsed(function.get("parameters"), f"{where}.parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise mistyped(f"{where}.parameters", "a JSON schema (an object)", parameters)
    declared = {**function, "name": name}
    return {
        "type": "function",
        "function": declared if parameters is None else {**declared, "parameters": parameters},
    }


def _call(call: Any, where: str) -> ToolCall:
    call_id = call.get("id") if isinstance(call, dict) else None
    if call_id is not None and not isinstance(call_id, str):
        raise mistyped(f"{where}.id", "text", call_id)
    function, where = _function(call, where, _ONE_CALL)
    arguments = parsed(function.get("arguments"), f"{where}.arguments")
    if arguments in (None, ""):
        arguments = {}
    if not isinstance(arguments, dict):
        raise mistyped(f"{where}.arguments", "an object, or the JSON text of one", arguments)
    return ToolCall(_name(function, where), _text(arguments, f"{where}.arguments"), call_id or "")


def _function(value: Any, where: str, help: str) -> tuple[dict[str, Any], str]:
    """What is inside OpenAI's envelope, or the object itself, and where it stands."""
    value = parsed(value, where)
    if not isinstance(value, dict):
        raise mistyped(where, "an object", value, help)
    value = {key: one for key, one in value.items() if one is not None}
    kind = value.get("type")
    if "function" not in value and "name" in value:
        return value, where
    if kind not in (None, "function"):
        raise DataError(
            "unknown-tool-type",
            f"`{str(kind)[:50]}` is not a kind that is known",
            where=f"{where}.type",
            help=help,
        )
    if "function" not in value:
        raise DataError("missing-field", "is missing", where=f"{where}.function", help=help)
    function = parsed(value["function"], f"{where}.function")
    if not isinstance(function, dict):
        raise mistyped(f"{where}.function", "an object", function, help)
    return function, f"{where}.function"


def _name(function: Mapping[str, Any], where: str) -> str:
    name = read_text(function, "name", f"{where}.")
    if not name.strip():
        raise DataError("missing-field", "is empty", where=f"{where}.name")
    return name


def _text(value: Any, where: str) -> str:
    if _deeper(value, _DEEPEST):
        raise DataError("bad-json", "is nested too deep", where=where)
    return checked_text(json.dumps(value, ensure_ascii=False), where)


def _deeper(value: Any, depth: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth < 0 or any(_deeper(one, depth - 1) for one in inner)
