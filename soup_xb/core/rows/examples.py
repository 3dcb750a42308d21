"""What a row of a data file means, before the tokenizer, with its pictures and sounds, as plain values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import attrs
import numpy as np
from attrs import field, frozen


@frozen
class Source:
    """Where a row stands: file and line (1-based), or file and row number for formats without lines."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


Row = tuple[Source, dict[str, Any]]


@frozen
class ToolCall:
    """A call in an assistant's turn; `arguments` is the JSON text of an object, `id` empty where the row has none."""

    name: str
    arguments: str
    id: str = ""


@frozen
class Attachment:
    """A picture or a sound that a row names: `kind` is image or audio, `name` is as the row writes it."""

    kind: str
    name: str


@frozen
class Message:
    """One turn. `role` is system, user, assistant or tool.

    `calls` are an assistant's; a tool's turn has the `name` of the function and the `call_id` that it answers, each
    empty where the row does not tell.
    A turn with pictures or sounds has `parts`, its texts and what stands between them; `content` is its text alone.
    `thought` is what an assistant thinks before its words. `weight` is what each of its tokens counts for in the loss;
    0 keeps the turn out of it.
    """

    role: str
    content: str
    calls: tuple[ToolCall, ...] = ()
    name: str = ""
    call_id: str = ""
    parts: tuple[str | Attachment, ...] = ()
    thought: str = ""
    weight: float = 1.0

    @property
    def texts(self) -> tuple[str, ...]:
        """The pieces of text, in order."""
        return tuple(part for part in self.parts if isinstance(part, str)) if self.parts else (self.content,)

    @property
    def attachments(self) -> tuple[Attachment, ...]:
        """The pictures and sounds, in order."""
        return tuple(part for part in self.parts if isinstance(part, Attachment))


@frozen
class ChatExample:
    """A conversation; the assistant's turns from the turn `first_trained` on are trained on, each by its weight.

    `tools` are the functions that it may call, each as JSON text.
    """

    messages: tuple[Message, ...]
    source: Source
    first_trained: int = 0
    tools: tuple[str, ...] = ()

    @property
    def uses_tools(self) -> bool:
        """Whether tools are declared or called."""
        return bool(self.tools) or any(message.calls for message in self.messages)

    @property
    def attachments(self) -> tuple[Attachment, ...]:
        """The pictures and sounds of all turns, in order."""
        return tuple(attachment for message in self.messages for attachment in message.attachments)


@frozen
class CompletionExample:
    """Plain text with an untrained `prompt` (empty for plain text) and a trained `completion`.

    For a transcript `attachments` is the sound that says it, and `language` its language, empty where none is told.
    """

    prompt: str
    completion: str
    source: Source
    attachments: tuple[Attachment, ...] = ()
    language: str = ""


Example = ChatExample | CompletionExample


@frozen
class PreferenceExample:
    """Two answers to one prompt, the better and the worse; each side tells the prompt and its answer."""

    chosen: Example
    rejected: Example
    source: Source


@frozen
class JudgedExample:
    """One answer, and whether answers should be like it."""

    answer: Example
    desirable: bool
    source: Source


@frozen
class EmbeddingExample:
    """Two texts that mean the same or answer each other; `negative` is a text that does not, where there is one."""

    anchor: str
    positive: str
    negative: str | None
    source: Source


@frozen
class PromptExample:
    """A prompt that the model itself will answer: turns, or plain `text`. `columns` is the whole row, for rewards."""

    messages: tuple[Message, ...]
    text: str
    columns: Mapping[str, Any] = field(hash=False)
    source: Source


AnyExample = Example | PreferenceExample | JudgedExample | EmbeddingExample | PromptExample

Array = np.ndarray[Any, Any]
# By the name of the model's argument, such as pixel_values.
Inputs = Mapping[str, Array]


@frozen
class MediaFile:
    """A picture or a sound that was found: `name` as the row writes it, `sha256` of its bytes when it was looked at."""

    kind: str
    name: str
    path: Path
    sha256: str


@frozen(eq=False)
class RowMedia:
    """What a row has besides tokens.

    `text` is its conversation with one mark for each file, before the marks became tokens; empty for a transcript.
    `where` names the row in errors. `make` gives the model's inputs for such rows together with the grid of their
    tokens, int32 (rows, length).
    """

    files: tuple[MediaFile, ...]
    text: str
    where: str
    make: Callable[[Sequence[RowMedia], Array], Inputs]

    @property
    def digest(self) -> bytes:
        """What tells these files from others."""
        return b"".join(bytes.fromhex(file.sha256) for file in self.files)


def media_inputs(media: Sequence[RowMedia], tokens: Array) -> Inputs:
    """The inputs of a micro-batch besides its tokens; none where no row has media."""
    return media[0].make(media, tokens) if media else {}


# Every class of core.rows.examples that says what a row means; their values are texts, numbers, marks and tuples of
# these.
_CLASSES: Mapping[str, type] = MappingProxyType(
    {name: value for name, value in globals().items() if isinstance(value, type) and attrs.has(value)}
)
_FIELDS = {name: tuple(field.name for field in attrs.fields(value)) for name, value in _CLASSES.items()}


def plain(value: Any) -> Any:
    """An example, or a value in it, as JSON has it: an object of a class is its name and its values.

    >>> plain(Message("user", "Hi"))
    {'is': 'Message', 'values': ['user', 'Hi', [], '', '', [], '', 1.0]}
    """
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    name = type(value).__name__
    if name not in _FIELDS:
        raise TypeError(f"an example holds a {name}, which has no form in JSON")
    return {"is": name, "values": [plain(getattr(value, field)) for field in _FIELDS[name]]}


def example_of(value: Any) -> Any:
    """The example, or the value in it, that `plain` made this of."""
    if isinstance(value, list):
        return tuple(example_of(item) for item in value)
    if isinstance(value, dict):
        return _CLASSES[value["is"]](*(example_of(item) for item in value["values"]))
    return value


def travels(example: AnyExample) -> bool:
    """Whether examples of this kind have a form in JSON."""
    try:
        plain(example)
    except TypeError:
        return False
    return True
