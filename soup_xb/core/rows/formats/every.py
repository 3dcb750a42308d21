"""The formats of preferences, of prompts that the model itself answers, and of pairs of texts for embedding models."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

from attrs import evolve

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
from soup_xb.core.rows.formats.detect import (
    CONVERSATIONS,
    FORMATS,
    Format,
    columns_help,
    instruction_turns,
    read_prompt_completion,
    with_system,
)
from soup_xb.core.rows.formats.media import media_formats
from soup_xb.core.rows.tools import read_tools
from soup_xb.core.rows.turns import ROLES, read_turns


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


def _read_pair(row: Mapping[str, Any], source: Source, before: str = "") -> PreferenceExample:
    """Two answers; `before` is the column that holds what stands before them, empty where they hold it themselves."""
    where = f"{source}: "
    if isinstance(row["chosen"], str):
        talks = [_transcript(row[side]) for side in _SIDES]
        row = {**row, **dict(zip(_SIDES, talks, strict=True))} if all(talks) else row
    if isinstance(row["chosen"], list) and isinstance(row["rejected"], list):
        chosen, rejected = _conversations(row, source, before)
        return PreferenceExample(chosen, rejected, source)
    for side in _SIDES:
        if isinstance(row[side], list):
            raise mistyped(f"{where}{side}", "text, as the other answer is", row[side])
    texts = {side: read_text(row, side, where) for side in _SIDES}
    if before in (*CONVERSATIONS, "instruction"):
        answers = {side: [{"role": "assistant", "content": text}] for side, text in texts.items()}
        chosen, rejected = _conversations({**row, **answers}, source, before)
        return PreferenceExample(chosen, rejected, source)
    if isinstance(row.get("prompt"), list):
        raise mistyped(f"{where}prompt", "text, as the answers are", row["prompt"])
    if row.get("prompt") is None and "prompt" not in row:
        found = ", ".join(f"`{name}`" for name in row)
        proposal = columns_help(row, ["preference"])
        help = f"{proposal or 'write the prompt as `prompt`, or '}begin both answers with its turns."
        raise DataError("missing-field", f"is missing; found {found}", where=f"{where}prompt", help=help)
    prompt = read_text(row, "prompt", where)
    better, worse = (CompletionExample(prompt, texts[side], source) for side in _SIDES)
    return PreferenceExample(better, worse, source)


# A conversation as hh-rlhf writes it, in one text.
_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def _transcript(value: Any) -> list[dict[str, str]]:
    """The turns of a text that is a whole conversation of `Human:` and `Assistant:`; empty for any other value."""
    if not isinstance(value, str) or not value.lstrip().startswith("Human:"):
        return []
    _, *parts = _SPEAKER.split(value)
    turns: list[dict[str, str]] = []
    for speaker, text in zip(parts[::2], parts[1::2], strict=True):
        role, content = {"Human": "user", "Assistant": "assistant"}[speaker], text.strip()
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += f"\n\n{content}"
        else:
            turns.append({"role": role, "content": content})
    return turns if len(turns) > 1 else []


def _conversations(row: Mapping[str, Any], source: Source, before: str) -> tuple[ChatExample, ChatExample]:
    """Both sides as conversations whose turns after the prompt are trained on."""
    chosen, rejected = (read_turns(row, side, source) for side in _SIDES)
    prompt = _turns_before(row, source, before)
    whole = not prompt or _repeat(chosen, rejected, prompt)
    if not whole and not (before in CONVERSATIONS and _begin_alike(chosen, rejected)):
        chosen, rejected, start = prompt + chosen, prompt + rejected, len(prompt)
    else:
        start = _shared_turns(chosen, rejected, source)
        if before == "prompt" and not prompt:
            _check_same_prompt(read_text(row, "prompt", f"{source}: "), chosen[:start], source)
    if before == "prompt":
        # Beside a prompt that is a text for texts it would be lost, so it counts nowhere beside a prompt.
        row = {**row, "system": None}
    tools = () if before == "instruction" else read_tools(row, source)
    better, worse = (_with_system(row, side, start, source, tools) for side in (chosen, rejected))
    return better, worse


def _with_system(
    row: Mapping[str, Any], turns: tuple[Message, ...], start: int, source: Source, tools: tuple[str, ...]
) -> ChatExample:
    if row.get("system") is None:
        return ChatExample(turns, source, start, tools)
    whole = with_system(row, turns, source)
    return ChatExample(whole, source, start + len(whole) - len(turns), tools)


def _turns_before(row: Mapping[str, Any], source: Source, before: str) -> tuple[Message, ...]:
    """The turns before the answers that a column of their own holds."""
    if not before:
        return ()
    if before == "instruction":
        return tuple(instruction_turns(row, source))
    if isinstance(row[before], list):
        return read_turns(row, before, source)
    if before != "prompt":
        raise mistyped(f"{source}: {before}", "a list of turns", row[before])
    talk = _transcript(row["prompt"])
    if talk:
        # It ends where the assistant is to speak.
        talk = talk if talk[-1]["content"] else talk[:-1]
        return read_turns({"prompt": talk}, "prompt", source)
    # A text before answers that are turns is the user's, unless the answers repeat it.
    answers = all(row[side] and ROLES.get(_role(row[side][0])) == "assistant" for side in _SIDES)
    return (Message("user", read_text(row, "prompt", f"{source}: ")),) if answers else ()


def _role(turn: Any) -> str:
    return str(turn.get("role") or turn.get("from")) if isinstance(turn, dict) else ""


def _repeat(chosen: Sequence[Message], rejected: Sequence[Message], prompt: Sequence[Message]) -> bool:
    """Whether both sides hold the prompt's turns before their answers."""
    first, count = prompt[0].role, len(prompt)
    return all(
        len(side) > count and side[0].role == first and side[:count] == prompt for side in (chosen, rejected)
    )


def _begin_alike(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> bool:
    """Whether both sides are whole conversations: they begin with the same turn, and not with an answer."""
    return (
        chosen[:1] == rejected[:1] and min(len(chosen), len(rejected)) > 1 and chosen[0].role != "assistant"
    )


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


_VERDICTS = MappingProxyType({"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False})


def _verdict(label: Any, where: str) -> bool:
    """Whether an answer is a good one. Raises DataError for what says neither."""
    if isinstance(label, int | float) and label in (0, 1):
        return bool(label)
    found = _VERDICTS.get(label.strip().lower()) if isinstance(label, str) else None
    if found is None:
        raise mistyped(
            where, "true or false, or 1 or 0", label, "it says whether answers should be like this one."
        )
    return found


def _read_judged(row: Mapping[str, Any], source: Source, format: str = "") -> JudgedExample:
    """One answer; with `format` it is the last turn of the conversation that this format of `sft` makes of the row."""
    verdict = _verdict(row["label"], f"{source}: label")
    if not format:
        answer: Example = read_prompt_completion(row, source)
        return JudgedExample(answer, verdict, source)
    talk = FORMATS[format].read(row, source)
    assert isinstance(talk, ChatExample)
    return JudgedExample(evolve(talk, first_trained=max(0, len(talk.messages) - 1)), verdict, source)


_TALKS = ("conversations", "messages")
_ALPACA = ("input", "system", "history")


def _pairs_after(column: str, *optional: str) -> Format:
    """Pairs whose prompt stands in a column of its own."""
    turns = _SIDES if column == "instruction" else (column, *_SIDES)
    return Format((column, *_SIDES), partial(_read_pair, before=column), optional, turns)


def _judged(
    required: tuple[str, ...], format: str, optional: tuple[str, ...], turns: tuple[str, ...]
) -> Format:
    return Format((*required, "label"), partial(_read_judged, format=format), optional, turns)


PREFERENCES: Mapping[str, Format] = MappingProxyType(
    {
        "preference": Format(
            _SIDES,
            _read_pair,
            ("tools", "system"),
            _SIDES,
            variants=(
                _pairs_after("prompt", "tools"),
                *(_pairs_after(column, "tools", "system") for column in _TALKS),
                _pairs_after("instruction", *_ALPACA),
            ),
        ),
        "unpaired-preference": Format(
            ("prompt", "completion", "label"),
            _read_judged,
            ("tools",),
            turns=("prompt", "completion"),
            aliases=MappingProxyType({"kto_tag": "label"}),
            variants=(
                Format(("prompt", "completion", "label"), _read_judged, ("tools",), ("prompt", "completion")),
                _judged(("messages",), "messages", ("tools", "system"), ("messages",)),
                _judged(("conversations",), "sharegpt", ("tools", "system"), ("conversations",)),
                _judged(("instruction", "output"), "alpaca", _ALPACA, ()),
            ),
        ),
    }
)
# Pairs come first: their rows may hold a conversation besides, which has an answer less, or only the better one.
EVERY_FORMAT: Mapping[str, Format] = MappingProxyType(
    {"preference": PREFERENCES["preference"], **FORMATS, **PREFERENCES, **PROMPTS, **embedding_formats()}
)
