"""The turns of a conversation as a chat template is given them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from attrs import frozen

from soup_xb.core.rows.examples import Message, ToolCall


@frozen
class ToolSpelling:
    """What a template asks of a call: its arguments as JSON text, or a null content where nothing is said."""

    arguments_as_text: bool = False
    null_content: bool = False

    def turn(self, message: Message) -> dict[str, Any]:
        """A turn as a template reads it."""
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.calls:
            turn["tool_calls"] = [self._call(call) for call in message.calls]
            if self.null_content and not message.content:
                turn["content"] = None
        if message.role == "tool":
            turn |= {
                key: value
                for key, value in (("name", message.name), ("tool_call_id", message.call_id))
                if value
            }
        return turn

    def _call(self, call: ToolCall) -> dict[str, Any]:
        arguments = call.arguments if self.arguments_as_text else json.loads(call.arguments)
        told = {"id": call.id} if call.id else {}
        return {**told, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def size(messages: Sequence[Message], tools: Sequence[str]) -> int:
    """The characters that a conversation holds."""
    calls = sum(len(call.name) + len(call.arguments) for message in messages for call in message.calls)
    return sum(len(message.content) for message in messages) + calls + sum(map(len, tools))
