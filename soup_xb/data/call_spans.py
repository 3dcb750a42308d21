"""Where an assistant's turn that calls tools stands in the rendering.

What a call looks like is the template's affair, so a mark takes the place of the last call's arguments: what
follows it, up to the end of the turn, is the template's own and the same whatever the arguments are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from attrs import evolve, frozen

from soup_xb.core.rows.examples import Message
from soup_xb.data.chat_template import ChatTemplate


@frozen
class CallTurn:
    """The turn `index` of a conversation.

    `turn_end` is what ends a turn without calls, `mark` a character that is in no text.
    """

    messages: Sequence[Message]
    index: int
    template: ChatTemplate
    tools: Sequence[str]
    turn_end: str
    mark: str

    def span(self, text: str, prompt: str) -> tuple[int, int] | None:
        """From the generation prompt to the end of the turn; None where the rendering does not show it whole.

        Raises RenderError where the template refuses the marked conversation.
        """
        if not prompt or not text.startswith(prompt):
            return None
        after = self._after(len(self.messages))
        last = after if self.index + 1 == len(self.messages) else self._after(self.index + 1)
        if after is None or last is None:
            return None
        length = self._closing(last, after)
        closing, rest = after[:length], after[length:]
        end = len(text) - len(rest)
        # What stands between the arguments and the end of the turn may depend on them; the end itself does not.
        ends = self.turn_end if self.turn_end and closing.endswith(self.turn_end) else closing[-1:]
        if not closing or not text.endswith(ends + rest) or not self._is_whole(text[len(prompt) : end]):
            return None
        return len(prompt), end

    def _after(self, count: int) -> str | None:
        """What stands after the mark in the rendering of the first `count` turns."""
        turn = self.messages[self.index]
        *others, call = turn.calls
        marked = evolve(call, arguments=json.dumps({self.mark: self.mark}, ensure_ascii=False))
        turns = [*self.messages[:count]]
        turns[self.index] = evolve(turn, calls=(*others, marked))
        _, found, after = self.template.render(turns, tools=self.tools).rpartition(self.mark)
        return after if found else None

    def _closing(self, last: str, after: str) -> int:
        """How much of what stands `after` belongs to the turn; `last` is the same where the turn is the last one."""
        shared = next(
            (at for at, (a, b) in enumerate(zip(last, after, strict=False)) if a != b),
            min(len(last), len(after)),
        )
        if self.turn_end and self.turn_end in after[:shared]:
            return after.index(self.turn_end) + len(self.turn_end)
        return len(last.rstrip()) if shared >= len(last.rstrip()) else 0

    def _is_whole(self, shown: str) -> bool:
        """Whether the content is there, the name of each call in their order, and every text of its arguments."""
        turn, at = self.messages[self.index], 0
        for call in turn.calls:
            at = shown.find(call.name, at) + len(call.name)
            if at < len(call.name):
                return False
        if turn.content.strip() not in shown:
            return False
        texts = (text for call in turn.calls for text in _texts(json.loads(call.arguments)))
        return all(
            any(form in shown for form in (text, json.dumps(text, ensure_ascii=False)[1:-1]))
            for text in texts
        )


def _texts(value: Any) -> Iterator[str]:
    """The keys and texts in a JSON value."""
    if isinstance(value, str):
        yield value.strip()
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
