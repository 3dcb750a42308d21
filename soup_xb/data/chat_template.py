"""A chat template: where it comes from, how large it may be, and its rendering in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import field, frozen

from soup_xb.core.disk import local_path
from soup_xb.core.errors import ConfigError, ModelError
from soup_xb.core.rows.examples import Message
from soup_xb.core.text import bytes_text
from soup_xb.data.rendering import RENDERER, RunawayError
from soup_xb.data.tool_spelling import ToolSpelling, size

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

    `spelling` is how it takes tool calls, which `tool_template` finds out. `in_parts`: it is written for turns
    whose content is a list of parts, as a processor's is.
    """

    text: str
    tokens: Mapping[str, str]
    where: str
    spelling: ToolSpelling = field(factory=ToolSpelling)
    in_parts: bool = False

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
        }
        try:
            answer = RENDERER.render(self.text, request)
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
        """Whether it writes the date of the day, so that rows differ from one day to the next."""
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
