"""A written model's config.json: the base's own with what changed, so that older tools compute the same model.

transformers 5 keeps rotary positions in `rope_parameters` and the format of the weights in `dtype`. transformers 4,
mlx-lm and llama.cpp's converter read `rope_theta`, `rope_scaling` and `torch_dtype`. Here both stand side by side;
transformers 5 reads the older spelling too, and means the same by it.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from soup_xb.core.base.folder import read_object
from soup_xb.core.disk import write_text

CONFIG = "config.json"
_OLD_ROPE = ("rope_scaling", "rope_theta")
# Newer types that take a `rope_scaling` for the whole of their rope.
_NEW_ALONE = ("bailing_hybrid", "cohere_compass_text")
# Types that have other names for the base and for the rotated share of a head.
_NAMES = dict.fromkeys(("gpt_neox", "gpt_neox_japanese"), ("rotary_emb_base", "rotary_pct"))
# Types whose sliding layers have a rope of their own: the old names of both bases, and whether `rope_scaling` was that
# of the full layers alone.
_GEMMA = ("rope_theta", "rope_local_base_freq", True)
_BY_LAYER = {
    **dict.fromkeys(("gemma3_text", "gemma3n_text"), _GEMMA),
    **dict.fromkeys(("modernbert", "modernbert-decoder"), ("global_rope_theta", "local_rope_theta", False)),
    "olmo3": ("rope_theta", "", True),
}
# Types of which transformers 4 takes a `rope_scaling` with these keys and no others.
_STRICT = {
    **dict.fromkeys(("olmo", "olmo2", "chameleon", "fuyu"), ("type", "factor")),
    **dict.fromkeys(("phi3", "phi4_multimodal"), ("type", "short_factor", "long_factor")),
}
# What they take from beside it.
_BESIDE = ("original_max_position_embeddings",)
# Types for which mlx-lm asks for the distance of full-attention layers, which `layer_types` says as well.
_PATTERNED = ("gemma3_text", "cohere2")
# Encoders whose first position is the one behind the padding token's id.
POSITIONS_BEHIND_PADDING = (
    "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer",
    "data2vec-text", "ibert", "xmod",
)  # fmt: skip
# Types whose `num_local_experts` was `num_experts`.
_RECOUNTED = ("qwen3_moe", "qwen3_vl_moe_text")


@frozen(kw_only=True)
class ConfigChanges:
    """What a written model has otherwise than its base.

    `dtype` is that of its weights, `architectures` names its class; empty for the base's own. `own_head`: the head no
    longer shares its weight with the embedding. `rope_parameters` are positions that were stretched. `instead` is the
    whole config of a model that is a part of the base.
    """

    dtype: str = ""
    architectures: Sequence[str] = ()
    own_head: bool = False
    rope_parameters: Mapping[str, Any] | None = None
    instead: Mapping[str, Any] | None = None


def write_config(folder: Path, base: Path, changes: ConfigChanges) -> None:
    """Write the config.json of a model that was made from `base`; the very file where nothing changes."""
    own = read_object(base / CONFIG, "base-config")
    config = changed_config(own, changes)
    if config == own:
        shutil.copyfile(base / CONFIG, folder / CONFIG)
    else:
        write_text(folder / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def changed_config(own: Mapping[str, Any], changes: ConfigChanges) -> dict[str, Any]:
    """A base's config with these changes, in both spellings."""
    config: dict[str, Any] = copy.deepcopy(dict(own if changes.instead is None else changes.instead))
    # The code that it names is left behind, and the library's own was used.
    config.pop("auto_map", None)
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    if changes.architectures:
        config["architectures"] = list(changes.architectures)
    if changes.own_head:
        config["tie_word_embeddings"] = text["tie_word_embeddings"] = False
    if changes.rope_parameters is not None:
        for name in _OLD_ROPE:
            text.pop(name, None)
        text["rope_parameters"] = dict(changes.rope_parameters)
    if changes.dtype:
        for part in _parts(config):
            for name in {"dtype", "torch_dtype"} & set(part):
                part[name] = changes.dtype
        if not config.get("dtype") and not config.get("torch_dtype"):
            config["dtype"] = changes.dtype
    for part in _parts(config):
        _spell_as_before(part)
        if padding_without_row(part.get("pad_token_id"), text.get("vocab_size")):
            part["pad_token_id"] = None
    return config


def padding_without_row(pad: Any, rows: Any) -> bool:
    """Whether a config's `pad_token_id` has no row in an embedding of `rows` rows.

    Old configs name -1, others an id of a tokenizer that was extended. torch makes no such embedding and MLX does
    not look; no row is padded with it here, and the model is opened and written without it.

    >>> padding_without_row(32000, 32000), padding_without_row(0, 32000), padding_without_row(None, 32000)
    (True, False, False)
    """
    return isinstance(pad, int) and isinstance(rows, int) and not 0 <= pad < rows


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The config and those inside it, of a language model or an encoder of pictures or sounds."""
    yield config
    for name, value in config.items():
        if isinstance(value, dict) and name.endswith("_config"):
            yield from _parts(value)


def _spell_as_before(part: dict[str, Any]) -> None:
    """Add the older names for what `dtype`, `rope_parameters` and `layer_types` say."""
    if part.get("dtype"):
        _add(part, torch_dtype=part["dtype"])
    rope = part.get("rope_parameters")
    if isinstance(rope, dict) and rope and part.get("model_type") not in _NEW_ALONE:
        by_layer = [kind for kind in rope.values() if isinstance(kind, dict)]
        _spell_by_layer(part, rope) if by_layer else _spell_rope(part, rope)
    every = _full_attention_every(part.get("layer_types"))
    if every and part.get("model_type") in _PATTERNED:
        _add(part, sliding_window_pattern=every)
    if part.get("model_type") in _RECOUNTED:
        _add(part, num_experts=part.get("num_local_experts"))


def _spell_rope(part: dict[str, Any], rope: Mapping[str, Any]) -> None:
    theta, share = _NAMES.get(str(part.get("model_type")), ("rope_theta", "partial_rotary_factor"))
    _add(part, **{theta: rope.get("rope_theta"), share: rope.get("partial_rotary_factor")})
    _add_scaling(part, rope)


def _spell_by_layer(part: dict[str, Any], rope: Mapping[str, Any]) -> None:
    full, sliding = (rope.get(f"{kind}_attention") or {} for kind in ("full", "sliding"))
    # Newer types read `rope_parameters` alone; mlx-lm reads the older names of some.
    theta, local, scales = _BY_LAYER.get(str(part.get("model_type")), (*_GEMMA[:2], False))
    _add(part, **{theta: full.get("rope_theta")})
    if local:
        _add(part, **{local: sliding.get("rope_theta")})
    if scales:
        _add_scaling(part, full)


def _add_scaling(part: dict[str, Any], rope: Mapping[str, Any]) -> None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        part.setdefault("rope_scaling", None)
        return
    outside = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
    kept = {key: value for key, value in rope.items() if value is not None and key not in outside}
    scaling = {"rope_type": kind, "type": kind, **kept}
    model_type, beside = str(part.get("model_type")), {key: part.get(key) for key in _BESIDE}
    strict = {key: scaling[key] for key in _STRICT.get(model_type, ()) if key in scaling}
    rest = {key: value for key, value in kept.items() if key not in strict}
    if len(strict) == len(_STRICT.get(model_type, "?")) and rest.items() <= beside.items():
        scaling = strict
    _add(part, rope_scaling=scaling)


def _add(part: dict[str, Any], **older: Any) -> None:
    for name, value in older.items():
        if value is not None and part.get(name) is None:
            part[name] = value


def _full_attention_every(kinds: Any) -> int:
    """The distance of layers that attend to all tokens where all others slide, else 0."""
    if not isinstance(kinds, list) or "full_attention" not in kinds:
        return 0
    every = kinds.index("full_attention") + 1
    wanted = ["sliding_attention" if (index + 1) % every else "full_attention" for index in range(len(kinds))]
    return every if kinds == wanted else 0
