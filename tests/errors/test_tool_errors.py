"""The error table, rows with tools: what can be wrong with `tools`, `tool_calls` and their neighbours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

USER = {"role": "user", "content": "Hello"}
FUNCTION = {"name": "look", "description": "Look.", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}
CHAT = {"messages": [USER, {"role": "assistant", "content": "Hello."}]}


def rows(row: dict[str, Any]) -> dict[str, Any]:
    """Writes a right row and then this one, and looks at the file."""

    def write(place: Path) -> None:
        text = "".join(json.dumps(one) + "\n" for one in (CHAT, row))
        (place / "a.jsonl").write_text(text, "utf-8")

    return {"arrange": write, "argv": "data a.jsonl", "exit": 3}


def tools(value: object) -> dict[str, Any]:
    """A row that declares this."""
    return rows({**CHAT, "tools": value})


def calls(value: object, **turn: object) -> dict[str, Any]:
    """A row whose assistant calls this."""
    return rows({"messages": [USER, {"role": "assistant", "content": "", "tool_calls": value, **turn}]})


def called(**function: object) -> dict[str, Any]:
    """A row with one call."""
    return calls([{"type": "function", "function": function}])


ROW = "a.jsonl:2: "
TOOLS = {
    "an object": {
        **tools(TOOL),
        "code": "mistyped-field",
        "where": f"{ROW}tools: ",
        "words": "a list of tools",
    },
    "text that is no JSON": {**tools("look()"), "code": "bad-json", "where": f"{ROW}tools: "},
    "a number in the list": {
        **tools([TOOL, 5]),
        "code": "mistyped-field",
        "where": f"{ROW}tools[1]: ",
        "help": '"type": "function"',
    },
    "another kind of tool": {
        **tools([{"type": "retrieval"}]),
        "code": "unknown-tool-type",
        "where": f"{ROW}tools[0].type: ",
        "words": "`retrieval`",
    },
    "nothing in the envelope": {
        **tools([{"type": "function"}]),
        "code": "missing-field",
        "where": f"{ROW}tools[0].function: ",
    },
    "no name": {
        **tools([{"type": "function", "function": {"description": "Look."}}]),
        "code": "missing-field",
        "where": f"{ROW}tools[0].function.name: ",
    },
    "an empty name": {**tools([{"name": " "}]), "code": "missing-field", "where": f"{ROW}tools[0].name: "},
    "a description that is a list": {
        **tools([{**FUNCTION, "description": []}]),
        "code": "mistyped-field",
        "where": f"{ROW}tools[0].description: ",
    },
    "parameters that are a list": {
        **tools([{**FUNCTION, "parameters": ["place"]}]),
        "code": "mistyped-field",
        "where": f"{ROW}tools[0].parameters: ",
        "words": "a JSON schema",
    },
    "a name twice": {
        **tools([TOOL, FUNCTION]),
        "code": "tool-twice",
        "where": f"{ROW}tools[1]: ",
        "words": "`look`",
    },
    "half a surrogate pair": {**tools([{**FUNCTION, "x": "\ud800"}]), "code": "broken-text"},
    "a schema 200 deep": {
        **tools([{**FUNCTION, "parameters": json.loads('{"a":' * 200 + "1" + "}" * 200)}]),
        "code": "bad-json",
        "words": "nested too deep",
    },
}

CALLS = {
    "an object": {**calls({"name": "look"}), "code": "mistyped-field", "words": "a list of calls"},
    "a number in the list": {
        **calls([1]),
        "code": "mistyped-field",
        "where": f"{ROW}messages[1].tool_calls[0]: ",
        "help": '"arguments"',
    },
    "no name": {
        **called(arguments={}),
        "code": "missing-field",
        "where": f"{ROW}messages[1].tool_calls[0].function.name: ",
    },
    "a name that is a number": {
        **called(name=3),
        "code": "mistyped-field",
        "where": f"{ROW}messages[1].tool_calls[0].function.name: ",
    },
    "arguments that are a list": {
        **called(name="look", arguments=[1]),
        "code": "mistyped-field",
        "where": f"{ROW}messages[1].tool_calls[0].function.arguments: ",
        "words": "got a list",
    },
    "arguments cut off": {
        **called(name="look", arguments='{"place": '),
        "code": "bad-json",
        "where": f"{ROW}messages[1].tool_calls[0].function.arguments: ",
    },
    "an id that is a number": {
        **calls([{"id": 7, "function": {"name": "look"}}]),
        "code": "mistyped-field",
        "where": f"{ROW}messages[1].tool_calls[0].id: ",
    },
    "the older key": {
        **rows(
            {"messages": [USER, {"role": "assistant", "content": None, "function_call": {"nam": "look"}}]}
        ),
        "code": "missing-field",
        "where": f"{ROW}messages[1].function_call.function: ",
    },
    "a call by the user": {
        **rows({"messages": [{**USER, "tool_calls": [{"name": "look"}]}]}),
        "code": "misplaced-call",
        "where": f"{ROW}messages[0]: ",
        "words": "an assistant turn",
    },
    "a call of what is not declared": {
        **rows(
            {
                "tools": [TOOL],
                "messages": [USER, {"role": "assistant", "tool_calls": [{"name": "lock", "arguments": {}}]}],
            }
        ),
        "code": "undeclared-tool",
        "where": f"{ROW}messages[1].tool_calls[0]: ",
        "words": "`lock`",
        "help": "did you mean `look`?",
    },
    "an answer's id that is a number": {
        **rows({"messages": [USER, {"role": "tool", "content": "x", "tool_call_id": 5}]}),
        "code": "mistyped-field",
        "where": f"{ROW}messages[1].tool_call_id: ",
    },
    "a call in words": {
        "arrange": lambda place: (place / "a.jsonl").write_text(
            '{"conversations": [{"from": "function_call", "value": "look()"}]}\n', "utf-8"
        ),
        "argv": "data a.jsonl",
        "exit": 3,
        "code": "bad-json",
        "where": "a.jsonl:1: conversations[0].value: ",
    },
}


def to_train_on(place: Path) -> None:
    row = {**CHAT, "tools": [TOOL]}
    (place / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(6)), "utf-8")


BASES = {
    f"{backend}, a base without tools in its chat template": {
        "arrange": to_train_on,
        "argv": f"train --backend {backend}",
        "exit": 4,
        "code": "template-without-tools",
        "words": ("the declared `tools`", "train.jsonl:1"),
        "help": "data.chat_template",
    }
    for backend in ("torch", "mlx")
}

ROWS: dict[str, Any] = {
    f"{table}: {name}": row
    for table, cases in {"tools": TOOLS, "calls": CALLS, "base": BASES}.items()
    for name, row in cases.items()
}


@pytest.mark.parametrize("name", ROWS)
def test_a_wrong_row_with_tools_is_answered_in_one_shape(name: str, check: Callable[[Any], Any]) -> None:
    check(ROWS[name])
