"""What of a base is opened: a causal language model, with its towers or as its text part alone, or a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from soup_xb.core.base_folder import BaseFolder, inspect_base
from soup_xb.core.errors import ModelError, Problem
from soup_xb.core.towers import is_in_tower

_CAUSAL = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
_INSTEAD = (
    "take a decoder-only text model; of bases with vision or audio towers, Gemma 3 and 4 work, among others."
)


def check_causal(folder: BaseFolder, config: Any) -> None:
    """Raise ModelError for a base that is not opened, whose text part cannot be saved, or that looks ahead."""
    where = str(folder.path / "config.json")
    if type(config) not in _CAUSAL:
        written = folder.config.get("architectures")
        name = f" ({written[0]})" if isinstance(written, list) and written else ""
        message = (
            f"`{folder.model_type}`{name} is no causal language model: AutoModelForCausalLM does not open it"
        )
        raise ModelError("not-causal", message, where=where, help=_INSTEAD)
    opened = _CAUSAL[type(config)].config_class
    if opened is not type(config) and opened not in _CAUSAL:
        message = f"of `{folder.model_type}` only the text part opens, and transformers cannot open it again by itself"
        raise ModelError("text-part-alone", message, where=where, help=_INSTEAD)
    ways = getattr(config.get_text_config(), "use_bidirectional_attention", None)
    if ways in (True, "all"):
        message = (
            f"`{folder.model_type}` attends to later tokens too, so that it would see what it is to predict"
        )
        raise ModelError("not-causal", message, where=where, help=_INSTEAD)


def text_alone(model: Any, base: Path) -> tuple[Problem, ...]:
    """What to know of a model that is the text part of its folder; nothing where the folder is opened whole."""
    folder = inspect_base(base, weights=False)
    towers = [
        key.removesuffix("_config")
        for key, value in folder.config.items()
        if isinstance(value, dict) and is_in_tower(key)
    ]
    if model.config.model_type == folder.model_type or not towers:
        return ()
    message = (
        f"{type(model).__name__} is the text part of `{folder.model_type}`, opened without its towers "
        f"({', '.join(towers)}); the adapter and a merged model fit what AutoModelForCausalLM opens"
    )
    return (Problem("text-alone", message),)
