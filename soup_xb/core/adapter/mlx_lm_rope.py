"""An adapter of a base with stretched positions in mlx-lm's hands: what it must be loaded with, in mlx-lm's words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from soup_xb.core.base.rope import RopeScaling
from soup_xb.core.errors import ModelError, Problem


@frozen
class StretchedBase:
    """A base by its name, with the `scaling` of its positions. `longest` is its own `max_position_embeddings`."""

    name: str
    scaling: RopeScaling
    longest: int

    @property
    def settings(self) -> Mapping[str, Any]:
        """mlx-lm's `rope_scaling`."""
        told = {"rope_type": self.scaling.kind, **self.scaling.described()}
        if self.scaling.kind == "yarn":
            # Where it is not told, mlx-lm takes 4096.
            told["original_max_position_embeddings"] = self.scaling.original or self.longest
        return {"type": self.scaling.kind, **told}

    def code(self, adapter: str) -> str:
        """How mlx-lm loads base and adapter."""
        asked = json.dumps({"rope_scaling": dict(self.settings)})
        return (
            f"mlx_lm.load({json.dumps(self.name)}, adapter_path={json.dumps(adapter)}, model_config={asked})"
        )

    def notice(self, adapter: Path) -> Problem:
        """What the user should know of the exported adapter."""
        return Problem(
            "stretched-base",
            "the adapter belongs to the base with `training.rope_scaling`, which no command of mlx-lm asks for: load "
            f"both with `{self.code(str(adapter))}` (its README says so too), or write one model with `soupx merge`",
        )

    def readme(self) -> str:
        """The README.md beside the exported adapter."""
        return (
            "The positions of the base were stretched for the training: this adapter is for the base with the same "
            "setting. `mlx_lm.generate --adapter-path` does not apply it, and the adapter then says something else.\n\n"
            f"```python\nimport mlx_lm\n\nmodel, tokenizer = {self.code('.')}\n```\n"
        )


def check_exportable(scaling: RopeScaling, folder: Path) -> None:
    """Raise ModelError for positions that mlx-lm stretches in another way than transformers."""
    if scaling.kind == "dynamic":
        raise ModelError(
            "rope-not-exported",
            "the adapter belongs to a base with `rope_scaling: dynamic`, which mlx-lm computes otherwise than "
            "transformers",
            where=str(folder),
            help="use it with PEFT, or train with `yarn` or `linear`, which both libraries compute alike.",
        )
