"""What the coverage says of transformers' own mixture-of-experts models, built without memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from soup_xb.backends.torch.load import describe_model
from soup_xb.core.base.coverage import Coverage, cover
from soup_xb.core.base.layers import layers_text
from soup_xb.core.base.modules import resolve_adapters
from soup_xb.core.config.schema import LoraConfig

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "num_experts_per_tok": 2, "pad_token_id": 0,
}  # fmt: skip
DEEPSEEK = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8}
GEMMA = {
    "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
}  # fmt: skip

# Part -> (kinds in short, layers, weights), by model type and the settings that matter.
ALL = "layers 0-3"
TWO = ["gate_up_proj", "down_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[dict[str, Any], dict[str, tuple[list[str], str, int]]]] = {
    "mixtral": ({"num_local_experts": 4}, {"experts": (TWO, ALL, 8), "routers": (["gate"], ALL, 4)}),
    "olmoe": ({"num_experts": 4}, {"experts": (TWO, ALL, 8), "routers": (["gate"], ALL, 4)}),
    "qwen3_moe": (
        {"num_experts": 4, "mlp_only_layers": [2], "decoder_sparse_step": 1},
        {
            "experts": (TWO, "layers 0-1, 3", 6),
            "dense layers": (MLP, "layer 2", 3),
            "routers": (["gate"], "layers 0-1, 3", 3),
        },
    ),
    "qwen2_moe": (
        {"num_experts": 4, "decoder_sparse_step": 2, "shared_expert_intermediate_size": 16},
        {
            "experts": (TWO, "layers 1, 3", 4),
            "shared experts": (MLP, "layers 1, 3", 6),
            "dense layers": (MLP, "layers 0, 2", 6),
            "routers": (["shared_expert_gate", "gate"], "layers 1, 3", 4),
        },
    ),
    "deepseek_v3": (
        {**DEEPSEEK, "first_k_dense_replace": 2, "num_key_value_heads": 4, "qk_rope_head_dim": 8},
        {
            "experts": (TWO, "layers 2-3", 4),
            "shared experts": (MLP, "layers 2-3", 6),
            "dense layers": (MLP, "layers 0-1", 6),
            "routers": (["gate"], "layers 2-3", 2),
        },
    ),
    "glm4_moe": (
        {**DEEPSEEK, "first_k_dense_replace": 1},
        {
            "experts": (TWO, "layers 1-3", 6),
            "shared experts": (MLP, "layers 1-3", 9),
            "dense layers": (MLP, "layer 0", 3),
            "routers": (["gate"], "layers 1-3", 3),
        },
    ),
    "gpt_oss": ({"num_local_experts": 4}, {"experts": (TWO, ALL, 8), "routers": (["router"], ALL, 4)}),
    "llama4_text": (
        {"num_local_experts": 4, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 48},
        {
            "experts": (TWO, "layers 1, 3", 4),
            "shared experts": (MLP, "layers 1, 3", 6),
            "dense layers": (MLP, "layers 0, 2", 6),
            "routers": (["router"], "layers 1, 3", 2),
        },
    ),
    "granitemoe": ({"num_local_experts": 4}, {"experts": (TWO, ALL, 8), "routers": (["router"], ALL, 4)}),
    "granitemoeshared": (
        {"num_local_experts": 4, "shared_intermediate_size": 16},
        {
            "experts": (TWO, ALL, 8),
            "shared experts": (["input_linear", "output_linear"], ALL, 8),
            "routers": (["router"], ALL, 4),
        },
    ),
    "phimoe": ({"num_local_experts": 4}, {"experts": (TWO, ALL, 8), "routers": (["router"], ALL, 4)}),
    "gemma4_text": (
        GEMMA,
        {"experts": (TWO, ALL, 8), "shared experts": (MLP, ALL, 12), "routers": (["proj"], ALL, 4)},
    ),
}


def coverage_of(model_type: str, settings: dict[str, Any], targets: str = "auto") -> Coverage:
    config = transformers.CONFIG_MAPPING[model_type](**{**SIZES, **settings})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    base, lora = describe_model(model, {}), LoraConfig(r=2, target_modules=targets)
    return cover(base, resolve_adapters(base.modules, lora, {}).adapters, lora, {})


@pytest.mark.parametrize("model_type", CASES)
def test_the_parts_of_a_real_base_with_experts_are_told_apart(model_type: str) -> None:
    settings, expected = CASES[model_type]
    covered = coverage_of(model_type, settings)
    found = {}
    for part in covered.parts:
        (reach,) = (*part.adapted, *part.left)
        found[part.name] = (
            [kind.rpartition(".")[2] for kind in reach.kinds],
            layers_text(reach.layers),
            part.count,
        )
        assert bool(part.adapted) == (part.name in ("shared experts", "dense layers")), part.name
    assert found == expected
    assert covered.parts[0].experts == 4
    assert covered.warnings == ()


@pytest.mark.parametrize("model_type", CASES)
def test_auto_and_experts_adapts_every_part_but_the_routers(model_type: str) -> None:
    covered = coverage_of(model_type, CASES[model_type][0], "auto+experts")
    assert [part.name for part in covered.parts if part.left] == ["routers"]


@pytest.mark.parametrize(
    ("model_type", "settings", "reasons"),
    [
        (
            "qwen3_next",
            {"num_experts": 4, "layer_types": ["linear_attention", "full_attention"] * 2},
            {"layer_types: linear_attention", "layer_types: full_attention", ""},
        ),
        (
            "gemma4_text",
            {**GEMMA, "attention_k_eq_v": True},
            {"num_kv_shared_layers: 2", "layer_types: sliding_attention, num_kv_shared_layers: 2", ""},
        ),
        (
            "jamba",
            {"num_experts": 4, "attn_layer_period": 4, "attn_layer_offset": 1, "expert_layer_offset": 1},
            {"expert_layer_period: 2", "attn_layer_period: 4"},
        ),
    ],
)
def test_the_config_of_a_hybrid_base_says_why_its_layers_differ(
    model_type: str, settings: dict[str, Any], reasons: set[str]
) -> None:
    covered = coverage_of(model_type, settings)
    assert {reach.reason for reach in covered.patterns[0].reached} == reasons
    assert covered.warnings == ()


def test_a_base_without_experts_has_no_parts() -> None:
    covered = coverage_of("llama", {})
    assert covered.parts == ()
    assert [reach.layers for reach in covered.patterns[0].reached] == [(0, 1, 2, 3)]
