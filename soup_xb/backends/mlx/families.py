"""How mlx-lm is told what transformers means, for each model type: fields of config.json, weights, and patches.

`translate` gives a config as mlx-lm spells it. Which types are equal then, and for which values of which fields, is not
said here: `tests/families/prove.py` finds out by numbers (soup_xb.core.base.proven).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
from attrs import frozen

from soup_xb.backends.mlx import patches
from soup_xb.backends.mlx.patches import Patch

Config = dict[str, Any]
Weights = dict[str, mx.array]
# Types of which transformers opens the text part by itself for text, with that part's own config.
TEXT_ALONE = ("llama4", "qwen3_5", "qwen3_5_moe")
# A value, or what gives it from the text model's config.
Field = Any | Callable[[Config], Any]


@frozen(eq=False)
class Family:
    """One model type's row; an empty one is told by the shared translation alone.

    `module` is mlx-lm's, where it has not the type's name. `fields` are added to the text model's config, `top` to the
    whole config. `scaled`: mlx-lm multiplies rows of some weights, so that adapters there have to be multiplied too.
    `weights` changes what the files hold before mlx-lm's own `sanitize` sees it. `kept` are tensors, by
    the end of their names in the files and in the model, that `sanitize` would drop.
    """

    module: str = ""
    fields: Mapping[str, Field] = {}
    top: Callable[[Config], Config] | None = None
    weights: tuple[Callable[[Weights, Config], Weights], ...] = ()
    kept: Mapping[str, str] = {}
    patches: tuple[Patch, ...] = ()
    scaled: bool = False


def translate(config: Mapping[str, Any], family: Family) -> Config:
    """A config of transformers 5 as mlx-lm spells it."""
    whole: Config = {**config}
    if isinstance(whole.get("text_config"), dict):
        text = whole["text_config"] = {**whole["text_config"]}
        # transformers reads the whole config's flag, and of the vocabulary's sizes that of the text model.
        read = text if whole.get("model_type") in TEXT_ALONE else whole
        whole["tie_word_embeddings"] = text["tie_word_embeddings"] = bool(read.get("tie_word_embeddings"))
        whole["vocab_size"] = text.get("vocab_size")
    for part in (whole, whole.get("text_config")):
        if isinstance(part, dict):
            if "num_local_experts" in part:
                part.setdefault("num_experts", part["num_local_experts"])
            _spell_ropes(part)
    text = text_config(whole)
    for name, value in family.fields.items():
        text[name] = value(text) if callable(value) else value
    return family.top(whole) if family.top else whole


def text_config(config: Config) -> Config:
    """The text model's part of a config, which is all of it where there is no other."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _spell_ropes(part: Config) -> None:
    """`rope_parameters` in the spelling before transformers 5; of one for each kind of layer the global one."""
    parameters = part.get("rope_parameters")
    if not isinstance(parameters, dict) or not parameters:
        return
    distant = parameters
    if all(isinstance(each, dict) for each in parameters.values()):
        distant = parameters.get("full_attention") or next(iter(parameters.values()))
        if "sliding_attention" in parameters:
            part["rope_local_base_freq"] = parameters["sliding_attention"].get("rope_theta")
    part["rope_theta"] = distant.get("rope_theta")
    part["rope_scaling"] = spelled_scaling(distant)
    if "partial_rotary_factor" in distant:
        part["partial_rotary_factor"] = distant["partial_rotary_factor"]


def spelled_scaling(parameters: Mapping[str, Any]) -> dict[str, Any] | None:
    """`rope_scaling` of an entry of `rope_parameters`; None for the default kind."""
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return None
    told = {name: value for name, value in parameters.items() if value is not None and name != "rope_theta"}
    return {**told, "type": kind, "rope_type": kind}


def _renamed(*pairs: tuple[str, str]) -> Callable[[Weights, Config], Weights]:
    """Parts of names replaced by others."""

    def change(weights: Weights, _config: Config) -> Weights:
        renamed = {}
        for name, array in weights.items():
            for old, new in pairs:
                name = name.replace(old, new)
            renamed[name] = array
        return renamed

    return change


def _without(*parts: str) -> Callable[[Weights, Config], Weights]:
    """Without the tensors whose names hold one of the parts."""
    return lambda weights, _config: {
        name: array for name, array in weights.items() if not any(part in name for part in parts)
    }


def _dense_layers(config: Config) -> int:
    return list(config["mlp_layer_types"]).count("dense")


def _first_global(config: Config) -> int:
    return list(config["layer_types"]).index("full_attention") + 1


def _falcon_multipliers(weights: Weights, config: Config) -> Weights:
    """mlx-lm folds the multipliers into the weights, but for these two."""
    folded = {"k_proj.weight": "key_multiplier", "v_proj.weight": "attention_in_multiplier"}
    for name in weights:
        for end, multiplier in folded.items():
            if name.endswith(end):
                weights[name] = weights[name] * config[multiplier]
    return weights


def _gpt_oss_experts(weights: Weights, _config: Config) -> Weights:
    """Rows of gate and up take turns, and the stacks are (experts, in, out)."""
    told: Weights = {}
    for name, array in weights.items():
        stem, _, leaf = name.rpartition(".")
        if leaf in ("gate_up_proj", "gate_up_proj_bias"):
            rows = array if leaf.endswith("bias") else array.swapaxes(-1, -2)
            end = "bias" if leaf.endswith("bias") else "weight"
            told[f"{stem}.gate_proj.{end}"] = mx.contiguous(rows[:, ::2])
            told[f"{stem}.up_proj.{end}"] = mx.contiguous(rows[:, 1::2])
        elif leaf == "down_proj" and stem.endswith("experts"):
            told[f"{name}.weight"] = mx.contiguous(array.swapaxes(-1, -2))
        elif leaf == "down_proj_bias":
            told[f"{stem}.down_proj.bias"] = array
        else:
            told[name] = array
    return told


def _used_experts(weights: Weights, config: Config) -> Weights:
    """LongCat's zero experts pass their input on; the weights that transformers writes for them are never used."""
    found = {name: re.search(r"\.experts\.(\d+)\.", name) for name in weights}
    return {
        name: weights[name]
        for name, number in found.items()
        if number is None or int(number[1]) < config["n_routed_experts"]
    }


def _packed_experts(weights: Weights, _config: Config) -> Weights:
    """Experts that a file holds one by one, as stacks with gate and up in one."""
    stacks: dict[str, dict[tuple[str, int], mx.array]] = {}
    for name in list(weights):
        if found := re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight", name):
            stacks.setdefault(found[1], {})[found[3], int(found[2])] = weights.pop(name)
    for stem, experts in stacks.items():
        count = 1 + max(number for _, number in experts)
        gate, up, down = (
            mx.stack([experts[kind, number] for number in range(count)])
            for kind in ("gate_proj", "up_proj", "down_proj")
        )
        weights[f"{stem}.gate_up_proj"] = mx.concatenate([gate, up], axis=1)
        weights[f"{stem}.down_proj"] = down
    return weights


def _turned_experts(weights: Weights, config: Config) -> Weights:
    """(experts, out, in), as transformers 5 writes it, turned to the (experts, in, out) of older files."""
    hidden = text_config(config)["hidden_size"]
    return {
        name: mx.contiguous(array.swapaxes(-1, -2))
        if ".experts." in name and array.ndim == 3 and _is_turned(name, array, hidden)
        else array
        for name, array in weights.items()
    }


def _is_turned(name: str, array: mx.array, hidden: int) -> bool:
    return array.shape[-1 if name.endswith("gate_up_proj") else -2] == hidden


def _kernels_of_olmo(weights: Weights, config: Config) -> Weights:
    """A save of transformers cuts the packed kernel of queries, keys and values in three equal parts."""
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    values = config["linear_num_value_heads"] * config["linear_value_head_dim"]
    for name in [name for name in weights if name.endswith("q_conv1d.weight")]:
        names = [name.replace("q_conv1d", f"{kind}_conv1d") for kind in "qkv"]
        if weights[names[0]].shape[0] == keys and weights[names[2]].shape[0] == values:
            continue
        whole = mx.concatenate([weights[each] for each in names])
        for each, part in zip(names, mx.split(whole, [keys, 2 * keys]), strict=True):
            weights[each] = mx.contiguous(part)
    return weights


def _kernels_of_lfm2(weights: Weights, _config: Config) -> Weights:
    return {
        name: mx.contiguous(array.moveaxis(2, 1))
        if name.endswith("conv.conv.weight") and array.shape[-1] != 1
        else array
        for name, array in weights.items()
    }


def _dense_mlp_of_kimi(weights: Weights, _config: Config) -> Weights:
    """A save of transformers gives the MLP of a dense layer the experts' name."""
    experts = (".experts.", ".shared_experts.", ".gate.")
    return {
        name if any(part in name for part in experts) else name.replace(".block_sparse_moe.", ".mlp."): array
        for name, array in weights.items()
    }


def _outputs_of_bailing(weights: Weights, config: Config) -> Weights:
    """A save of transformers names every output projection `dense`, that of the linear layers too."""
    linear = [
        f".layers.{index}." for index, kind in enumerate(config["layer_types"]) if kind == "linear_attention"
    ]
    return {
        name.replace(".attention.dense.", ".attention.o_proj.")
        if any(part in name for part in linear)
        else name: array
        for name, array in weights.items()
    }


def _as_llama4(config: Config) -> Config:
    told = ("vocab_size", "tie_word_embeddings")
    return {"model_type": "llama4", "text_config": config, **{name: config.get(name) for name in told}}


def _kimi_attention(config: Config) -> Config:
    kinds = config["layer_types"]
    numbered = {
        kind: [index + 1 for index, each in enumerate(kinds) if each == kind] for kind in dict.fromkeys(kinds)
    }
    return {
        "kda_layers": numbered.get("linear_attention", []),
        "full_attn_layers": numbered.get("full_attention", []),
        "num_heads": config["linear_num_heads"],
        "head_dim": config["linear_head_dim"],
        "short_conv_kernel_size": config["linear_conv_kernel_dim"],
    }


def _bailing_v3(config: Config) -> Config:
    return {**config, "architectures": ["BailingMoeV3ForCausalLM"]}


def _same(name: str) -> Callable[[Config], Any]:
    """The value of another field."""
    return lambda config: config[name]


_WINDOWS = (patches.windows,)
_LFM2 = {"block_dim": _same("hidden_size"), "block_ff_dim": _same("intermediate_size")}
_SPARSE = {
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "moe_layer_freq": 1,
    "first_k_dense_replace": _dense_layers,
}
_LATENT_NORMS = patches.norm_eps(1e-6, "q_a_layernorm", "kv_a_layernorm")
_NAMES_OF_NANOCHAT = _renamed(
    ("model.embed_tokens", "transformer.wte"),
    ("model.layers.", "transformer.h."),
    (".self_attn.q_proj", ".attn.c_q"),
    (".self_attn.k_proj", ".attn.c_k"),
    (".self_attn.v_proj", ".attn.c_v"),
    (".self_attn.o_proj", ".attn.c_proj"),
    (".mlp.fc1", ".mlp.c_fc"),
    (".mlp.fc2", ".mlp.c_proj"),
)
_NAMES_OF_LFM2_VL = _renamed(("model.language_model.", "language_model.model."))
_LETTERS = {"sliding_attention": "L", "full_attention": "G"}

FAMILIES: dict[str, Family] = {
    "apertus": Family(fields={"mlp_bias": False, "post_norm": False, "qk_norm": True}),
    "bailing_hybrid": Family(
        "bailing_moe_v3",
        fields={
            "num_experts_per_tok": _same("num_experts_per_token"),
            "n_group": _same("num_expert_group"),
            "moe_shared_expert_intermediate_size": _same("moe_intermediate_size"),
            "max_position_embeddings": lambda config: config.get("model_max_length", 512),
            "first_k_dense_replace": _dense_layers,
            "q_lora_rank": lambda config: config.get("q_lora_rank"),
            "head_dim": _same("linear_head_dim"),
            "short_conv_kernel_size": _same("linear_conv_kernel_dim"),
        },
        top=_bailing_v3,
        weights=(_outputs_of_bailing,),
        patches=(patches.differentiable,),
    ),
    "deepseek_v32": Family(fields=_SPARSE, patches=(patches.norm_eps(1e-6, "k_norm"),)),
    "ernie4_5_moe": Family(
        kept={"mlp.gate.moe_statics.e_score_correction_bias": "mlp.e_score_correction_bias",
              "mlp.moe_statics.e_score_correction_bias": "mlp.e_score_correction_bias"},
        patches=(patches.correction_bias,),
    ),
    "exaone4": Family(
        fields={
            "sliding_window_pattern": lambda config: "".join(_LETTERS[kind] for kind in config["layer_types"])
        }
    ),
    "exaone_moe": Family(
        fields={"is_moe_layer": lambda config: [kind == "sparse" for kind in config["mlp_layer_types"]]}
    ),
    "falcon_h1": Family(weights=(_falcon_multipliers,), scaled=True),
    "falcon_mamba": Family("mamba"),
    "gemma": Family(patches=(patches.tanh_gelu,)),
    "gemma2": Family(patches=_WINDOWS),
    "gemma3": Family(fields={"sliding_window_pattern": _first_global}),
    "gemma3_text": Family(fields={"sliding_window_pattern": _first_global}),
    "gemma4_unified": Family("gemma4", fields={"hidden_size_per_layer_input": 0}),
    "glm4_moe_lite": Family(fields={"first_k_dense_replace": _dense_layers}, patches=(_LATENT_NORMS,)),
    "glm_moe_dsa": Family(fields=_SPARSE, patches=(patches.norm_eps(1e-6, "k_norm"),)),
    "gpt2": Family(
        fields={"n_ctx": _same("n_positions")},
        weights=(_renamed(("transformer.", "")),),
    ),
    "gpt_bigcode": Family(patches=(patches.tanh_gelu,)),
    "gpt_neox": Family(
        fields={"rotary_emb_base": _same("rope_theta"), "rotary_pct": _same("partial_rotary_factor")},
        patches=(patches.exact_gelu,),
    ),
    "gpt_oss": Family(weights=(_gpt_oss_experts,)),
    "granitemoehybrid": Family(
        fields={
            "layer_types": lambda config: [
                {"linear_attention": "mamba", "full_attention": "attention"}.get(kind, kind)
                for kind in config["layer_types"]
            ]
        }
    ),
    "iquestcoder": Family("llama"),
    "jamba": Family(patches=(patches.softmax_first,)),
    "kimi_k25": Family(
        weights=(
            _renamed((".model.blocks.", ".model.layers.")),
            _without("mm_projector", "vision_tower"),
        )
    ),
    "kimi_linear": Family(
        fields={
            "rope_theta": lambda config: config.get("rope_theta") or 10000.0,
            "model_max_length": lambda config: config.get("model_max_length") or 512,
            "linear_attn_config": _kimi_attention,
            "mla_use_nope": True,
            "first_k_dense_replace": _dense_layers,
        },
        weights=(_dense_mlp_of_kimi,),
        patches=(patches.norm_eps(1e-6, "kv_a_layernorm"), patches.differentiable),
    ),
    "lfm2": Family(fields=_LFM2),
    "lfm2_vl": Family(
        "lfm2-vl",
        fields=_LFM2,
        weights=(
            _NAMES_OF_LFM2_VL,
            _without("vision_tower", "multi_modal_projector", "lm_head"),
            _kernels_of_lfm2,
        ),
    ),
    "llama4": Family(patches=(patches.llama4_norm,)),
    "llama4_text": Family(
        "llama4",
        top=_as_llama4,
        weights=(_renamed(("model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")),),
        patches=(patches.llama4_norm,),
    ),
    "llava": Family("mistral3"),
    "longcat_flash": Family(
        fields={
            "attention_method": "MLA",
            "zero_expert_type": "identity",
            "mla_scale_q_lora": True,
            "mla_scale_kv_lora": True,
        },
        weights=(_used_experts,),
        patches=(_LATENT_NORMS,),
    ),
    "mamba2": Family(
        fields={"intermediate_size": lambda config: int(config["expand"] * config["hidden_size"])},
        patches=(patches.grouped_norm,),
    ),
    "mimo_v2_flash": Family(
        fields={
            "hybrid_layer_pattern": lambda config: [
                int(kind == "sliding_attention") for kind in config["layer_types"]
            ],
            "moe_layer_freq": lambda config: [int(kind == "sparse") for kind in config["mlp_layer_types"]],
            "add_swa_attention_sink_bias": True,
            "add_full_attention_sink_bias": False,
            "sliding_window_size": _same("sliding_window"),
            "n_shared_experts": None,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "layernorm_epsilon": _same("rms_norm_eps"),
            "swa_rope_theta": _same("rope_local_base_freq"),
            "swa_num_attention_heads": _same("num_attention_heads"),
            "swa_num_key_value_heads": lambda config: 2 * config["num_key_value_heads"],
            "swa_head_dim": _same("head_dim"),
            "swa_v_head_dim": _same("v_head_dim"),
        }
    ),
    "minicpm3": Family(patches=(patches.scaled_tied_head,)),
    "minimax_m2": Family(
        "minimax",
        fields={
            "shared_intermediate_size": 0,
            "rotary_dim": lambda config: int(config["head_dim"] * config["partial_rotary_factor"]),
        },
    ),
    "mistral": Family("llama", patches=_WINDOWS),
    "muse_glimmer": Family(weights=(_without("vision_", "vision."),)),
    "nanochat": Family(weights=(_NAMES_OF_NANOCHAT,), patches=(patches.function_norm_eps,)),
    "nemotron_h": Family(fields={"time_step_limit": lambda config: [config["time_step_min"], float("inf")]}),
    "olmo_hybrid": Family(
        weights=(
            _renamed(
                ("attention_layer_norm", "input_layernorm"),
                ("feedforward_layer_norm", "post_attention_layernorm"),
            ),
            _kernels_of_olmo,
        ),
        patches=(patches.differentiable,),
    ),
    "phi3": Family(patches=_WINDOWS),
    "qwen2": Family(patches=_WINDOWS),
    "qwen2_5_vl": Family("qwen2_vl"),
    "qwen3": Family(patches=_WINDOWS),
    "qwen3_5": Family(patches=(patches.differentiable,)),
    "qwen3_5_moe": Family(weights=(_packed_experts,), patches=(patches.differentiable,)),
    "qwen3_next": Family(patches=(patches.differentiable,)),
    "qwen3_vl_moe": Family(fields={"norm_topk_prob": True}, weights=(_turned_experts,)),
    "recurrent_gemma": Family(patches=(patches.unfinished_module,)),
    "solar_open": Family(
        fields={
            "first_k_dense_replace": 0,
            "partial_rotary_factor": lambda config: config.get("partial_rotary_factor") or 1.0,
            "intermediate_size": lambda config: config.get("intermediate_size") or config["moe_intermediate_size"],
        }
    ),
    "smollm3": Family(patches=_WINDOWS),
    "starcoder2": Family(patches=(patches.tanh_gelu, patches.windows)),
}  # fmt: skip
_PLAIN = Family()


def family_of(model_type: str) -> Family:
    """The type's row; one without a row needs nothing but the shared translation."""
    return FAMILIES.get(model_type, _PLAIN)
