"""One config, two readings: what transformers means by a config.json, in mlx-lm's spelling.

Every field of the config class is accounted for: read by mlx-lm, held at the value that mlx-lm's code has built
in, or of no weight. Any other is refused by name, so that a base is never trained as another model.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import transformers
from attrs import evolve, field, frozen

from soup_xb.backends.mlx.rope import Rope, read_rope, refused, spell_rope
from soup_xb.core.base.folder import BaseFolder, unknown_type
from soup_xb.core.base.layers import layer_settings
from soup_xb.core.base.rope import RopeScaling
from soup_xb.core.config.support import feature_refusal
from soup_xb.core.disk import foreign_errors
from soup_xb.core.errors import ConfigError, ModelError

_SIZES = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings",
)  # fmt: skip
# Training-time dropout of the base is off on both engines; the rest is about tokens, output and bookkeeping.
_WEIGHTLESS = {
    "transformers_version", "architectures", "output_hidden_states", "return_dict", "dtype", "torch_dtype",
    "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "problem_type", "initializer_range",
    "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "pretraining_tp", "attention_dropout",
    "resid_pdrop", "embd_pdrop", "_name_or_path", "output_attentions", "max_window_layers", "rope_parameters",
    "no_rope_layer_interval", "_sliding_window_pattern", "head_dim", "layer_types", "sliding_window",
}  # fmt: skip


@frozen
class Family:
    """How mlx-lm's code of a model type relates to transformers'.

    `reads` are further fields of the same name and meaning; `fixed` are built-in values. `scores` says whether
    transformers has a sequence classification with a scalar head for the type.
    """

    module: str
    reads: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(factory=dict)
    ropes: tuple[str, ...] = ("default", "linear", "llama3", "yarn")
    scores: bool = True


_SILU = {"hidden_act": "silu"}
_FULL = {"use_sliding_window": False}
_GELU = {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, "attention_bias": False}
FAMILIES: dict[str, Family] = {
    "llama": Family("llama", ("attention_bias", "mlp_bias", "head_dim"), _SILU),
    "mistral": Family("llama", ("head_dim",), _SILU),
    "qwen2": Family("qwen2", (), {**_SILU, **_FULL}),
    "qwen3": Family("qwen3", ("head_dim",), {**_SILU, **_FULL, "attention_bias": False}),
    "smollm3": Family(
        "smollm3", ("attention_bias", "mlp_bias", "no_rope_layers", "head_dim"), {**_SILU, **_FULL}
    ),
    "olmo2": Family("olmo2", ("attention_bias", "head_dim"), _SILU),
    "granite": Family(
        "granite",
        (
            "attention_bias", "mlp_bias", "logits_scaling", "attention_multiplier", "embedding_multiplier",
            "residual_multiplier",
        ),
        _SILU,
        scores=False,
    ),
    "phi3": Family(
        "phi3",
        ("original_max_position_embeddings",),
        _SILU,
        ("default", "linear", "longrope"),
    ),
    "gemma2": Family(
        "gemma2",
        ("head_dim", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
        {**_GELU, "use_bidirectional_attention": None},
        ("default",),
    ),
    "gemma3_text": Family(
        "gemma3_text",
        ("head_dim", "query_pre_attn_scalar"),
        {
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "use_bidirectional_attention": False,
            "final_logit_softcapping": None,
            "attn_logit_softcapping": None,
        },
    ),
}  # fmt: skip


@frozen(eq=False)
class Reading:
    """A base in mlx-lm's terms.

    `arguments` are those of mlx-lm's ModelArgs, `ropes` the rotary embedding that each block must have (None:
    none), `longest` the row length up to which mlx-lm computes what transformers does (0: any) and why.
    `stretched` are the `rope_parameters` that a config asked for instead of the base's own. `pad_id` is the id that the
    config pads with, and `scores` as in `Family`.
    """

    module: str
    arguments: dict[str, Any]
    ropes: tuple[Rope | None, ...]
    head_dim: int
    longest: int
    longest_because: str
    tied: bool
    layer_settings: dict[str, Any]
    pad_id: int | None = None
    scores: bool = True
    stretched: Mapping[str, Any] | None = None

    def build(self) -> Any:
        """The model with random weights that are not computed until asked for."""
        code = importlib.import_module(f"mlx_lm.models.{self.module}")
        model = code.Model(code.ModelArgs(**self.arguments))
        if self.module == "gemma3_text" and self.tied:
            # Its ModelArgs has no such field: it ties the head when it is shown weights without one.
            model.sanitize({})
        return model


def read_base(folder: BaseFolder, scaling: RopeScaling | None = None) -> Reading:
    """Translate a base's config, its positions stretched where that is asked for.

    Raises ModelError naming the first field that mlx-lm would read otherwise.
    """
    where = str(folder.path / "config.json")
    if folder.is_encoder:
        raise _not_opened("base=an encoder", folder, where)
    config = _parse(folder)
    if scaling is not None:
        longest = config.max_position_embeddings
        config.rope_parameters = scaling.of(config.rope_parameters, longest, where)
    family = FAMILIES.get(folder.model_type)
    if family is None:
        raise _not_opened("base=a model type without proof", folder, where)
    _check_fields(config, family, where)
    arguments = {name: getattr(config, name) for name in (*_SIZES, *family.reads) if hasattr(config, name)}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    with foreign_errors(partial(unreadable_config, folder)):
        ropes, longest, because = _translate_layers(config, family, arguments, head_dim, where)
    return Reading(
        module=family.module,
        arguments=arguments,
        ropes=ropes,
        head_dim=head_dim,
        longest=longest,
        longest_because=because,
        tied=bool(config.tie_word_embeddings),
        layer_settings=layer_settings(config.to_dict()),
        pad_id=config.pad_token_id,
        scores=family.scores,
        stretched=None if scaling is None else config.rope_parameters,
    )


def _not_opened(row: str, folder: BaseFolder, where: str) -> ConfigError:
    problem = feature_refusal(row, "mlx", where)
    assert problem is not None
    return ConfigError.of([evolve(problem, message=f"{problem.message}; this is `{folder.model_type}`")])


def _parse(folder: BaseFolder) -> Any:
    if folder.model_type not in transformers.CONFIG_MAPPING:
        raise unknown_type(folder, transformers.__version__)
    plain = {
        key: value
        for key, value in folder.config.items()
        if key not in ("quantization", "quantization_config", "auto_map")
    }
    with foreign_errors(partial(unreadable_config, folder)):
        return transformers.CONFIG_MAPPING[folder.model_type].from_dict(plain)


def unreadable_config(folder: BaseFolder, reason: str) -> ModelError:
    """The error for a config that a library could not make a model of, with its words."""
    return ModelError(
        "unreadable-base",
        f"transformers and mlx-lm cannot read the config: {reason}",
        where=str(folder.path / "config.json"),
        help="download the base again.",
    )


def _check_fields(config: Any, family: Family, where: str) -> None:
    for name, value in family.fixed.items():
        if getattr(config, name, value) != value:
            raise refused(where, f"{name}: {getattr(config, name)}")
    known = {*_SIZES, *family.reads, *family.fixed, *_WEIGHTLESS}
    plain = type(config)().to_dict()
    for name, value in config.to_dict().items():
        if name in plain and name not in known and value != plain[name]:
            raise refused(where, f"{name}: {value}")


def _translate_layers(
    config: Any, family: Family, arguments: dict[str, Any], head_dim: int, where: str
) -> tuple[tuple[Rope | None, ...], int, str]:
    """Rotary embeddings, windows and layer kinds; adds mlx-lm's spelling of them to `arguments`."""
    parameters = config.rope_parameters or {}
    if family.module == "gemma3_text":
        return _translate_gemma3(config, arguments, head_dim, where), 0, ""
    kind = parameters.get("rope_type", "default")
    if kind not in family.ropes:
        raise refused(where, f"rope_parameters.rope_type: {kind}")
    if kind == "longrope" and not parameters.get("factor"):
        factor = config.max_position_embeddings / parameters["original_max_position_embeddings"]
        parameters = {**parameters, "factor": factor}
    partial = parameters.get("partial_rotary_factor")
    if family.module == "phi3":
        arguments["partial_rotary_factor"] = partial or 1.0
    elif partial not in (None, 1.0):
        raise refused(where, f"rope_parameters.partial_rotary_factor: {partial}")
    rope = read_rope(parameters, head_dim, where)
    arguments["rope_theta"] = float(parameters["rope_theta"])
    arguments["rope_scaling"] = spell_rope(parameters)
    if family.module == "phi3" and kind == "linear":
        # Its ModelArgs asks for the key whatever the kind.
        arguments["rope_scaling"]["long_factor"] = None
    if family.module == "gemma2":
        del arguments["rope_scaling"], arguments["tie_word_embeddings"], arguments["max_position_embeddings"]
    used = getattr(config, "no_rope_layers", None) or [1] * config.num_hidden_layers
    longest, because = rope.longest, "its rope changes beyond that"
    window = getattr(config, "sliding_window", None)
    if window and not longest:
        longest, because = window, "mlx-lm does not build its sliding window"
    if window and longest > window:
        longest, because = window, "mlx-lm does not build its sliding window"
    return tuple(rope if one else None for one in used), longest, because


def _translate_gemma3(
    config: Any, arguments: dict[str, Any], head_dim: int, where: str
) -> tuple[Rope | None, ...]:
    local = config.rope_parameters["sliding_attention"]
    distant = config.rope_parameters["full_attention"]
    if local.get("rope_type", "default") != "default":
        raise refused(where, f"rope_parameters.sliding_attention.rope_type: {local['rope_type']}")
    if distant.get("rope_type", "default") not in ("default", "linear", "llama3", "yarn"):
        raise refused(where, f"rope_parameters.full_attention.rope_type: {distant['rope_type']}")
    arguments["sliding_window_pattern"] = _pattern(config.layer_types, where)
    arguments["sliding_window"] = config.sliding_window
    arguments["rope_local_base_freq"] = float(local["rope_theta"])
    arguments["rope_theta"] = float(distant["rope_theta"])
    arguments["rope_scaling"] = spell_rope(distant)
    del arguments["tie_word_embeddings"]
    kinds = {"sliding_attention": local, "full_attention": distant}
    read = {name: read_rope(parameters, head_dim, where) for name, parameters in kinds.items()}
    return tuple(read[kind] for kind in config.layer_types)


def _pattern(kinds: list[str], where: str) -> int:
    """The distance of mlx-lm's full-attention layers: every n-th layer is one, all others slide."""
    if "full_attention" in kinds:
        every = kinds.index("full_attention") + 1
        wanted = [
            "full_attention" if index % every == every - 1 else "sliding_attention"
            for index in range(len(kinds))
        ]
        if list(kinds) == wanted:
            return every
    raise refused(where, "layer_types")


class RescaledEmbedding(nn.Embedding):
    """An embedding whose rows come out multiplied by `ratio`; as a head it is plain."""

    def __call__(self, x: mx.array) -> mx.array:
        """Rows of the weight times the ratio."""
        return super().__call__(x) * self.ratio


def scale_exactly(model: Any, reading: Reading) -> None:
    """Give Gemma 3 the factor sqrt(hidden_size), which mlx-lm rounds to bf16 even in a float32 model.

    transformers rounds it to the model's own dtype.
    """
    embedding = model.model.embed_tokens
    if reading.module != "gemma3_text" or type(embedding) is not nn.Embedding:
        return
    exact = float(reading.arguments["hidden_size"]) ** 0.5
    rounded = float(np.array(mx.array(exact, mx.bfloat16).astype(mx.float32)))
    if rounded == exact:
        return
    rescaled = RescaledEmbedding.__new__(RescaledEmbedding)
    nn.Module.__init__(rescaled)
    rescaled.weight = embedding.weight
    rescaled.ratio = exact / rounded
    rescaled.freeze()
    model.model.embed_tokens = rescaled
