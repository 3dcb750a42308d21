from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from soup_xb.core.adapter.starts import random_factor
from soup_xb.core.base.modules import (
    AdapterModule,
    Module,
    group_adapters,
    is_decoder_linear,
    resolve_adapters,
)
from soup_xb.core.base.patterns import matching_names
from soup_xb.core.config.schema import LoraConfig
from soup_xb.core.errors import ConfigError

SIDES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (128, 64),
    "mlp.up_proj": (128, 64),
    "mlp.down_proj": (64, 128),
}
MODULES = [
    *(Module(f"model.layers.{layer}.{name}", *sides) for layer in range(12) for name, sides in SIDES.items()),
    Module("lm_head", 1000, 64),
]


def ranks(**lora: object) -> dict[str, int]:
    resolution = resolve_adapters(MODULES, LoraConfig(**lora), {})  # type: ignore[arg-type]
    return {adapter.name: adapter.rank for adapter in resolution.adapters}


def problems(**lora: object) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        ranks(**lora)
    return {problem.code: f"{problem.message} {problem.help}" for problem in caught.value.problems}


def test_auto_reaches_every_decoder_linear_and_not_the_head() -> None:
    assert len(ranks()) == 12 * 7
    assert "lm_head" not in ranks()
    assert ranks(target_modules="all-linear") == ranks()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.mlp.shared_expert.up_proj", True),
        ("model.layers.3.mlp.shared_expert_gate", False),
        ("model.layers.3.block_sparse_moe.gate", False),
        ("model.layers.3.mlp.router", False),
        ("model.layers.3.mlp.router.proj", False),
        ("model.layers.3.self_attn.indexer.wq_b", False),
        ("transformer.h.0.attn.c_attn", True),
        ("model.language_model.layers.0.self_attn.q_proj", True),
        ("model.vision_tower.encoder.layers.0.self_attn.q_proj", False),
        ("model.visual.blocks.0.attn.qkv", False),
        ("model.audio_tower.layers.0.ffw_layer_1", False),
        ("model.multi_modal_projector.linear_1", False),
        ("model.embed_tokens", False),
    ],
)
def test_auto_stays_in_the_text_decoder_and_off_its_routers(name: str, expected: bool) -> None:
    assert is_decoder_linear(name) is expected


def test_a_pattern_matches_from_a_dot_to_the_end() -> None:
    names = ["model.q_proj", "q_proj", "model.layers.0.bq_proj", "model.q_proj.linear"]
    assert matching_names("q_proj", names) == ["model.q_proj", "q_proj"]
    assert matching_names("proj", names) == []


def test_an_alternation_in_a_pattern_stays_inside_it() -> None:
    names = ["a.q_proj", "a.v_proj", "a.k_proj", "v_projx"]
    assert matching_names("q_proj|v_proj", names) == ["a.q_proj", "a.v_proj"]


@pytest.mark.parametrize("pattern", ["*", "(", "a)|(b", "[z-a]"])
def test_text_that_is_no_regular_expression_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match="not a regular expression"):
        matching_names(pattern, ["a"])


def test_a_pattern_that_backtracks_without_end_is_refused_in_time() -> None:
    names = [f"model.layers.{index}.self_attn.q_proj" for index in range(80)]
    with pytest.raises(ConfigError, match="takes more than"):
        matching_names(r"(\w|\w\w|\.)+q", names)


def test_the_first_matching_key_decides() -> None:
    found = ranks(rank_pattern={r"layers\.0\..*q_proj": 4, "q_proj": 8, "v_proj": 2}, r=16)
    assert found["model.layers.0.self_attn.q_proj"] == 4
    assert found["model.layers.1.self_attn.q_proj"] == 8
    assert found["model.layers.10.self_attn.q_proj"] == 8
    assert found["model.layers.5.self_attn.v_proj"] == 2
    assert found["model.layers.5.self_attn.k_proj"] == 16


def test_keys_that_disagree_on_a_module_are_both_named_in_a_warning() -> None:
    lora = LoraConfig(rank_pattern={"q_proj": 8, r"layers\.0\..*": 4})
    (warning,) = resolve_adapters(MODULES, lora, {}).warnings
    assert warning.code == "patterns-disagree"
    assert "`q_proj`" in warning.message
    assert r"`layers\.0\..*`" in warning.message


def test_every_pattern_that_matches_nothing_is_named_with_close_names() -> None:
    text = problems(target_modules=("q_pro", "w_proj"))["pattern-without-module"]
    assert "`w_proj` matches none of the 85 adaptable modules" in text
    with pytest.raises(ConfigError) as caught:
        ranks(target_modules=("q_pro", "zzz"))
    assert len(caught.value.problems) == 2
    assert "q_proj" in caught.value.problems[0].help


def test_a_rank_for_a_module_that_is_no_target_is_refused() -> None:
    found = problems(target_modules=("q_proj",), rank_pattern={"v_proj": 8})
    assert "none that `target_modules` adapts" in found["pattern-outside-targets"]


def test_rank_above_the_smaller_side_warns_and_stops_pissa() -> None:
    (warning,) = resolve_adapters(MODULES, LoraConfig(r=48), {}).warnings
    assert "rank 48 is above 32" in warning.message
    assert "self_attn.k_proj" in warning.message
    assert "rank-above-side" in problems(r=48, init_strategy="pissa")


@given(st.integers(1, 64), st.integers(1, 128), st.booleans())
def test_scale_follows_rank_and_alpha_of_the_module(rank: int, alpha: int, rslora: bool) -> None:
    lora = LoraConfig(rank_pattern={"q_proj": rank}, alpha_pattern={"q_proj": alpha}, use_rslora=rslora)
    adapters = {a.name: a for a in resolve_adapters(MODULES, lora, {}).adapters}
    q = adapters["model.layers.0.self_attn.q_proj"]
    assert q.scale == pytest.approx(alpha / (rank**0.5 if rslora else rank))
    assert adapters["model.layers.0.self_attn.k_proj"].scale == pytest.approx(32 / (4 if rslora else 16))


def test_groups_count_what_is_alike() -> None:
    lora = LoraConfig(target_modules=("q_proj", "v_proj"), rank_pattern={"q_proj": 8})
    groups = group_adapters(resolve_adapters(MODULES, lora, {}).adapters)
    assert [(g.name, g.count, g.rank, g.parameters) for g in groups] == [
        ("q_proj", 12, 8, 12 * 8 * 128),
        ("v_proj", 12, 16, 12 * 16 * 96),
    ]


def test_random_factors_depend_on_seed_and_name_alone() -> None:
    adapter = AdapterModule("model.layers.0.q_proj", 64, 64, 8, 16, 2.0)
    other = AdapterModule("model.layers.1.q_proj", 64, 64, 8, 16, 2.0)
    factor = random_factor(adapter, seed=1)
    assert factor.shape == (8, 64)
    assert factor.dtype == np.float32
    assert np.abs(factor).max() <= 1 / 8
    assert factor.std() == pytest.approx(1 / 8 / 3**0.5, rel=0.1)
    np.testing.assert_array_equal(factor, random_factor(adapter, seed=1))
    assert not np.array_equal(factor, random_factor(adapter, seed=2))
    assert not np.array_equal(factor, random_factor(other, seed=1))


EXPERTS = [
    Module("model.layers.0.self_attn.q_proj", 64, 64),
    Module("model.layers.0.mlp.down_proj", 64, 128, by_weight=True),
    Module("model.layers.1.mlp.experts.gate_up_proj", 96, 64, experts=4),
    Module("model.layers.1.mlp.experts.down_proj", 64, 48, experts=4),
    Module("model.vision_tower.layers.1.mlp.experts.down_proj", 64, 48, experts=4),
]


def expert_ranks(**lora: object) -> dict[str, int]:
    resolution = resolve_adapters(EXPERTS, LoraConfig(**lora), {})  # type: ignore[arg-type]
    return {adapter.name.removeprefix("model.layers."): adapter.rank for adapter in resolution.adapters}


def test_auto_leaves_experts_out_and_auto_experts_adds_those_of_the_text_decoder() -> None:
    dense = {"0.self_attn.q_proj", "0.mlp.down_proj"}
    assert expert_ranks().keys() == dense
    stacks = {"1.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"}
    assert expert_ranks(target_modules="auto+experts").keys() == dense | stacks


def test_auto_experts_on_a_base_without_experts_is_refused() -> None:
    assert "`auto+experts` found no expert weights" in problems(target_modules="auto+experts")["no-experts"]


def test_one_rule_for_patterns_reaches_experts_too() -> None:
    assert list(expert_ranks(target_modules=r"model\.layers.*experts\.down_proj")) == [
        "1.mlp.experts.down_proj"
    ]
    assert list(expert_ranks(target_modules=("gate_up_proj",))) == ["1.mlp.experts.gate_up_proj"]
    assert len(expert_ranks(target_modules="down_proj")) == 3
    found = expert_ranks(target_modules="auto+experts", rank_pattern={r"experts\.down_proj": 2}, r=4)
    assert found["1.mlp.experts.down_proj"] == 2
    assert found["0.mlp.down_proj"] == found["1.mlp.experts.gate_up_proj"] == 4


def test_experts_count_their_own_factors_and_their_own_group() -> None:
    adapters = resolve_adapters(EXPERTS, LoraConfig(r=2, target_modules="auto+experts"), {}).adapters
    stack = next(adapter for adapter in adapters if adapter.name.endswith("experts.down_proj"))
    assert (stack.a_shape, stack.b_shape) == ((4, 2, 48), (4, 64, 2))
    assert stack.parameters == 4 * 2 * (48 + 64)
    assert random_factor(stack, seed=1).shape == stack.a_shape
    assert len(np.unique(random_factor(stack, seed=1))) > 4 * 2 * 48 * 0.99
    assert "experts.down_proj" in {group.name for group in group_adapters(adapters)}


@pytest.mark.parametrize(
    ("targets", "reason"),
    [
        ("gate_up_proj", "PEFT has no DoRA for 3-D experts"),
        ("mlp.down_proj", "reaches it by its weight alone"),
    ],
)
def test_dora_is_refused_where_peft_has_none(targets: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        expert_ranks(target_modules=targets, use_dora=True)


def test_a_rank_above_the_smaller_side_of_an_expert_stops_pissa() -> None:
    with pytest.raises(ConfigError, match="rank 50 is above 48"):
        expert_ranks(target_modules=r"model\.layers.*experts\.down_proj", r=50, init_strategy="pissa")
