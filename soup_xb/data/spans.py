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

What a row says must not open or end a turn. Where content spells such a token, a mark goes into the middle of it
before the rendering; the text is cut where the mark comes out, and a token never reaches across a cut.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain, pairwise
from typing import Any

import numpy as np
from attrs import evolve, field, frozen

from soup_xb.core.errors import DataError
from soup_xb.core.rows.examples import ChatExample, Message
from soup_xb.data.chat_template import ChatTemplate, RenderError, with_thoughts, with_tools

# A private-use character: no template strips, escapes or splits at it.
_MARK = "\uf8f5"
# Marks for the middle of a spelled token: the first that the row does not hold.
_CUTS = "\uf8f6\uf8f7\uf8f8\uf8f9\uf8fa\uf8fb\uf8fc\uf8fd"

Span = tuple[int, int]


@frozen
class Markup:
    """A text with the spans of characters to learn, in order and apart from each other.

    `rewritten` counts assistant turns that the template does not show word for word, `hidden` the other turns
    that it does not show. `reason` says why there are no spans.
    `literals` are control tokens that content spells: each is read as the text that it is. `spelled` says whether
    content held any. `where` names the row in errors. `weights` are what the spans count for, empty for 1 each.
    `reshaped` counts answers that the template writes otherwise than it would as the last turn. `cut_by` names the
    template where it cuts the thoughts out of answers, which are `rewritten` then. `forged` says whether content holds
    a mark of a turn that the template writes in ordinary words.
    """

    text: str
    spans: tuple[Span, ...]
    rewritten: int = 0
    hidden: int = 0
    reason: str = ""
    literals: tuple[Span, ...] = ()
    spelled: bool = False
    where: str = ""
    weights: tuple[float, ...] = ()
    reshaped: int = 0
    cut_by: str = ""
    forged: bool = False


class EndTokens:
    """Tokens found as text, such as those that can end a turn: every added token of the tokenizer."""

    def __init__(self, tokens: Iterable[str]) -> None:
        longest_first = sorted({token for token in tokens if token.strip()}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def first(self, text: str) -> re.Match[str] | None:
        """The first such token in a text."""
        return self._pattern.search(text)

    def at(self, text: str, place: int) -> re.Match[str] | None:
        """The token that begins at a place of a text."""
        return self._pattern.match(text, place)

    def all(self, text: str) -> set[str]:
        """Every such token in a text."""
        return set(self._pattern.findall(text))

    def last(self, text: str) -> str:
        """The token that a text ends with, white space aside; empty for none."""
        found = [match for match in self._pattern.finditer(text) if not text[match.end() :].strip()]
        return found[0].group() if found else ""

    def split(self, text: str) -> list[str]:
        """What stands between such tokens, and before and behind them."""
        return self._pattern.split(text)

    def divided(self, text: str, mark: str) -> str:
        """The text with a mark behind the first character of every such token."""
        return self._pattern.sub(lambda match: match[0][:1] + mark + match[0][1:], text)


@frozen(eq=False)
class ControlTokens:
    """The tokens that open or end a turn or a text, which content must not be.

    `in_prompts` are those that no user, system or tool may write, every special token among them; `in_answers` those
    that an answer may not hold in its middle: marks of thoughts and of calls are not among them. `ids` are of all.
    """

    in_prompts: EndTokens = field(factory=lambda: EndTokens(()))
    in_answers: EndTokens = field(factory=lambda: EndTokens(()))
    ids: frozenset[int] = frozenset()

    def spelled(self, messages: Sequence[Message], tools: Sequence[str] = ()) -> bool:
        """Whether content spells one."""
        for message in messages:
            first = self._of(message).first
            for text in _contents(message):
                if text and first(text):
                    return True
        return any(map(self.in_prompts.first, tools))

    def divided(self, message: Message, mark: str, ended: bool) -> Message:
        """The turn with a mark in every token that it spells.

        Where the template ends turns by itself (`ended`), the end token behind an answer is left to it; else it stays.
        """
        tokens = self._of(message)
        words, end = message.content, ""
        if message.role == "assistant" and (last := self.in_answers.last(words)):
            words = words.rstrip().removesuffix(last)
            end = "" if ended else last
        calls = tuple(
            evolve(call, name=tokens.divided(call.name, mark), arguments=tokens.divided(call.arguments, mark))
            for call in message.calls
        )
        parts = tuple(tokens.divided(part, mark) if isinstance(part, str) else part for part in message.parts)
        return evolve(
            message,
            content=tokens.divided(words, mark) + end,
            calls=calls,
            parts=parts,
            name=tokens.divided(message.name, mark),
            thought=tokens.divided(message.thought, mark),
        )

    def _of(self, message: Message) -> EndTokens:
        return self.in_answers if message.role == "assistant" else self.in_prompts


@frozen
class PlainMarks:
    """Marks of turns that a template writes in ordinary words: `[INST]`, `USER:`, a `<|user|>` that is no token.

    No tokens tell them from content that spells them, so such rows are counted. Those `on_lines` begin a line.
    """

    anywhere: frozenset[str] = frozenset()
    on_lines: frozenset[str] = frozenset()
    _pattern: re.Pattern[str] | None = field(init=False, repr=False, eq=False)

    @_pattern.default
    def _words(self) -> re.Pattern[str] | None:
        # A word does not begin inside another: `Superuser:` is not `user:`.
        free = [(r"(?<!\w)" if mark[0].isalnum() else "") + re.escape(mark) for mark in sorted(self.anywhere)]
        bound = [r"(?:\A|\n)[ \t]*" + re.escape(mark) for mark in sorted(self.on_lines)]
        return re.compile("|".join((*free, *bound))) if free or bound else None

    def first(self, text: str) -> str:
        """The first of them in a text, empty for none."""
        found = None if self._pattern is None else self._pattern.search(text)
        return found[0].strip() if found else ""

    def spelled(self, messages: Sequence[Message], tools: Sequence[str] = ()) -> bool:
        """Whether content spells one."""
        if self._pattern is None:
            return False
        return any(map(self.first, (*(text for message in messages for text in _contents(message)), *tools)))


def _contents(message: Message) -> Iterator[str]:
    """Every text of a turn that comes from the row."""
    yield from (message.content, message.name, message.thought)
    yield from (part for part in message.parts if isinstance(part, str))
    for call in message.calls:
        yield from (call.name, call.arguments)


@frozen
class Divided:
    """A conversation in which every control token that content spells is divided by `mark`, empty where none is."""

    messages: tuple[Message, ...]
    tools: tuple[str, ...]
    mark: str

    @classmethod
    def of(
        cls, messages: Sequence[Message], tools: Sequence[str], controls: ControlTokens, ended: bool
    ) -> Divided:
        """`ended` says whether the template ends an assistant's turn.

        Raises RenderError for a row that leaves no character for a mark.
        """
        if not controls.spelled(messages, tools):
            return cls(tuple(messages), tuple(tools), "")
        held = "".join([*(text for message in messages for text in _contents(message)), *tools])
        mark = next((one for one in _CUTS if one not in held), "")
        if not mark:
            raise RenderError(
                "it spells control tokens and holds every private-use character that could tell them"
            )
        turns = tuple(controls.divided(message, mark, ended) for message in messages)
        declared = tuple(controls.in_prompts.divided(tool, mark) for tool in tools)
        changed = (turns, declared) != (tuple(messages), tuple(tools))
        return cls(turns, declared, mark if changed else "")

    def joined(self, markup: Markup, controls: ControlTokens) -> Markup:
        """What was rendered of it, without the marks: where they stood, a token is spelled."""
        if not self.mark:
            return markup
        marks = [at for at, letter in enumerate(markup.text) if letter == self.mark]
        text = markup.text.replace(self.mark, "")
        literals = []
        for count, mark in enumerate(marks):
            start = mark - count - 1
            token = controls.in_prompts.at(text, start)
            literals.append((start, token.end() if token else start + 2))
        spans = tuple(
            (start - bisect_left(marks, start), end - bisect_left(marks, end)) for start, end in markup.spans
        )
        return evolve(markup, text=text, spans=spans, literals=tuple(literals), spelled=bool(marks))


def mark_assistant_turns(
    example: ChatExample,
    template: ChatTemplate,
    ends: EndTokens,
    turn_end: str = "",
    rules: MarkRules | None = None,
) -> Markup:
    """Render a conversation and find what the assistant wrote in it; `turn_end` is the function's of that name.

    Raises RenderError where it is refused, ModelError where the template leaves out its tools or thoughts.
    """
    rules = rules or MarkRules()
    controls, forged = rules.controls, rules.plain.spelled(example.messages, example.tools)
    divided = Divided.of(example.messages, example.tools, controls, bool(turn_end))
    if divided.mark:
        example = evolve(example, messages=divided.messages, tools=divided.tools)
    if any(message.thought for message in example.messages):
        template = with_thoughts(template, str(example.source))
    if example.uses_tools:
        template = with_tools(template, example)
    marked = _marked_whole if rules.train_on == "all" else _marked_turns
    found = divided.joined(marked(example, template, (ends, turn_end), rules.train_on), controls)
    return evolve(found, forged=forged, where=str(example.source))


@frozen
class MarkRules:
    """Which tokens content must not become, which marks are counted, and what is trained on (`data.train_on`)."""

    controls: ControlTokens = field(factory=ControlTokens)
    train_on: str = "answers"
    plain: PlainMarks = field(factory=PlainMarks)


# The tokens that can end a turn, and what the template writes there.
_Ends = tuple[EndTokens, str]


def _marked_turns(example: ChatExample, template: ChatTemplate, ends: _Ends, train_on: str) -> Markup:
    messages = example.messages
    turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
    turns = [index for index in turns if index >= example.first_trained]
    if not turns:
        return Markup("", (), reason="no assistant turn")
    filled = [index for index in turns if _says_something(messages[index])]
    if not filled:
        return Markup("", (), reason="every assistant turn is empty")
    asked = [index for index in filled[-1:] if train_on == "last"] or filled
    asked = [index for index in asked if messages[index].weight > 0]
    if not asked:
        return Markup("", (), reason="every assistant turn has the weight 0")
    text = template.render(messages, tools=example.tools)
    found = {
        index: _Turn(messages, index, template, example.tools, ends[1]).found(text, ends[0])
        for index in asked
    }
    shown = {index: one for index, one in found.items() if one is not None}
    cut = any(one is None and _THOUGHT_END in messages[index].content for index, one in found.items())
    weights = tuple(messages[index].weight for index in shown)
    return Markup(
        text,
        tuple(one.span for one in shown.values()),
        rewritten=len(found) - len(shown),
        hidden=_hidden(text, messages),
        reason="" if shown else _not_shown(template.where if cut else ""),
        weights=weights if any(weight != 1 for weight in weights) else (),
        reshaped=sum(one.reshaped for one in shown.values()),
        cut_by=template.where if cut else "",
    )


def _marked_whole(example: ChatExample, template: ChatTemplate, ends: _Ends, _train_on: str) -> Markup:
    """Every character, what the template writes included; turns that have a weight of their own by that."""
    messages = example.messages
    text = template.render(messages, tools=example.tools)
    weighted: dict[Span, float] = {}
    for index, message in enumerate(messages):
        if message.weight != 1 and _says_something(message):
            found = _Turn(messages, index, template, example.tools, ends[1]).found(text, ends[0])
            weighted |= {found.span: message.weight} if found is not None else {}
    inner = [0, *(at for span in weighted for at in span), len(text)]
    between = {(start, end): 1.0 for start, end in zip(inner[::2], inner[1::2], strict=True) if start < end}
    spans = {span: weight for span, weight in sorted({**weighted, **between}.items()) if weight}
    return Markup(
        text,
        tuple(spans),
        hidden=_hidden(text, messages),
        reason="" if spans else "there is no turn in it",
        weights=tuple(spans.values()) if weighted else (),
    )


_THOUGHT_END = "</think>"


def _says_something(message: Message) -> bool:
    return bool(message.content.strip() or message.calls or message.thought.strip())


def _hidden(text: str, messages: Sequence[Message]) -> int:
    return sum(message.role != "assistant" and not _stands_in(text, message) for message in messages)


def _not_shown(cut_by: str) -> str:
    if not cut_by:
        return "the chat template does not show what the assistant says"
    return (
        f"the chat template of {cut_by} does not show what stands before `{_THOUGHT_END}`: give one that keeps it as "
        "`data.chat_template`"
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


# Conversations that show what the template writes around turns; some templates refuse one or the other.
_SHOWN = (
    (Message("user", _MARK),),
    (Message("user", _MARK), Message("assistant", _MARK), Message("user", _MARK)),
    (
        Message("system", _MARK),
        Message("user", _MARK),
        Message("assistant", _MARK),
        Message("user", _MARK),
    ),
)


def turn_marks(template: ChatTemplate, ends: EndTokens) -> tuple[set[str], PlainMarks]:
    """What the template writes around turns and as the head of an answer: added tokens, and marks that are words."""
    found: set[str] = set()
    anywhere, on_lines = set[str](), set[str]()
    for messages in _SHOWN:
        with suppress(RenderError):
            text = template.render(messages, generation_prompt=True)
            found |= ends.all(text)
            for between in text.split(_MARK):
                pieces = ends.split(between)
                anywhere |= {mark for piece in pieces for mark in _BRACKETED.findall(piece)}
                for mark, begins in _headings(pieces):
                    (on_lines if begins else anywhere).add(mark)
    return found, PlainMarks(frozenset(anywhere), frozenset(on_lines - anywhere))


# `<|user|>`, `<<SYS>>`, `[INST]`, `[/INST]`: names in brackets.
_BRACKETED = re.compile(r"<{1,2}[^<>\s]{1,40}>{1,2}|\[/?[A-Z_]{2,40}\]")
# `### Instruction:`, `USER:`: what a line ends with, or a heading.
_HEADING = re.compile(r"#+ ?\w[^\n]*|[^\s.!?:,;][^\n.!?:]{0,40}:\Z")


def _headings(pieces: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Headings in the lines next to a turn's content, and whether they begin a line.

    `pieces` are what stands between two contents, cut at tokens. What follows a token closely is no mark without it.
    """
    for piece in (pieces[0], pieces[-1]):
        lines = [line for line in piece.splitlines() if line.strip()]
        for line in (*lines[:1], *lines[-1:]):
            found = _HEADING.search(line.rstrip())
            if found is None or _BRACKETED.search(line):
                continue
            if piece is pieces[0] or not piece.startswith(found[0]):
                yield found[0], not line[: found.start()].strip() and not line[:1].isspace()


def writes_head_itself(template: ChatTemplate) -> bool:
    """Whether the head of an answer is no generation prompt: the model has to write it, and learns it."""
    try:
        user = Message("user", "a")
        asked, prompt = (template.render([user], generation_prompt=wanted) for wanted in (False, True))
        before, _ = _around_mark(template.render([user, Message("assistant", _MARK)]))
    except (RenderError, _UnmarkedError):
        return False
    return asked == prompt and before.startswith(prompt) and bool(before[len(prompt) :].strip())


class _UnmarkedError(Exception):
    """The mark is not in the rendering once."""


@frozen
class _Found:
    """Where a turn stands, and whether it has another form than it would have as the last turn."""

    span: Span
    reshaped: bool = False


@frozen
class _Turn:
    """One assistant turn of a conversation."""

    messages: Sequence[Message]
    index: int
    template: ChatTemplate
    tools: Sequence[str]
    turn_end: str

    def found(self, text: str, ends: EndTokens) -> _Found | None:
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
                return turn.found(text, prompt)
            return self._added(text, prompt, ends) or self._marked(text, prompt, ends)
        except (RenderError, _UnmarkedError):
            return None

    def _rendered(self, messages: Sequence[Message]) -> str:
        return self.template.render(messages, tools=self.tools)

    def _added(self, text: str, prompt: str, ends: EndTokens) -> _Found | None:
        """The span where prompt, turn and the whole are each the beginning of the next."""
        count = self.index + 1
        shown = text if count == len(self.messages) else self._rendered(self.messages[:count])
        if not prompt or not shown.startswith(prompt) or not text.startswith(shown):
            return None
        content = self.messages[self.index].content.strip()
        begin = len(prompt) + len(shown[len(prompt) :]) - len(shown[len(prompt) :].lstrip())
        if not shown.startswith(content, begin):
            return None
        if self.messages[self.index].thought:
            return None
        end = begin + len(content)
        return _Found((len(prompt), end + _end_of_turn(shown[end:], ends, whole=True)))

    def _marked(self, text: str, prompt: str, ends: EndTokens) -> _Found | None:
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
        if _squeezed(self.messages[self.index].thought) not in _squeezed(text[start:end]):
            return None
        shared = _common_prefix(tail[1], after)
        span = start, end + _end_of_turn(shared, ends, whole=shared == tail[1])
        other_end = not after.startswith(tail[1][: _end_of_turn(tail[1], ends, whole=True)])
        other_start = tail[0][:start] == before[:start] and tail[0][start:] != before[start:]
        return _Found(span, reshaped=other_start or other_end)

    def _around(self, count: int) -> tuple[str, str]:
        """What stands before and after this turn's content in the rendering of the first `count` turns."""
        thought = self.messages[self.index].thought
        marked = [*self.messages[: self.index], Message("assistant", _MARK, thought=thought)]
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

    def found(self, text: str, prompt: str) -> _Found | None:
        """From the generation prompt to the end of the turn; None where the rendering does not show it whole.

        Raises RenderError where the template refuses the marked conversation.
        """
        if not prompt or not text.startswith(prompt):
            return None
        around = self._around(len(self.messages))
        tail = around if self.index + 1 == len(self.messages) else self._around(self.index + 1)
        if around is None or tail is None:
            return None
        (before, after), (last_before, last) = around, tail
        length = self._closing(last, after)
        closing, rest = after[:length], after[length:]
        end = len(text) - len(rest)
        # What stands between the arguments and the end of the turn may depend on them; the end itself does not.
        ends = self.turn_end if self.turn_end and closing.endswith(self.turn_end) else closing[-1:]
        if not closing or not text.endswith(ends + rest) or not self._is_whole(text[len(prompt) : end]):
            return None
        return _Found((len(prompt), end), reshaped=last_before.startswith(prompt) and last_before != before)

    def _around(self, count: int) -> tuple[str, str] | None:
        """What stands before and after the mark in the rendering of the first `count` turns."""
        turn = self.messages[self.index]
        *others, call = turn.calls
        marked = evolve(call, arguments=json.dumps({self.mark: self.mark}, ensure_ascii=False))
        turns = [*self.messages[:count]]
        turns[self.index] = evolve(turn, calls=(*others, marked))
        before, found, after = self.template.render(turns, tools=self.tools).rpartition(self.mark)
        return (before, after) if found else None

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
        if turn.content.strip() not in shown or _squeezed(turn.thought) not in _squeezed(shown):
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
    `controls` are the ids that content must not become.
    """

    engine: Any
    controls: frozenset[int] = frozenset()

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

        Where spans have weights, it is what each token counts for, float32, 0 for one that is not trained.

        A token is trained if it lies inside a span; white space that it takes from beyond the end does not
        count. Where a token would cross the beginning of a span, the text is cut there, as it is when the model
        goes on writing after a prompt.
        """
        rows = []
        for markup, encoding in zip(markups, self._encode([markup.text for markup in markups]), strict=True):
            offsets = _offsets(encoding)
            if markup.literals or _crossed(offsets, markup.spans):
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
        cuts = (start + 1 for start, _ in markup.literals)
        borders = sorted({0, *(start for start, _ in markup.spans), *cuts, len(markup.text)})
        ids: list[int] = []
        trained: list[Array] = []
        for left, right in pairwise(borders):
            here = [at for at, (s, e) in enumerate(markup.spans) if s < right and e > left]
            spans = tuple(
                (max(markup.spans[at][0], left) - left, min(markup.spans[at][1], right) - left) for at in here
            )
            weights = tuple(markup.weights[at] for at in here) if markup.weights else ()
            piece = Markup(markup.text[left:right], spans, weights=weights)
            piece_ids, offsets = self._continuation(piece.text) if left else self._beginning(piece.text)
            self._check_spelled(piece_ids, offsets + left, markup)
            ids += piece_ids
            trained.append(_inside(offsets, piece))
        return np.array(ids, dtype=np.int32), np.concatenate(trained)

    def _check_spelled(self, ids: Sequence[int], offsets: Array, markup: Markup) -> None:
        """Raise DataError where a control token is left that content spells: it is one letter, or holds another."""
        controls = [at for at, token in enumerate(ids) if token in self.controls] if markup.literals else []
        for start, end in (offsets[at] for at in controls):
            if any(first <= start and end <= last for first, last in markup.literals):
                raise DataError(
                    "control-token",
                    f"`{markup.text[start:end]}` in its content is a token that opens or ends a turn or a text, and "
                    "cannot be read as anything else",
                    where=markup.where,
                    help="write it otherwise, or remove the row.",
                )

    def _beginning(self, text: str) -> tuple[list[int], Array]:
        encoding = self._encode([text])[0]
        return encoding.ids, _offsets(encoding)

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


def _offsets(encoding: Any) -> Array:
    """Where each token begins and ends in the text, int64 (tokens, 2)."""
    pairs = encoding.offsets
    return np.fromiter(chain.from_iterable(pairs), np.int64, 2 * len(pairs)).reshape(-1, 2)


def _crossed(offsets: Array, spans: Sequence[Span]) -> bool:
    """Whether a token begins before a span and ends inside it."""
    return any(bool(((offsets[:, 0] < start) & (offsets[:, 1] > start)).any()) for start, _ in spans)


def _inside(offsets: Array, markup: Markup) -> Array:
    counts: Array = np.zeros(len(offsets), dtype=np.float32 if markup.weights else np.bool_)
    text = markup.text
    for at, (start, end) in enumerate(markup.spans):
        # A token may take white space from beyond the end: `<|end|>` of Phi-3 takes the line break.
        reach = end
        while reach < len(text) and text[reach].isspace():
            reach += 1
        inside = (offsets[:, 0] >= start) & (offsets[:, 0] < end) & (offsets[:, 1] <= reach)
        counts[inside] = markup.weights[at] if markup.weights else True
    return counts
