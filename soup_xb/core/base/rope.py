"""Rotary positions for rows that are longer than the base was made for: one meaning, in transformers' words.

An adapter that was trained so belongs to the base with that setting: its settings file and its card say so, and what
opens it here opens the base with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from soup_xb.core.adapter.foreign_settings import check_number, damaged
from soup_xb.core.config.schema import RopeScalingConfig, TrainingConfig
from soup_xb.core.errors import ModelError

NOTE = "soup_xb_rope_parameters"
_SETTINGS = "adapter_config.json"
_KINDS = ("linear", "dynamic", "yarn")


@frozen
class RopeScaling:
    """`kind` is transformers' `rope_type`; `original` is the length that yarn stretches, 0 for the base's own."""

    kind: str
    factor: float
    original: int = 0

    def of(self, parameters: Any, longest: int, where: str) -> dict[str, Any]:
        """The base's `rope_parameters` with this scaling; `longest` is its `max_position_embeddings`.

        Raises ModelError for a base without plain rotary positions.
        """
        plain = isinstance(parameters, Mapping) and "rope_theta" in parameters
        kind = parameters.get("rope_type", "default") if plain else ""
        if kind != "default":
            what = f"are scaled already (`{kind}`)" if kind else "are not one rotary embedding for all layers"
            raise ModelError(
                "rope-not-scalable",
                f"the base's positions {what}, and `training.rope_scaling` would change them",
                where=where,
                help="remove `training.rope_scaling`, or take another base.",
            )
        scaled = {**parameters, "rope_type": self.kind, "factor": self.factor}
        if self.kind == "yarn":
            scaled["original_max_position_embeddings"] = self.original or longest
        return scaled

    def reach(self, longest: int) -> int:
        """The tokens that the positions are stretched to."""
        return int(self.factor * (self.original or longest))

    def described(self) -> dict[str, Any]:
        """What a settings file holds of it."""
        told: dict[str, Any] = {"rope_type": self.kind, "factor": self.factor}
        return {**told, "original_max_position_embeddings": self.original} if self.original else told


def asked_scaling(training: TrainingConfig) -> RopeScaling | None:
    """What a config asks for, None for the base as it is."""
    asked: RopeScalingConfig = training.rope_scaling
    if asked.type == "none" or asked.factor is None:
        return None
    return RopeScaling(asked.type, asked.factor, asked.original_max_position_embeddings or 0)


def note_scaling(adapter: Path, scaling: RopeScaling) -> None:
    """Write into an adapter's settings that it belongs to a base with this scaling; PEFT names the key and goes on."""
    file = adapter / _SETTINGS
    settings = json.loads(file.read_text("utf-8"))
    settings[NOTE] = scaling.described()
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")


def noted_scaling(settings: Mapping[str, Any], adapter: Path) -> RopeScaling | None:
    """What an adapter's settings note. Raises ModelError for a note that cannot be one of ours."""
    note, file = settings.get(NOTE), adapter / _SETTINGS
    if note is None:
        return None
    if not isinstance(note, dict) or note.get("rope_type") not in _KINDS:
        raise damaged(file, f"`{NOTE}` must name one of {', '.join(_KINDS)}")
    factor = check_number(note.get("factor"), f"`factor` in `{NOTE}`", file)
    original = check_number(note.get("original_max_position_embeddings", 0), f"the length in `{NOTE}`", file)
    if factor <= 1 or original < 0:
        raise damaged(file, f"`{NOTE}` is out of range")
    return RopeScaling(note["rope_type"], float(factor), int(original))
