"""The vision and audio encoders of a multimodal base, which rows of text never run through, and Gemma 4's names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from soup_xb.core.base.folder import BaseFolder
from soup_xb.core.base.patterns import matching_names
from soup_xb.core.config.schema import AUTOMATIC, LoadedConfig
from soup_xb.core.config.support import feature_refusal
from soup_xb.core.errors import ConfigError, Problem

_TOWER = re.compile(r"(^|[._])(vision|visual|audio|image|speech|multi_modal|multimodal|mm)([._]|$)")
_SIGHT = re.compile(r"(^|[._])(vision|visual|image)([._]|$)")
_HEARING = re.compile(r"(^|[._])(audio|speech)([._]|$)")


def is_in_tower(name: str) -> bool:
    """Whether a module is in a vision or audio tower, or in the projector behind one.

    >>> is_in_tower("model.vision_tower.layers.0.q_proj"), is_in_tower("model.language_model.layers.0.q_proj")
    (True, False)
    """
    return bool(_TOWER.search(name))


def is_unseen(name: str, media: str = "") -> bool:
    """Whether rows with this kind of media (image, audio, empty for text alone) leave the module without a gradient.

    >>> is_unseen("model.vision_tower.layers.0.q_proj"), is_unseen("model.vision_tower.layers.0.q_proj", "image")
    (True, False)
    >>> is_unseen("model.audio_tower.layers.0.q_proj", "image"), is_unseen("multi_modal_projector.linear_1", "image")
    (True, False)
    """
    if not media:
        return is_in_tower(name)
    return bool((_HEARING if media == "image" else _SIGHT).search(name))


def without_gradient(names: Sequence[str], where: str, media: str = "") -> list[Problem]:
    """What to know of adapted modules that training on rows with this kind of media leaves as they start.

    The code is `towers-alone` where there is no other module, so that nothing would be trained.
    """
    unseen = sum(is_unseen(name, media) for name in names)
    if not unseen:
        return []
    kind = f"rows with {'pictures' if media == 'image' else 'sound'}" if media else "text rows"
    if unseen == len(names):
        message = (
            f"all {unseen} adapted modules are in vision and audio towers, which {kind} do not run through"
        )
        cure = "name modules of the text decoder too, or use `target_modules: auto`."
        return [Problem("towers-alone", message, where, cure)]
    message = (
        f"{unseen} adapted modules in the vision and audio towers get no gradient from {kind} "
        "and stay as they start"
    )
    cure = "leave them out with `target_modules: auto`, the text decoder alone, or with a narrower pattern."
    return [Problem("no-gradient", message, where, cure)]


_NAME = re.compile(r"(?<![a-z0-9])gemma[-_ ]?4(?![a-z0-9])", re.IGNORECASE)
# More than any of its towers has; a pattern may name a layer by its number.
_MOST_LAYERS = 64
_VISION_LAYER = (
    *(f"self_attn.{side}_proj" for side in "qkvo"),
    *(f"mlp.{side}_proj" for side in ("gate", "up", "down")),
)
_AUDIO_LAYER = (
    *(f"self_attn.{side}_proj" for side in "qkv"),
    *("self_attn.post", "self_attn.relative_k_proj", "lconv1d.linear_start", "lconv1d.linear_end"),
    *(f"feed_forward{half}.ffw_layer_{layer}" for half in (1, 2) for layer in (1, 2)),
)
# The key of the config, the layers with their linears, and the linears outside of layers.
_TOWERS = (
    (
        "vision_config",
        ("model.vision_tower.encoder.layers", _VISION_LAYER),
        ("model.vision_tower.patch_embedder.input_proj", "model.embed_vision.embedding_projection"),
    ),
    (
        "audio_config",
        ("model.audio_tower.layers", _AUDIO_LAYER),
        (
            "model.audio_tower.subsample_conv_projection.input_proj_linear",
            "model.audio_tower.output_proj",
            "model.embed_audio.embedding_projection",
        ),
    ),
)


def is_gemma4(*names: str) -> bool:
    """Whether one of the names (a base id, a path, a model type) is Gemma 4's.

    >>> is_gemma4("google/gemma-4-E2B-it"), is_gemma4("./renamed", "gemma4_text"), is_gemma4("mygemma4ish")
    (True, True, False)
    """
    return any(_NAME.search(name) for name in names)


def check_towers(loaded: LoadedConfig, base: BaseFolder, backend: str) -> None:
    """Raise ConfigError where `target_modules` reaches towers of Gemma 4 that the backend does not open."""
    targets = loaded.config.training.lora.target_modules
    where = loaded.where("training.lora.target_modules")
    refusal = feature_refusal("training.lora.target_modules=Gemma 4 towers", backend, where)
    if refusal is None or targets in AUTOMATIC or not is_gemma4(loaded.config.base, base.model_type):
        return
    names = list(_tower_names(base.config))
    patterns = (targets,) if isinstance(targets, str) else targets
    if any(matching_names(pattern, names, where) for pattern in patterns):
        raise ConfigError.of([refusal])


def _tower_names(config: dict[str, Any]) -> Iterator[str]:
    """The linear layers of the towers that a config has, under both names of those that are wrapped."""
    for key, (layers, names), others in _TOWERS:
        if not config.get(key):
            continue
        yield from others
        for layer in range(_MOST_LAYERS):
            for name in names:
                yield from (f"{layers}.{layer}.{name}", f"{layers}.{layer}.{name}.linear")
