"""The formats of preferences, of prompts that the model itself answers, and of pairs of texts for embedding models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from soup_xb.core.errors import DataError
from soup_xb.core.rows.examples import (
    ChatExample,
    CompletionExample,
    EmbeddingExample,
    Example,
    JudgedExample,
    Message,
    PreferenceExample,
    PromptExample,
    Source,
)
from soup_xb.core.rows.fields import mistyped, read_text
from soup_xb.core.rows.formats.detect import FORMATS, Format, read_prompt_completion
from soup_xb.core.rows.formats.media import media_formats
from soup_xb.core.rows.tools import read_tools
from soup_xb.core.rows.turns import read_turns


def _read_prompt(row: Mapping[str, Any], source: Source) -> PromptExample:
    if not isinstance(row["prompt"], list):
        return PromptExample((), read_text(row, "prompt", f"{source}: "), row, source)
    turns = read_turns(row, "prompt", source)
    if not turns:
        raise DataError(
            "empty-prompt",
            "there is no turn in it",
            where=f"{source}: prompt",
            help="write the user's turn, which the model is to answer, or delete the row.",
        )
    if turns[-1].role == "assistant":
        raise DataError(
            "answered-prompt",
            "the last turn is the assistant's, and the model is to write it",
            where=f"{source}: prompt",
            help="end the prompt with the user's turn.",
        )
    return PromptExample(turns, "", row, source)


PROMPTS: Mapping[str, Format] = MappingProxyType(
    {"prompt": Format(("prompt",), _read_prompt, turns=("prompt",), keeps_all=True)}
)


_ALIASES = MappingProxyType(
    {
        **dict.fromkeys(("query", "question", "sentence1"), "anchor"),
        **dict.fromkeys(("pos", "answer", "passage", "document", "sentence2"), "positive"),
        **dict.fromkeys(("neg", "hard_negative"), "negative"),
    }
)


def embedding_formats(query_prompt: str = "", document_prompt: str = "") -> Mapping[str, Format]:
    """The one format of embedding rows, with these prompts before its texts."""

    def read(row: Mapping[str, Any], source: Source) -> EmbeddingExample:
        where = f"{source}: "
        negative = None if row.get("negative") is None else read_text(row, "negative", where)
        return EmbeddingExample(
            anchor=_prompted(query_prompt, read_text(row, "anchor", where)),
            positive=_prompted(document_prompt, read_text(row, "positive", where)),
            negative=None if negative is None else _prompted(document_prompt, negative),
            source=source,
        )

    known = Format(("anchor", "positive"), read, ("negative",), aliases=_ALIASES)
    return MappingProxyType({"anchor-positive": known})


def _prompted(prompt: str, text: str) -> str:
    # A prompt does not make a text of nothing.
    return prompt + text if text.strip() else ""


_SIDES = ("chosen", "rejected")


def formats_named(
    names: Sequence[str], media: str = "", prompts: tuple[str, str] = ("", "")
) -> Mapping[str, Format]:
    """The formats of these names, in their order, which is that in which detection asks.

    `media` is the kind of files that rows hold; `prompts` stand before the texts of rows to embed, queries and
    documents.
    """
    known = media_formats(media) if media else {**EVERY_FORMAT, **embedding_formats(*prompts)}
    return MappingProxyType({name: known[name] for name in names})


def _read_pair(row: Mapping[str, Any], source: Source) -> PreferenceExample:
    kinds = {side: row[side] for side in _SIDES}
    if all(isinstance(value, list) for value in kinds.values()):
        chosen, rejected = _conversations(row, source)
        return PreferenceExample(chosen, rejected, source)
    where = f"{source}: "
    for side in _SIDES:
        if isinstance(row[side], list):
            raise mistyped(f"{where}{side}", "text, as the other answer is", row[side])
    if isinstance(row.get("prompt"), list):
        raise mistyped(f"{where}prompt", "text, as the answers are", row["prompt"])
    texts = {side: read_text(row, side, where) for side in _SIDES}
    prompt = read_text(row, "prompt", where)
    better, worse = (CompletionExample(prompt, texts[side], source) for side in _SIDES)
    return PreferenceExample(better, worse, source)


def _conversations(row: Mapping[str, Any], source: Source) -> tuple[ChatExample, ChatExample]:
    """Both sides as conversations whose turns after the prompt are trained on."""
    chosen, rejected = (read_turns(row, side, source) for side in _SIDES)
    tools = read_tools(row, source)
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        turns = read_turns(row, "prompt", source)
        better, worse = (ChatExample(turns + side, source, len(turns), tools) for side in (chosen, rejected))
        return better, worse
    start = _shared_turns(chosen, rejected, source)
    if prompt is not None:
        _check_same_prompt(read_text(row, "prompt", f"{source}: "), chosen[:start], source)
    return ChatExample(chosen, source, start, tools), ChatExample(rejected, source, start, tools)


def _shared_turns(chosen: tuple[Message, ...], rejected: tuple[Message, ...], source: Source) -> int:
    """How many turns both conversations begin with. Raises DataError where they have none in common."""
    longest = min(len(chosen), len(rejected)) - 1
    shared = next((at for at in range(max(0, longest)) if chosen[at] != rejected[at]), max(0, longest))
    if not shared:
        raise DataError(
            "no-shared-prompt",
            "`chosen` and `rejected` do not begin with the same turn",
            where=str(source),
            help="write the turns before the answers as `prompt`, or begin both conversations with them.",
        )
    return shared


def _check_same_prompt(prompt: str, shared: tuple[Message, ...], source: Source) -> None:
    """Some datasets repeat the user's words in a column of their own; they must be those of the conversations."""
    if prompt.strip() not in (turn.content.strip() for turn in shared):
        raise DataError(
            "other-prompt",
            "`prompt` is a text that neither conversation begins with",
            where=str(source),
            help="remove the column, or write it as a list of turns before the answers.",
        )


def _read_judged(row: Mapping[str, Any], source: Source) -> JudgedExample:
    label = row["label"]
    if not isinstance(label, bool):
        raise mistyped(f"{source}: label", "true or false", label)
    answer: Example = read_prompt_completion(row, source)
    return JudgedExample(answer, label, source)


PREFERENCES: Mapping[str, Format] = MappingProxyType(
    {
        "preference": Format(_SIDES, _read_pair, ("prompt", "tools"), _SIDES),
        "unpaired-preference": Format(
            ("prompt", "completion", "label"), _read_judged, ("tools",), turns=("prompt", "completion")
        ),
    }
)
EVERY_FORMAT: Mapping[str, Format] = MappingProxyType(
    {**FORMATS, **PREFERENCES, **PROMPTS, **embedding_formats()}
)
