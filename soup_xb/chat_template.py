"""A chat template: where it comes from, how large it may be, and its rendering in transformers' sandbox."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from attrs import frozen

from soup_xb.core.errors import ConfigError, ModelError
from soup_xb.core.examples import Message
from soup_xb.core.units import bytes_text

LARGEST_TEMPLATE = 256 * 1024
# What a template may write around the turns: a fixed part, and a multiple of what the turns hold.
_RENDERING_ROOM = 2**20
_RENDERING_GROWTH = 8
# What the code in a template can raise, besides Jinja's own errors.
_TEMPLATE_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


class RenderError(Exception):
    """The template refuses a conversation, in its own words; the caller knows which row it was."""


@frozen(eq=False)
class ChatTemplate:
    """A template bound to the tokenizer whose special tokens it writes."""

    text: str
    tokenizer: Any

    def render(self, messages: Sequence[Message], generation_prompt: bool = False) -> str:
        """The conversation as text, with the head of an assistant turn after it where `generation_prompt` is set.

        Raises RenderError where the template refuses it or writes far more than the turns hold.
        """
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text: str = self.tokenizer.apply_chat_template(
                turns,
                chat_template=self.text,
                add_generation_prompt=generation_prompt,
                continue_final_message=False,
                tokenize=False,
            )
        except _TEMPLATE_FAILURES as error:
            raise RenderError(str(error) or type(error).__name__) from error
        room = _RENDERING_ROOM + _RENDERING_GROWTH * sum(len(message.content) for message in messages)
        if len(text) > room:
            raise RenderError(f"the rendering of {len(text):,} characters is far longer than the turns in it")
        return text

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
    path = Path(given).expanduser()
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
    return template or None


def check_template(template: ChatTemplate, where: str) -> None:
    """Raise ModelError for a template that is too large or is not Jinja."""
    size = len(template.text.encode())
    if size > LARGEST_TEMPLATE:
        raise ModelError(
            "chat-template-too-large",
            f"the chat template is larger than {bytes_text(LARGEST_TEMPLATE)}",
            where=where,
        )
    try:
        template.render([Message("user", "a")])
    except RenderError as error:
        reason = error.__cause__
        # Any other failure may be about this conversation alone.
        if isinstance(reason, jinja2.TemplateSyntaxError):
            raise ModelError(
                "bad-chat-template",
                f"the chat template is not Jinja: line {reason.lineno}: {reason.message}",
                where=where,
            ) from error
        if isinstance(reason, RecursionError):
            raise ModelError(
                "bad-chat-template", "the chat template is nested too deep", where=where
            ) from error
