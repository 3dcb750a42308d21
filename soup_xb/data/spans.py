"""Which characters of a rendered conversation the model learns to write, and which tokens those are.

A chat template is a program, so the answer comes from rendering, never from knowing the template. The turns
before an assistant turn, rendered with the generation prompt, show where the model begins to write. Mostly the
turns up to it, rendered alone, go on from there, and the whole rendering from them in turn: what was added is
the turn. If an earlier turn is written otherwise than a last one, two more renderings tell:

- all turns, with a mark in place of this turn's content: what stands before the content and after it;
- the turns up to it, with the mark: which part of what stands after belongs to this turn.

What a call of a tool looks like is the template's affair, so a mark takes the place of the last call's arguments:
what follows it, up to the end of the turn, is the template's own and the same whatever the arguments are.

A turn that the template does not show word for word (Qwen3 leaves the thoughts of earlier turns out) is not
trained on: what is shown is not what the data says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from attrs import evolve, frozen

from soup_xb.core.errors import DataError
from soup_xb.core.rows.examples import ChatExample, Message
from soup_xb.data.chat_template import ChatTemplate, RenderError, with_tools

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


# The tokenizers library works on many texts at once, on all cores; more would only hold memory.
BATCH = 512
_HEADS = ("\n", "0")
Array = np.ndarray[Any, Any]


@frozen(eq=False)
class Encoder:
    """A copy of the tokenizer's engine without its post-processor.

    The post-processor would add tokens that the chat template has written already, and move the offsets of
    tokens that begin or end with white space. Padding and truncation that a tokenizer.json may ask for are off.
    """

    engine: Any

    @classmethod
    def of(cls, tokenizer: Any) -> Encoder:
        """The engine of a transformers tokenizer, copied."""
        from tokenizers import Tokenizer

        engine = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        engine.post_processor = None
        engine.no_padding()
        engine.no_truncation()
        return cls(engine)

    def ids(self, text: str) -> list[int]:
        """The ids of one text, nothing added. Raises DataError for text that is not Unicode."""
        ids: list[int] = self._encode([text])[0].ids
        return ids

    def encode(self, markups: Sequence[Markup]) -> list[tuple[Array, Array]]:
        """For each text its token ids, int32 (length,), and which are trained, bool (length,).

        A token is trained if it lies inside a span; white space that it takes from beyond the end does not
        count. Where a token would cross the beginning of a span, the text is cut there, as it is when the model
        goes on writing after a prompt.
        """
        rows = []
        for markup, encoding in zip(markups, self._encode([markup.text for markup in markups]), strict=True):
            offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
            if _crossed(offsets, markup.spans):
                rows.append(self._in_pieces(markup))
            else:
                ids = np.array(encoding.ids, dtype=np.int32)
                rows.append((ids, _inside(offsets, markup)))
        return rows

    def _encode(self, texts: list[str]) -> list[Any]:
        try:
            encodings: list[Any] = self.engine.encode_batch(texts, add_special_tokens=False)
        except TypeError as error:
            raise DataError(
                "broken-text", "holds half of a surrogate pair", help="write it as UTF-8."
            ) from error
        return encodings

    def _in_pieces(self, markup: Markup) -> tuple[Array, Array]:
        borders = sorted({0, *(start for start, _ in markup.spans), len(markup.text)})
        ids: list[int] = []
        trained: list[Array] = []
        for left, right in pairwise(borders):
            spans = tuple((s - left, e - left) for s, e in markup.spans if left <= s < right)
            piece = Markup(markup.text[left:right], spans)
            piece_ids, offsets = self._continuation(piece.text) if left else self._beginning(piece.text)
            ids += piece_ids
            trained.append(_inside(offsets, piece))
        return np.array(ids, dtype=np.int32), np.concatenate(trained)

    def _beginning(self, text: str) -> tuple[list[int], Array]:
        encoding = self._encode([text])[0]
        return encoding.ids, np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)

    def _continuation(self, text: str) -> tuple[list[int], Array]:
        """The tokens of a text that goes on: encoded after a character, which is taken off again.

        SentencePiece models put a space before the first word of a text; inside a text they do not. A second
        character is tried where the first one joins what follows into one token.
        """
        for head in _HEADS:
            head_ids = self.ids(head)
            ids, offsets = self._beginning(head + text)
            count = len(head_ids)
            if ids[:count] == head_ids and len(ids) > count and offsets[count, 0] >= len(head):
                return ids[count:], offsets[count:] - len(head)
        return self._beginning(text)


def _crossed(offsets: Array, spans: Sequence[Span]) -> bool:
    """Whether a token begins before a span and ends inside it."""
    return any(bool(((offsets[:, 0] < start) & (offsets[:, 1] > start)).any()) for start, _ in spans)


def _inside(offsets: Array, markup: Markup) -> Array:
    trained = np.zeros(len(offsets), dtype=np.bool_)
    text = markup.text
    for start, end in markup.spans:
        # A token may take white space from beyond the end: `<|end|>` of Phi-3 takes the line break.
        reach = end
        while reach < len(text) and text[reach].isspace():
            reach += 1
        trained |= (offsets[:, 0] >= start) & (offsets[:, 0] < end) & (offsets[:, 1] <= reach)
    return trained
