"""What of a base is opened: a causal language model, with its towers or as its text part alone, or a refusal."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Any

import transformers

from soup_xb.core.base.folder import BaseFolder, inspect_base
from soup_xb.core.base.towers import is_in_tower
from soup_xb.core.errors import ModelError, Problem

_CAUSAL = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
_MASKED = transformers.MODEL_FOR_MASKED_LM_MAPPING
# The first that knows a base's type opens it. Whisper's shape comes before bases that answer about a sound.
_WITH_FILES = MappingProxyType(
    {
        "image": (("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "AutoModelForImageTextToText"),),
        "audio": (
            ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING", "AutoModelForSpeechSeq2Seq"),
            ("MODEL_FOR_MULTIMODAL_LM_MAPPING", "AutoModelForMultimodalLM"),
        ),
    }
)
_INSTEAD = (
    "take a decoder-only text model; of bases with vision or audio towers, Gemma 3 and 4 work, among others."
)


def auto_class(config: Any, media: str) -> Any:
    """The transformers class that opens a base for rows with this kind of files; empty for text alone."""
    if not media:
        return transformers.AutoModelForCausalLM if type(config) in _CAUSAL else _for_pictures(config)
    # By name: an older transformers has not all of them, and trains on text all the same.
    found = (
        auto for mapping, auto in _WITH_FILES[media] if type(config) in getattr(transformers, mapping, ())
    )
    return getattr(transformers, next(found, ""), None)


def _for_pictures(config: Any) -> Any:
    """The class that opens a decoder with a vision tower, which reads text without a picture too; None for others."""
    known = getattr(transformers, "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", ())
    if type(config) not in known or config.is_encoder_decoder or config.get_text_config().is_encoder_decoder:
        return None
    return transformers.AutoModelForImageTextToText


def check_kind(folder: BaseFolder, config: Any, media: str) -> None:
    """Raise ModelError for a base that does not take such files, or, for text, that is no causal language model."""
    if not media:
        check_causal(folder, config)
        return
    where = str(folder.path / "config.json")
    if auto_class(config, media) is None:
        verb, kind = ("see", "pictures") if media == "image" else ("hear", "sounds")
        raise ModelError(
            "takes-no-files",
            f"`{folder.model_type}` does not {verb}: no class of transformers opens it for {kind} and text",
            where=where,
            help=f"take a base that takes {kind}; docs/vision-audio.md lists types that are tested.",
        )
    _check_order(folder, config)


def check_causal(folder: BaseFolder, config: Any) -> None:
    """Raise ModelError for a base that is not opened, whose text part cannot be saved, or that looks ahead."""
    where = str(folder.path / "config.json")
    if type(config) not in _CAUSAL and _for_pictures(config) is not None:
        _check_order(folder, config)
        return
    if type(config) not in _CAUSAL:
        written = folder.config.get("architectures")
        name = f" ({written[0]})" if isinstance(written, list) and written else ""
        message = f"`{folder.model_type}`{name} is no causal language model: no class of transformers opens it for text"
        raise ModelError("not-causal", message, where=where, help=_INSTEAD)
    opened = _CAUSAL[type(config)].config_class
    if opened is not type(config) and opened not in _CAUSAL:
        message = f"of `{folder.model_type}` only the text part opens, and transformers cannot open it again by itself"
        raise ModelError("text-part-alone", message, where=where, help=_INSTEAD)
    _check_order(folder, config)


def _check_order(folder: BaseFolder, config: Any) -> None:
    where = str(folder.path / "config.json")
    ways = getattr(config.get_text_config(), "use_bidirectional_attention", None)
    if ways in (True, "all"):
        message = (
            f"`{folder.model_type}` attends to later tokens too, so that it would see what it is to predict"
        )
        raise ModelError("not-causal", message, where=where, help=_INSTEAD)


def check_embedding(folder: BaseFolder, config: Any) -> None:
    """Raise ModelError for a base whose hidden states are not those of a text: encoder-decoders, towers alone."""
    kinds = (*_CAUSAL, *_MASKED)
    if type(config) in transformers.MODEL_MAPPING and type(config) in kinds and not config.is_encoder_decoder:
        return
    raise ModelError(
        "not-a-text-model",
        f"`{folder.model_type}` is neither a text encoder nor a decoder alone",
        where=str(folder.path / "config.json"),
        help="take an encoder such as BERT, MPNet or ModernBERT, or a decoder such as Qwen 3.",
    )


def is_encoder(model: Any) -> bool:
    """Whether every token of the model sees the whole text."""
    return type(model.config) in _MASKED


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
