"""A chat template: where it comes from, its turns and tools, and its rendering in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

from attrs import evolve, field, frozen

from soup_xb.core.disk import local_path
from soup_xb.core.errors import ConfigError, ModelError
from soup_xb.core.rows.examples import ChatExample, Message, ToolCall
from soup_xb.core.text import bytes_text
from soup_xb.data.rendering import RunawayError, renderer


@frozen
class ToolSpelling:
    """What a template asks of a call: its arguments as JSON text, or a null content where nothing is said.

    `thought` is the key under which it reads what an assistant thinks, empty for none.
    """

    arguments_as_text: bool = False
    null_content: bool = False
    thought: str = ""

    def turn(self, message: Message) -> dict[str, Any]:
        """A turn as a template reads it."""
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.thought and self.thought:
            turn[self.thought] = message.thought
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
    said = sum(len(message.content) + len(message.thought) for message in messages)
    return said + calls + sum(map(len, tools))


LARGEST_TEMPLATE = 256 * 1024
# What a template may write around the turns: a fixed part, and a multiple of what the turns hold.
_RENDERING_ROOM = 2**20
_RENDERING_GROWTH = 8


class RenderError(Exception):
    """The template refuses a conversation, in its own words; the caller knows which row it was.

    `kind` is the name of the exception that the template's code raised, `line` its line where one is known.
    """

    def __init__(self, message: str, kind: str = "", line: int | None = None) -> None:
        super().__init__(message or kind)
        self.kind = kind
        self.line = line


@frozen(eq=False)
class ChatTemplate:
    """A template with the special tokens that it may write, by name; `where` names it in errors.

    `spelling` is how it takes tool calls and thoughts, which `with_tools` and `with_thoughts` find out. `in_parts`: it
    is written for turns whose content is a list of parts, as a processor's is. `day` is the date that a clock in it
    tells, as YYYY-MM-DD.
    """

    text: str
    tokens: Mapping[str, str]
    where: str
    spelling: ToolSpelling = field(factory=ToolSpelling)
    in_parts: bool = False
    day: str = field(factory=lambda: date.today().isoformat())

    def render(
        self, messages: Sequence[Message], generation_prompt: bool = False, tools: Sequence[str] = ()
    ) -> str:
        """The conversation as text, with the head of an assistant turn after it where `generation_prompt` is set.

        `tools` are the functions that may be called, each as JSON text.

        Raises RenderError where the template refuses it or writes far more than the turns hold, and ModelError
        where it takes more time or memory than any template needs.
        """
        request = {
            "turns": [self._turn(message) for message in messages],
            "tools": [json.loads(tool) for tool in tools],
            "generation_prompt": generation_prompt,
            "room": _RENDERING_ROOM + _RENDERING_GROWTH * size(messages, tools),
            "tokens": dict(self.tokens),
            "day": self.day if self.is_dated else "",
        }
        try:
            answer = renderer().render(self.text, request)
        except RunawayError as error:
            raise ModelError(
                "runaway-chat-template",
                f"the chat template {error}",
                where=self.where,
                help="give another template as `data.chat_template`.",
            ) from error
        if "error" in answer:
            raise RenderError(answer["error"], answer["kind"], answer["line"])
        text: str = answer["text"]
        return text

    def _turn(self, message: Message) -> dict[str, Any]:
        turn = self.spelling.turn(message)
        if not self.in_parts:
            return turn
        parts = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": part.kind}
            for part in message.parts or (message.content,)
        ]
        return {**turn, "content": parts}

    @property
    def is_dated(self) -> bool:
        """Whether it may write the date, so that rows differ from one day to the next."""
        return "strftime_now" in self.text


def read_template(given: str) -> str:
    """The template that `data.chat_template` means: a text with Jinja marks as it is, otherwise a file.

    Raises ConfigError for a file that cannot be read.
    """
    if "{{" in given or "{%" in given:
        return given
    path = local_path(given)
    try:
        # One byte more than allowed is enough to know; the caller checks the length.
        with path.open("rb") as file:
            return file.read(LARGEST_TEMPLATE + 1).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError("chat-template-file", f"{path} is not UTF-8", where="data.chat_template") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            "chat-template-file",
            f"{given[:200]} cannot be read: {reason}",
            where="data.chat_template",
            help="give a Jinja template as text, or the path of a .jinja file.",
        ) from error


def own_template(tokenizer: Any, base: Path) -> str | None:
    """The template that the base brings, or None. Raises ModelError where it brings several and no default."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            raise ModelError(
                "no-default-chat-template",
                f"the base has the chat templates {', '.join(map(str, template))} and no default",
                where=str(base),
                help="give the one to use as `data.chat_template`.",
            )
        template = template["default"]
    if template is not None and not isinstance(template, str):
        raise ModelError("bad-chat-template", "the chat template must be text", where=str(base))
    return template or None


def check_template(template: ChatTemplate) -> None:
    """Raise ModelError for a template that is too large or is not Jinja, or that runs away."""
    try:
        size = len(template.text.encode())
    except UnicodeEncodeError as error:
        raise ModelError(
            "bad-chat-template", "the chat template holds half of a surrogate pair", where=template.where
        ) from error
    if size > LARGEST_TEMPLATE:
        raise ModelError(
            "chat-template-too-large",
            f"the chat template is larger than {bytes_text(LARGEST_TEMPLATE)}",
            where=template.where,
        )
    try:
        template.render([Message("user", "a")])
    except RenderError as error:
        # Any other failure may be about this conversation alone.
        if error.kind in ("TemplateSyntaxError", "TemplateAssertionError", "SyntaxError"):
            raise ModelError(
                "bad-chat-template",
                f"the chat template is not Jinja: line {error.line}: {error}",
                where=template.where,
            ) from error
        if error.kind == "RecursionError":
            raise ModelError(
                "bad-chat-template", "the chat template is nested too deep", where=template.where
            ) from error


# In the order of preference.
_SPELLINGS = (
    ToolSpelling(),
    ToolSpelling(arguments_as_text=True),
    ToolSpelling(null_content=True),
    ToolSpelling(arguments_as_text=True, null_content=True),
)
# Nine letters and digits: what Mistral's templates want of an id.
_ID = "probe0001"
_NAME, _KEY, _VALUE, _ANSWER = "find_qzxv", "qzkey", "qzvalue", "qzanswer"
_TOOL = json.dumps(
    {
        "type": "function",
        "function": {
            "name": _NAME,
            "description": "Find it.",
            "parameters": {
                "type": "object",
                "properties": {_KEY: {"type": "string", "description": "What to find."}},
                "required": [_KEY],
            },
        },
    }
)
_ASKED = Message("user", "Find it.")
_CALLED = (
    _ASKED,
    Message("assistant", "", (ToolCall(_NAME, json.dumps({_KEY: _VALUE}), _ID),)),
    Message("tool", _ANSWER, name=_NAME, call_id=_ID),
    Message("assistant", "There."),
)


@frozen
class _Found:
    """What a template shows of tools; `refusal` is what it said to the conversation with a call."""

    declares: bool
    answers: bool
    spelling: ToolSpelling | None
    refusal: str


def with_tools(template: ChatTemplate, example: ChatExample) -> ChatTemplate:
    """The template with the spelling of calls that it shows.

    Raises ModelError where it leaves out what the example holds of tools.
    """
    found = _probed(template)
    calls = any(message.calls for message in example.messages)
    left_out = [
        what
        for what, needed, shown in (
            ("the declared `tools`", bool(example.tools), found.declares),
            ("an assistant's `tool_calls`", calls, found.spelling is not None),
            ("what a tool answered", calls and _is_answered(example), found.answers),
        )
        if needed and not shown
    ]
    if left_out:
        said = f" (it says: {found.refusal})" if found.refusal else ""
        raise ModelError(
            "template-without-tools",
            f"the chat template does not show {' nor '.join(left_out)}{said}, which {example.source} holds",
            where=template.where,
            help="give a chat template that writes tools as `data.chat_template`, or take a base that was taught to "
            "call them.",
        )
    return evolve(
        template, spelling=evolve(found.spelling or ToolSpelling(), thought=template.spelling.thought)
    )


_THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")


def with_thoughts(template: ChatTemplate, where: str) -> ChatTemplate:
    """The template with the key under which it reads thoughts. Raises ModelError where it leaves them out."""
    key, keeps_content = _probed_thoughts(template)
    if key:
        return evolve(template, spelling=evolve(template.spelling, thought=key))
    written = (
        "write the thought into the content, between `<think>` and `</think>`, or " if keeps_content else ""
    )
    raise ModelError(
        "template-without-thoughts",
        f"the chat template does not show what an assistant thinks beside its content, which {where} holds",
        where=template.where,
        help=f"{written}give a chat template that writes `reasoning_content` as `data.chat_template`.",
    )


@lru_cache(maxsize=8)
def _probed_thoughts(template: ChatTemplate) -> tuple[str, bool]:
    """The first key whose thought is shown, and whether a thought that is part of the content is shown."""
    turn = Message("assistant", _ANSWER, thought=_VALUE)
    for key in _THOUGHT_KEYS:
        text, _ = _rendering(evolve(template, spelling=ToolSpelling(thought=key)), (_ASKED, turn), tools=())
        if _VALUE in text and _ANSWER in text:
            return key, True
    inside = Message("assistant", f"<think>\n{_VALUE}\n</think>\n\n{_ANSWER}")
    return "", _VALUE in _rendering(template, (_ASKED, inside), tools=())[0]


def _is_answered(example: ChatExample) -> bool:
    return any(message.role == "tool" for message in example.messages)


@lru_cache(maxsize=8)
def _probed(template: ChatTemplate) -> _Found:
    bare = _rendering(template, (_ASKED,), tools=())[0]
    declared, refusal = _rendering(template, (_ASKED,))
    spelling, answers = None, False
    for one in _SPELLINGS:
        text, refused = _rendering(evolve(template, spelling=one), _CALLED)
        if one is _SPELLINGS[0]:
            refusal = refusal or refused
        # The declaration names the function and its argument too, so the call counts where only it can stand.
        called = text[len(declared) :] if text.startswith(declared) else text
        if _shows_call(called):
            spelling, answers, refusal = one, _ANSWER in called, ""
            break
    return _Found(_NAME in declared and declared != bare, answers, spelling, refusal)


def _rendering(
    template: ChatTemplate, messages: tuple[Message, ...], tools: tuple[str, ...] = (_TOOL,)
) -> tuple[str, str]:
    """The text, or why the template refuses."""
    try:
        return template.render(messages, tools=tools), ""
    except RenderError as error:
        return "", str(error)


def _shows_call(text: str) -> bool:
    """Whether name, key and value of the call are there, and not as Python's or doubly quoted text."""
    if _NAME not in text or _VALUE not in text:
        return False
    return _KEY in text and f"'{_KEY}'" not in text and f'\\"{_KEY}' not in text
