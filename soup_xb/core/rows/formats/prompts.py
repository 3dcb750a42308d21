"""How prompts are written that the model itself answers: turns or text, with whatever columns the rewards read."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from soup_xb.core.errors import DataError
from soup_xb.core.rows.examples import PromptExample, Source
from soup_xb.core.rows.fields import read_text
from soup_xb.core.rows.formats.detect import Format
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
