"""Modules that no row of text runs through, a second name for a wrapped linear, and Gemma 4's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from soup_xb.core.base.folder import inspect_base
from soup_xb.core.base.modules import Module, group_adapters, resolve_adapters
from soup_xb.core.base.towers import check_towers, is_gemma4
from soup_xb.core.config.load import parse_config
from soup_xb.core.config.schema import LoraConfig
from soup_xb.core.errors import ConfigError

TEXT = [Module(f"model.language_model.layers.{layer}.self_attn.q_proj", 64, 32) for layer in range(3)]
TOWER = [
    Module(f"{name}.linear", 32, 32, reached_as=name)
    for name in ("model.vision_tower.layers.0.self_attn.q_proj", "model.audio_tower.layers.0.self_attn.post")
]


def resolve(*targets: str, **lora: Any) -> dict[str, tuple[int, int | float]]:
    resolution = resolve_adapters([*TEXT, *TOWER], LoraConfig(target_modules=targets, **lora), {})
    return {adapter.name: (adapter.rank, adapter.alpha) for adapter in resolution.adapters}


def test_a_pattern_reaches_a_module_by_either_name_and_lands_on_its_own() -> None:
    inner = [module.name for module in TOWER]
    assert list(resolve("q_proj")) == [*(module.name for module in TEXT), inner[0]]
    assert list(resolve("layers.1.self_attn.q_proj", "post")) == [TEXT[1].name, inner[1]]
    assert list(resolve("layers.1.self_attn.q_proj", "post.linear")) == [TEXT[1].name, inner[1]]
    assert list(resolve("language_model.*", "linear"))[3:] == inner


def test_keys_of_the_maps_reach_a_module_by_either_name() -> None:
    found = resolve("q_proj", "post", rank_pattern={"post": 2}, alpha_pattern={"q_proj.linear": 3})
    assert found[TOWER[1].name] == (2, 32)
    assert found[TOWER[0].name] == (16, 3)
    assert found[TEXT[0].name] == (16, 32)


def test_close_names_are_those_of_the_wrappers() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve("posts")
    assert "close names: post." in str(caught.value)


def test_modules_in_towers_are_told_and_text_alone_is_silent() -> None:
    modules = [*TEXT, *TOWER]
    warnings = resolve_adapters(modules, LoraConfig(target_modules=("q_proj", "post")), {}).warnings
    assert [problem.code for problem in warnings] == ["no-gradient"]
    assert (
        "2 adapted modules in the vision and audio towers get no gradient from text rows"
        in warnings[0].message
    )
    assert resolve_adapters(modules, LoraConfig(), {}).warnings == ()


def test_towers_alone_are_refused_because_nothing_would_be_trained() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve("post", "vision_tower.*")
    assert [problem.code for problem in caught.value.problems] == ["towers-alone"]


def test_a_group_of_wrapped_linears_has_the_name_of_its_wrappers() -> None:
    resolution = resolve_adapters([*TEXT, *TOWER], LoraConfig(target_modules=("q_proj", "post")), {})
    assert [group.name for group in group_adapters(resolution.adapters)] == [
        "q_proj",
        "q_proj.linear",
        "post.linear",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "google/gemma-4-E2B-it",
        "Gemma4",
        "gemma4_text",
        "my_gemma4_tune",
        "/models--google--gemma-4-31B/snapshots/a1",
    ],
)
def test_names_of_gemma_4_are_known(name: str) -> None:
    assert is_gemma4("other", name)


@pytest.mark.parametrize(
    "name", ["mygemma4ish", "gemma-3-4b-it", "gemma-41b", "gemma", "agemma-4", "gemma4x", ""]
)
def test_names_that_look_alike_are_not(name: str) -> None:
    assert not is_gemma4(name)


def check(tmp_path: Path, targets: str, backend: str = "mlx", **config: Any) -> None:
    config = {"model_type": "gemma4", "vision_config": {"hidden_size": 8}, "audio_config": None, **config}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    text = f"base: {tmp_path}\ndata: {{train: a.jsonl}}\ntraining:\n  lora: {{target_modules: {targets}}}\n"
    check_towers(parse_config(text, "soup.yaml"), inspect_base(tmp_path, weights=False), backend)


@pytest.mark.parametrize(
    "targets", ["[q_proj]", "[nothing, post]", r"'.*layers\.1\.mlp\..*'", "[gate_proj.linear]"]
)
def test_mlx_refuses_targets_in_towers_that_it_does_not_open(tmp_path: Path, targets: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(tmp_path, targets, audio_config={"hidden_size": 8})
    assert [problem.code for problem in caught.value.problems] == ["mlx-no-towers"]
    assert caught.value.problems[0].where == "soup.yaml:4: training.lora.target_modules"
    check(tmp_path, targets, "torch")


@pytest.mark.parametrize(
    "targets", ["auto", "all-linear", "[post]", r"'language_model\..*'", "[per_layer_projection]"]
)
def test_mlx_takes_targets_of_the_text_tower(tmp_path: Path, targets: str) -> None:
    check(tmp_path, targets)


def test_a_base_without_towers_or_of_another_kind_is_not_asked_about_towers(tmp_path: Path) -> None:
    check(tmp_path, "[q_proj]", vision_config=None)
    check(tmp_path, "[q_proj]", model_type="gemma3")
