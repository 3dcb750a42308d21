"""Which characters of a rendered conversation the model learns to write.

A chat template is a program, so the answer comes from rendering, never from knowing the template. The turns
before an assistant turn, rendered with the generation prompt, show where the model begins to write. Mostly the
turns up to it, rendered alone, go on from there, and the whole rendering from them in turn: what was added is
the turn. Where an earlier turn is written otherwise than a last one, two more renderings tell:

- all turns, with a mark in place of this turn's content: what stands before the content and after it;
- the turns up to it, with the mark: which part of what stands after belongs to this turn.

A turn that calls tools is found in its own way; see soup_xb.data.call_spans.

A turn that the template does not show word for word (Qwen3 leaves the thoughts of earlier turns out) is not
trained on: what is shown is not what the data says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence

from attrs import frozen

from soup_xb.core.rows.examples import ChatExample, Message
from soup_xb.data.call_spans import CallTurn
from soup_xb.data.chat_template import ChatTemplate, RenderError
from soup_xb.data.tools import with_tools

# A private-use character: no template strips, escapes or splits at it.
_MARK = "\uf8f5"

Span = tuple[int, int]


@frozen
class Markup:
    """A text with the spans of characters to learn, in order and apart from each other.

    `rewritten` counts assistant turns that the template does not show word for word, `hidden` the other turns
    that it does not show. `reason` says why there are no spans.
    """

    text: str
    spans: tuple[Span, ...]
    rewritten: int = 0
    hidden: int = 0
    reason: str = ""


class EndTokens:
    """The tokens that can end a turn: every added token of the tokenizer, found as text."""

    def __init__(self, tokens: Iterable[str]) -> None:
        longest_first = sorted({token for token in tokens if token.strip()}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def first(self, text: str) -> re.Match[str] | None:
        """The first such token in a text."""
        return self._pattern.search(text)


def mark_assistant_turns(
    example: ChatExample, template: ChatTemplate, ends: EndTokens, turn_end: str = ""
) -> Markup:
    """Render a conversation and find what the assistant wrote in it; `turn_end` is the function's of that name.

    Raises RenderError where it is refused, ModelError where the template leaves out its tools.
    """
    messages = example.messages
    turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
    turns = [index for index in turns if index >= example.first_trained]
    if not turns:
        return Markup("", (), reason="no assistant turn")
    filled = [index for index in turns if messages[index].content.strip() or messages[index].calls]
    if not filled:
        return Markup("", (), reason="every assistant turn is empty")
    if example.uses_tools:
        template = with_tools(template, example)
    text = template.render(messages, tools=example.tools)
    found = [_Turn(messages, index, template, example.tools, turn_end).span(text, ends) for index in filled]
    spans = tuple(span for span in found if span is not None)
    return Markup(
        text,
        spans,
        rewritten=len(found) - len(spans),
        hidden=sum(message.role != "assistant" and not _stands_in(text, message) for message in messages),
        reason="" if spans else "the chat template does not show what the assistant says",
    )


def _stands_in(text: str, message: Message) -> bool:
    """Whether the content is shown; templates may write what a tool answered as a JSON text."""
    content = message.content.strip()
    if all(piece.strip() in text for piece in message.texts):
        return True
    return message.role == "tool" and json.dumps(content, ensure_ascii=False)[1:-1] in text


def turn_end(template: ChatTemplate, ends: EndTokens) -> str | None:
    """What the template writes at the end of an assistant turn, empty for nothing, None where it cannot be told."""
    conversation = [Message("user", "a"), Message("assistant", _MARK)]
    try:
        _, tail = _around_mark(template.render(conversation))
    except (RenderError, _UnmarkedError):
        return None
    return tail[: _end_of_turn(tail, ends, whole=True)].lstrip()


class _UnmarkedError(Exception):
    """The mark is not in the rendering once."""


@frozen
class _Turn:
    """One assistant turn of a conversation."""

    messages: Sequence[Message]
    index: int
    template: ChatTemplate
    tools: Sequence[str]
    turn_end: str

    def span(self, text: str, ends: EndTokens) -> Span | None:
        """Where the turn stands in the whole rendering, from the generation prompt to its end token."""
        try:
            prompt = self.template.render(self.messages[: self.index], True, self.tools)
        except RenderError:
            # Some templates refuse a conversation that the assistant opens, or that a system turn alone precedes.
            prompt = ""
        try:
            if self.messages[self.index].calls:
                turn = CallTurn(
                    self.messages, self.index, self.template, self.tools, self.turn_end, mark=_MARK
                )
                return turn.span(text, prompt)
            return self._added(text, prompt, ends) or self._marked(text, prompt, ends)
        except (RenderError, _UnmarkedError):
            return None

    def _rendered(self, messages: Sequence[Message]) -> str:
        return self.template.render(messages, tools=self.tools)

    def _added(self, text: str, prompt: str, ends: EndTokens) -> Span | None:
        """The span where prompt, turn and the whole are each the beginning of the next."""
        count = self.index + 1
        shown = text if count == len(self.messages) else self._rendered(self.messages[:count])
        if not prompt or not shown.startswith(prompt) or not text.startswith(shown):
            return None
        content = self.messages[self.index].content.strip()
        begin = len(prompt) + len(shown[len(prompt) :]) - len(shown[len(prompt) :].lstrip())
        if not shown.startswith(content, begin):
            return None
        end = begin + len(content)
        return len(prompt), end + _end_of_turn(shown[end:], ends, whole=True)

    def _marked(self, text: str, prompt: str, ends: EndTokens) -> Span | None:
        """The span by what stands around a mark, from the prompt's end, else from where the content begins."""
        before, after = tail = self._around(len(self.messages))
        if self.index + 1 < len(self.messages):
            tail = self._around(self.index + 1)
        if prompt and text.startswith(prompt):
            start = len(prompt)
        elif text.startswith(before):
            start = len(before)
        else:
            return None
        end = len(text) - len(after)
        if start >= end or not text.endswith(after) or not self._is_shown(text[:end], before, start):
            return None
        shared = _common_prefix(tail[1], after)
        return start, end + _end_of_turn(shared, ends, whole=shared == tail[1])

    def _around(self, count: int) -> tuple[str, str]:
        """What stands before and after this turn's content in the rendering of the first `count` turns."""
        marked = [*self.messages[: self.index], Message("assistant", _MARK)]
        return _around_mark(self._rendered([*marked, *self.messages[self.index + 1 : count]]))

    def _is_shown(self, text: str, before: str, start: int) -> bool:
        """Whether a text that ends with the turn's content shows it word for word; white space may differ."""
        content = _squeezed(self.messages[self.index].content)
        if text.startswith(before):
            return _squeezed(text[len(before) :]) == content
        # What stands before the content depends on the content (thoughts, say).
        return _squeezed(text[start:]).endswith(content)


def _around_mark(text: str) -> tuple[str, str]:
    parts = text.split(_MARK)
    if len(parts) != 2:
        raise _UnmarkedError
    return parts[0], parts[1]


def _end_of_turn(tail: str, ends: EndTokens, whole: bool) -> int:
    """How much of what follows the content belongs to the turn.

    Up to its first end token; a template that writes its marks in ordinary words is followed to the last of
    them, if the tail is `whole`: a part of it may end in the middle of a word.
    """
    token = ends.first(tail)
    if token is not None:
        return token.end()
    return len(tail.rstrip()) if whole else 0


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _common_prefix(one: str, other: str) -> str:
    length = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))
    return one[: min(length, len(other))]
