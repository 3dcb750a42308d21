from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from soup_xb.core.base.coverage import Coverage, cover
from soup_xb.core.base.coverage_text import coverage_json, coverage_notices, coverage_rows
from soup_xb.core.base.layers import (
    layer_reason,
    layer_rules,
    layer_settings,
    layers_text,
    place_of,
    short_names,
)
from soup_xb.core.base.modules import Module, resolve_adapters
from soup_xb.core.config.schema import LoraConfig
from soup_xb.core.run.session import BaseDescription

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
SHARED = ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj", "mlp.shared_experts.down_proj")
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
WHERE = {"training.lora.target_modules": "soup.yaml:7", "training.lora.rank_pattern": "soup.yaml:9"}


def base(
    layers: int,
    kinds: Callable[[int], Sequence[str]],
    others: Callable[[int], Sequence[str]] = lambda _: (),
    **settings: Any,
) -> BaseDescription:
    """A base whose layers hold these modules, 3-D where they are experts, beside these other weights."""
    modules = [
        Module(f"model.layers.{layer}.{kind}", 64, 32, experts=8 if kind in EXPERTS else 0)
        for layer in range(layers)
        for kind in kinds(layer)
    ]
    return BaseDescription(
        model_type="tiny",
        modules=(*modules, Module("lm_head", 100, 32)),
        parameters=sum(
            module.out_features * module.in_features * max(1, module.experts) for module in modules
        ),
        layers=layers,
        hidden_size=32,
        intermediate_size=64,
        vocabulary_size=100,
        other_weights=tuple(
            f"model.layers.{layer}.{kind}" for layer in range(layers) for kind in others(layer)
        ),
        layer_settings=settings,
    )


DENSE = base(30, lambda _: (*ATTENTION, *MLP))
MIXED = base(
    6,
    lambda layer: (*ATTENTION, *(MLP if layer < 1 else SHARED), *(EXPERTS if layer else ())),
    lambda layer: ("mlp.gate",) if layer else (),
    first_k_dense_replace=1,
)


def coverage(described: BaseDescription, **lora: Any) -> Coverage:
    config = LoraConfig(**lora)
    return cover(described, resolve_adapters(described.modules, config, WHERE).adapters, config, WHERE)


def told(covered: Coverage, backend: str = "torch") -> dict[str, str]:
    """The rows as one text each."""
    return {
        row.label: " | ".join([*row.texts, row.help]).strip(" |") for row in coverage_rows(covered, backend)
    }


def warned(covered: Coverage) -> list[tuple[str, str]]:
    return [(problem.code, problem.message) for problem in covered.warnings]


def test_a_plain_dense_base_is_one_row_and_says_nothing_at_the_start_of_a_run() -> None:
    covered = coverage(DENSE)
    assert told(covered) == {
        "auto": "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj in layers 0-29 (210)"
    }
    assert coverage_notices(covered, "torch") == []
    assert covered.warnings == ()


def test_every_target_and_every_pattern_tells_its_layers() -> None:
    covered = coverage(
        DENSE,
        target_modules=("q_proj", r"layers\.[0-7]\.mlp\..*"),
        rank_pattern={r"layers\.0\..*": 32, "q_proj": 8, "up_proj|gate_proj": 4},
        alpha_pattern={"q_proj": 4},
    )
    assert told(covered) == {
        "q_proj": "layers 0-29 (30)",
        r"layers\.[0-7]\.mlp\..*": "gate_proj, up_proj, down_proj in layers 0-7 (24), not in layers 8-29",
        r"rank_pattern layers\.0\..* = 32": "q_proj, gate_proj, up_proj, down_proj in layer 0 (4)",
        "rank_pattern q_proj = 8": "layers 1-29 (29)",
        "rank_pattern up_proj|gate_proj = 4": "gate_proj, up_proj in layers 1-7 (14)",
        "alpha_pattern q_proj = 4": "layers 0-29 (30)",
    }
    assert warned(covered) == []


def test_a_key_whose_modules_are_all_decided_before_it_says_so() -> None:
    covered = coverage(DENSE, rank_pattern={".*_proj": 8, "q_proj": 8})
    assert told(covered)["rank_pattern q_proj = 8"] == "nothing: earlier keys decide all that it matches"


@pytest.mark.parametrize("digit", [r"\d", "[0-9]"])
def test_a_pattern_of_one_digit_that_misses_the_later_layers_is_warned_about(digit: str) -> None:
    pattern = rf"layers\.{digit}\.self_attn\.q_proj"
    covered = coverage(DENSE, target_modules=(pattern, "v_proj"))
    assert warned(covered) == [
        ("layers-left-out", f"`{pattern}` reaches q_proj in layers 0-9, and not in layers 10-29")
    ]
    (problem,) = covered.warnings
    assert f"`{digit}+` is any number" in problem.help
    assert problem.where == "soup.yaml:7"
    assert coverage_notices(coverage(DENSE, target_modules=pattern), "torch") == []
    ranked = coverage(DENSE, rank_pattern={pattern: 8})
    assert [problem.where for problem in ranked.warnings] == ["soup.yaml:9"]


@pytest.mark.parametrize(
    "targets",
    [
        (r"layers\.\d+\.self_attn\.q_proj",),
        (r"layers\.\d\.self_attn\.q_proj", r"layers\.\d\d\.self_attn\.q_proj"),
        (r"layers\.[0-4]\.self_attn\.q_proj",),
        (r"layers\.(1|25)\.self_attn\.q_proj",),
        (r"layers\.\d\.self_attn\.q_proj", r"layers\.10\.self_attn\.q_proj"),
    ],
)
def test_patterns_that_reach_every_layer_or_name_layers_are_not_warned_about(
    targets: tuple[str, ...],
) -> None:
    covered = coverage(DENSE, target_modules=targets)
    assert covered.warnings == ()
    assert coverage_notices(covered, "torch") == []


def test_a_kind_that_only_some_layers_hold_is_told_with_the_config_s_reason_or_warned_about() -> None:
    def kinds(layer: int) -> Sequence[str]:
        return (*(ATTENTION if layer % 2 else ("linear_attn.in_proj",)), *MLP)

    reasoned = coverage(base(6, kinds, layer_types=["linear_attention", "full_attention"] * 3))
    assert told(reasoned)["auto"].split(" | ") == [
        "in_proj in layers 0, 2, 4 (3) [layer_types: linear_attention]",
        "gate_proj, up_proj, down_proj in layers 0-5 (18)",
        "q_proj, k_proj, v_proj, o_proj in layers 1, 3, 5 (12) [layer_types: full_attention]",
    ]
    assert warned(reasoned) == []
    silent = coverage(base(6, kinds, layer_types=["full_attention"] * 6, first_k_dense_replace=1))
    why = "of the base alone, not in layers {}, and nothing in its config says why"
    assert warned(silent) == [
        ("layers-differ", "in_proj is in layers 0, 2, 4 " + why.format("1, 3, 5")),
        ("layers-differ", "q_proj, k_proj, v_proj, o_proj are in layers 1, 3, 5 " + why.format("0, 2, 4")),
    ]


def test_layers_that_carry_no_adapter_are_told_unless_the_patterns_name_layers() -> None:
    hybrid = base(
        4, lambda layer: ATTENTION if layer % 2 else ("mamba.in_proj",), layer_types=["mamba", "full"] * 2
    )
    covered = coverage(hybrid, target_modules=("q_proj", "v_proj"))
    assert told(covered)["no adapter"] == "layers 0, 2"
    (notice,) = coverage_notices(covered, "torch")
    assert notice.message == "layers 0, 2 carry no adapter: they hold none of the targets"
    assert coverage_notices(coverage(hybrid), "torch") == []
    assert coverage_notices(coverage(hybrid, target_modules=r"layers\.1\.self_attn\.q_proj"), "torch") == []


def test_each_part_of_a_base_with_experts_is_named_as_adapted_or_not() -> None:
    covered = coverage(MIXED)
    experts = 5 * 2 * 8
    share = f"{experts / (experts + 5 * 3 + 3 + 6 * 4):.0%}"
    assert told(covered) == {
        "auto": "q_proj, k_proj, v_proj, o_proj in layers 0-5 (24) | "
        "mlp.gate_proj, mlp.up_proj, mlp.down_proj in layer 0 (3) [first_k_dense_replace: 1] | "
        "shared_experts.gate_proj, shared_experts.up_proj, shared_experts.down_proj in layers 1-5 (15) "
        "[first_k_dense_replace: 1]",
        "experts": "not adapted (experts.gate_up_proj, experts.down_proj in layers 1-5, 8 experts a layer, "
        f"{share} of the base's parameters) | `target_modules: auto+experts` adapts them too.",
        "shared experts": "adapted (shared_experts.gate_proj, shared_experts.up_proj, "
        "shared_experts.down_proj in layers 1-5)",
        "dense layers": "adapted (mlp.gate_proj, mlp.up_proj, mlp.down_proj in layer 0)",
        "routers": "not adapted (mlp.gate in layers 1-5)",
    }
    notices = coverage_notices(covered, "torch")
    assert [notice.message.partition(":")[0] for notice in notices] == list(told(covered))[1:]
    assert {(part.name, part.adapted_count, part.count) for part in covered.parts} == {
        ("experts", 0, 10),
        ("shared experts", 15, 15),
        ("dense layers", 3, 3),
        ("routers", 0, 5),
    }
    assert "--backend torch" in told(covered, "mlx")["experts"]


def test_experts_that_are_reached_count_as_adapted() -> None:
    covered = coverage(MIXED, target_modules=("q_proj", "experts.down_proj"))
    assert [(part.name, part.adapted_count, part.count) for part in covered.parts[:2]] == [
        ("experts", 5, 10),
        ("shared experts", 0, 15),
    ]
    assert told(covered)["experts"].startswith(
        "5 of 10 adapted (experts.down_proj in layers 1-5); not adapted:"
    )
    assert told(covered)["shared experts"].endswith("`target_modules: auto` adapts them too.")


def test_experts_that_are_linear_layers_of_their_own_are_experts_too() -> None:
    names = [f"block_sparse_moe.experts.{index}.w{which}" for index in range(8) for which in (1, 2, 3)]
    old = base(4, lambda _: (*ATTENTION, "block_sparse_moe.gate", *names))
    covered = coverage(old)
    assert told(covered)["auto"] == ("q_proj, k_proj, v_proj, o_proj, w1, w2, w3 in layers 0-3 (112)")
    assert told(covered)["experts"] == "adapted (w1, w2, w3 in layers 0-3, 8 experts a layer)"
    assert told(covered)["routers"] == "not adapted (gate in layers 0-3)"
    left = coverage(old, target_modules="q_proj")
    assert told(left, "mlx")["experts"].endswith("`target_modules: auto` adapts them too.")


def test_an_mlp_beside_the_experts_of_its_layer_is_a_shared_one() -> None:
    covered = coverage(base(3, lambda _: (*ATTENTION, *MLP, "router.proj", "experts.gate_up_proj")))
    assert {part.name: part.count for part in covered.parts} == {
        "experts": 3,
        "shared experts": 9,
        "routers": 3,
    }


def test_a_shared_mlp_beside_the_expert_block_and_a_gate_of_the_attention_are_told_from_it() -> None:
    names = (
        "self_attn.q_proj",
        "self_attn.gate",
        "shared_mlp.input_linear",
        "block_sparse_moe.experts.down_proj",
    )
    covered = coverage(base(3, lambda _: names, lambda _: ("block_sparse_moe.router",)))
    assert {part.name: part.count for part in covered.parts} == {
        "experts": 3,
        "shared experts": 3,
        "routers": 3,
    }
    assert told(covered)["left out"] == "gate in layers 0-2 (3)"


def test_experts_in_a_form_that_no_adapter_can_sit_on_are_told() -> None:
    odd = base(3, lambda _: ("self_attention.kv_proj", "mlp.router.layer"), lambda _: ("mlp.input_linear",))
    assert told(coverage(odd))["experts"] == (
        "not adapted (input_linear in layers 0-2) | no adapter can sit on them: their weights have a form of their own."
    )


def test_what_auto_leaves_out_besides_is_told() -> None:
    gated = base(3, lambda _: (*ATTENTION, "per_layer_input_gate"))
    tower = Module("model.vision_tower.encoder.layers.0.q_proj", 64, 32)
    described = BaseDescription("tiny", (*gated.modules, tower), 1, 3, 32, 64, 100)
    assert told(coverage(described))["left out"].split(" | ") == [
        "per_layer_input_gate in layers 0-2 (3)",
        "model.vision_tower.encoder.layers: q_proj in layer 0 (1)",
    ]
    assert "left out" not in told(coverage(described, target_modules="q_proj"))


def test_a_tower_s_layers_are_told_apart_from_the_decoder_s() -> None:
    stack = "model.vision_tower.layers"
    tower = [Module(f"{stack}.{layer}.{kind}", 64, 32) for layer in range(99) for kind in (*ATTENTION, *MLP)]
    described = evolve(MIXED, modules=(*tower, *MIXED.modules))
    covered = coverage(described, target_modules=("q_proj", "lm_head"))
    assert told(covered)["q_proj"] == f"{stack}: layers 0-98 (99) | layers 0-5 (6)"
    assert told(covered)["lm_head"] == "lm_head (1)"
    assert [part.count for part in covered.parts] == [part.count for part in coverage(MIXED).parts]


def test_a_target_that_reaches_a_wrapper_tells_the_linear_inside() -> None:
    inside = [
        Module(f"model.layers.{layer}.{kind}.linear", 64, 32, reached_as=f"model.layers.{layer}.{kind}")
        for layer in range(2)
        for kind in ATTENTION
    ]
    covered = coverage(evolve(DENSE, modules=tuple(inside)), target_modules="q_proj")
    assert told(covered)["q_proj"] == "q_proj.linear in layers 0-1 (2)"


def test_the_json_form_has_whole_names_and_every_layer() -> None:
    content = json.loads(json.dumps(coverage_json(coverage(MIXED))))
    dense = content["patterns"][0]["reached"][1]
    assert dense["modules"] == list(MLP)
    assert (dense["layers"], dense["reason"]) == ([0], "first_k_dense_replace: 1")
    assert content["parts"][0]["not_adapted"][0]["layers"] == [1, 2, 3, 4, 5]
    assert content["layers_without_adapter"] == []


@pytest.mark.parametrize(
    ("settings", "holds", "reason"),
    [
        ({"first_k_dense_replace": 3}, {0, 1, 2}, "first_k_dense_replace: 3"),
        ({"num_dense_layers": 1}, set(range(1, 12)), "num_dense_layers: 1"),
        ({"num_kv_shared_layers": 4}, set(range(8)), "num_kv_shared_layers: 4"),
        ({"decoder_sparse_step": 2}, {1, 3, 5, 7, 9, 11}, "decoder_sparse_step: 2"),
        ({"interleave_moe_layer_step": 4}, {3, 7, 11}, "interleave_moe_layer_step: 4"),
        ({"moe_layer_freq": 3}, {0, 3, 6, 9}, "moe_layer_freq: 3"),
        ({"moe_layer_freq": [0, 0] + [1] * 10}, set(range(2, 12)), "moe_layer_freq"),
        ({"mlp_only_layers": [0, 5]}, {0, 5}, "mlp_only_layers"),
        ({"moe_layers": [3, 7, 11]}, set(range(12)) - {3, 7, 11}, "moe_layers"),
        ({"mlp_layer_types": ["dense"] + ["sparse"] * 11}, {0}, "mlp_layer_types: dense"),
        ({"block_types": ["recurrent", "recurrent", "attention"]}, {2, 5, 8, 11}, "block_types: attention"),
        ({"expert_layer_period": 4, "expert_layer_offset": 1}, {1, 5, 9}, "expert_layer_period: 4"),
        (
            {"decoder_sparse_step": 2, "mlp_only_layers": [3]},
            {1, 5, 7, 9, 11},
            "decoder_sparse_step: 2, mlp_only_layers",
        ),
        (
            {"moe_layer_interval": 2, "moe_layer_start_index": 3, "moe_layer_end_index": 8},
            {3, 5, 7},
            "moe_layer_interval: 2, moe_layer_start_index: 3, moe_layer_end_index: 8",
        ),
        ({"first_k_dense_replace": 3}, {0, 1}, ""),
        ({"num_kv_shared_layers": 0, "decoder_sparse_step": 1, "mlp_only_layers": []}, {0}, ""),
        ({"full_attention_interval": 0, "layer_types": None, "moe_layer_freq": [[1]]}, {0}, ""),
    ],
)
def test_a_config_s_own_keys_explain_which_layers_hold_a_kind(
    settings: Mapping[str, Any], holds: set[int], reason: str
) -> None:
    config = {"hidden_size": 3, "rope_theta": 1e4, "time_step_limit": [0.0, 1.0], **settings}
    assert layer_reason(frozenset(holds), layer_rules(layer_settings(config), layers=12)) == reason


@given(st.sets(st.integers(0, 40)))
def test_layers_as_text_hold_the_same_layers(layers: set[int]) -> None:
    text = layers_text(layers)
    if "…" in text:
        assert text.count(",") == 6
        return
    found: set[int] = set()
    for part in text.removeprefix("no layer").removeprefix("layers").removeprefix("layer").split(","):
        first, _, last = part.strip().partition("-")
        found |= set(range(int(first), int(last or first) + 1)) if first else set()
    assert found == layers


@given(st.sets(st.from_regex(r"[ab](\.[ab0]){0,3}", fullmatch=True), min_size=1))
def test_short_names_are_endings_that_no_two_kinds_share(kinds: set[str]) -> None:
    names = short_names(sorted(kinds))
    assert len(set(names.values())) == len(kinds)
    assert all(kind == name or kind.endswith("." + name) for kind, name in names.items())


def test_a_module_outside_of_the_layers_has_no_layer() -> None:
    assert place_of("model.embed_tokens").layer == -1
    assert place_of("transformer.h.11.attn.c_attn") == place_of("transformer.h.11.attn.c_attn")
    assert place_of("transformer.h.11.attn.c_attn").kind == "attn.c_attn"
