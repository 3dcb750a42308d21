from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve
from safetensors.numpy import load_file
from safetensors.torch import save_file as torch_file

from soup_xb.core.adapter.peft_file import (
    adapter_folder,
    adapter_modules,
    fit_factors,
    read_adapter,
    read_stored,
    saved_form,
    write_adapter,
)
from soup_xb.core.adapter.plan import AdapterPlan, adapter_settings
from soup_xb.core.adapter.readers import growth, misreadings, one_rank_scale, tensor_rank_scale
from soup_xb.core.adapter.tensors import read_tensors, write_tensors
from soup_xb.core.base.modules import AdapterModule, adapter_scale
from soup_xb.core.errors import ModelError

NAMES = [f"model.layers.{layer}.{name}" for layer in range(12) for name in ("q_proj", "v_proj", "o_proj")]


def plan(names: list[str], rank: int = 4, alpha: int = 8, **ranks: int) -> AdapterPlan:
    modules = []
    for name in names:
        own = ranks.get(name.rpartition(".")[2], rank)
        modules.append(AdapterModule(name, 6, 5, own, alpha, alpha / own))
    return AdapterPlan(tuple(modules), 0.0, "random", use_rslora=False, seed=0)


def factors(of: AdapterPlan) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return {
        module.name: {
            "lora_A": rng.normal(size=(module.rank, 5)).astype(np.float32),
            "lora_B": rng.normal(size=(6, module.rank)).astype(np.float32),
        }
        for module in of.modules
    }


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    made = plan(NAMES, v_proj=2)
    values = factors(made)
    write_adapter(tmp_path, saved_form(made, values), "some/base", NAMES)
    saved = read_adapter(tmp_path)
    assert saved.factors.keys() == values.keys()
    for name, arrays in values.items():
        for factor, array in arrays.items():
            np.testing.assert_array_equal(saved.factors[name][factor], array)
    assert {m.name: (m.rank, m.scale) for m in adapter_modules(saved, tmp_path)} == {
        m.name: (m.rank, m.scale) for m in made.modules
    }


def one_reader(folder: Path, rule: Callable[[dict[str, Any], AdapterModule], float]) -> dict[str, np.ndarray]:
    """What each module of the file adds to its weight, by a program's rule for the scale."""
    stored = read_stored(folder)
    return {
        module.name: rule(dict(stored.settings), module)
        * (stored.factors[module.name]["lora_B"] @ stored.factors[module.name]["lora_A"])
        for module in adapter_modules(stored, folder)
    }


RULES: dict[str, Callable[[dict[str, Any], AdapterModule], float]] = {
    "PEFT": lambda _, module: module.scale,
    "vLLM before 0.32": lambda settings, _: one_rank_scale(settings),
    "llama.cpp": tensor_rank_scale,
}
PATTERNS = {
    "one rank": {},
    "ranks": {"v_proj": 2},
    "ranks of no common factor": {"v_proj": 3, "o_proj": 5},
    "a large rank": {"o_proj": 12},
}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("ranks", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("rule", RULES)
def test_every_reader_adds_what_was_trained(
    tmp_path: Path, ranks: dict[str, int], rslora: bool, rule: str
) -> None:
    made = plan(NAMES, **ranks)
    if rslora:
        modules = [evolve(m, scale=adapter_scale(m.alpha, m.rank, rslora=True)) for m in made.modules]
        made = evolve(made, modules=tuple(modules), use_rslora=True)
    values = factors(made)
    write_adapter(tmp_path, saved_form(made, values), "b", NAMES)
    added = one_reader(tmp_path, RULES[rule])
    for module in made.modules:
        true = module.scale * (values[module.name]["lora_B"] @ values[module.name]["lora_A"])
        np.testing.assert_allclose(added[module.name], true, rtol=2e-6, atol=1e-5)
    settings = read_stored(tmp_path).settings
    assert settings["rank_pattern"] == settings["alpha_pattern"] == {}
    assert settings["use_rslora"] is False
    assert type(settings["lora_alpha"]) is int


def test_alphas_by_module_are_in_the_factors(tmp_path: Path) -> None:
    made = plan(NAMES)
    modules = [evolve(m, alpha=32, scale=8.0) if "v_proj" in m.name else m for m in made.modules]
    made = evolve(made, modules=tuple(modules))
    values = factors(made)
    form = saved_form(made, values)
    assert not form.rounded
    write_adapter(tmp_path, form, "b", NAMES)
    stored = read_stored(tmp_path)
    assert stored.settings["lora_alpha"] == 8
    name = "model.layers.0.v_proj"
    np.testing.assert_array_equal(stored.factors[name]["lora_B"], values[name]["lora_B"] * 4)


@pytest.mark.parametrize(("alpha", "exact"), [(8, True), (64, True), (6, False)])
def test_a_universal_adapter_unfolds_to_what_was_trained(tmp_path: Path, alpha: int, exact: bool) -> None:
    made = plan(NAMES, v_proj=2)
    modules = [evolve(m, alpha=alpha, scale=alpha / 2) if "v_proj" in m.name else m for m in made.modules]
    made = evolve(made, modules=tuple(modules))
    values = factors(made)
    form = saved_form(made, values)
    assert bool(form.rounded) is not exact
    write_adapter(tmp_path, form, "b", NAMES)
    saved = read_adapter(tmp_path)
    assert {m.name: (m.rank, m.alpha, m.scale) for m in adapter_modules(saved, tmp_path)} == {
        m.name: (m.rank, m.alpha, m.scale) for m in made.modules
    }
    for name, arrays in values.items():
        for factor, array in arrays.items():
            np.testing.assert_allclose(saved.factors[name][factor], array, rtol=0 if exact else 1.2e-7)


def test_factors_that_another_program_trained_on_are_taken_as_they_are(tmp_path: Path) -> None:
    made = plan(NAMES, v_proj=2)
    write_adapter(tmp_path, saved_form(made, factors(made)), "b", NAMES)
    file = tmp_path / "adapter_model.safetensors"
    tensors, metadata = read_tensors(file)
    tensors["base_model.model.model.layers.0.v_proj.lora_A.weight"][3] = 1.0
    write_tensors(file, tensors, metadata)
    assert {m.rank for m in adapter_modules(read_adapter(tmp_path), tmp_path)} == {4}


@pytest.mark.parametrize(
    "written",
    ["{", "[]", "{}", '{"use_rslora": false, "modules": {"a": [0, 1]}}', '{"use_rslora": 1, "modules": 3}'],
)
def test_ranks_in_the_header_that_were_never_written_are_damage(tmp_path: Path, written: str) -> None:
    made = plan(NAMES, v_proj=2)
    write_adapter(tmp_path, saved_form(made, factors(made)), "b", NAMES)
    file = tmp_path / "adapter_model.safetensors"
    write_tensors(file, read_tensors(file)[0], {"soup_xb": written})
    with pytest.raises(ModelError, match="in its header") as caught:
        read_adapter(tmp_path)
    assert caught.value.problems[0].code == "damaged-adapter"


def test_padding_that_makes_the_file_much_larger_is_left_out(tmp_path: Path) -> None:
    made = plan(NAMES, rank=1, o_proj=64)
    made = evolve(made, modules=tuple(evolve(m, alpha=m.rank, scale=1.0) for m in made.modules))
    one = evolve(made, modules=tuple(m for m in made.modules if "o_proj" not in m.name or ".0." in m.name))
    form = saved_form(one, factors(one))
    assert growth(one) > 4
    assert not form.is_universal
    write_adapter(tmp_path, form, "b", NAMES)
    stored = read_stored(tmp_path)
    [misread] = misreadings(stored.settings, adapter_modules(stored, tmp_path))
    assert misread.readers == ("vLLM before 0.32", "SGLang", "TensorRT-LLM", "llama.cpp")
    assert saved_form(one, factors(one), "universal").is_universal


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F64"])
def test_factors_are_read_in_other_formats(tmp_path: Path, dtype: str) -> None:
    made = plan(NAMES)
    values = factors(made)
    write_adapter(tmp_path, saved_form(made, values), "b", NAMES)
    file = tmp_path / "adapter_model.safetensors"
    stored = {name: torch.from_numpy(array) for name, array in load_file(file).items()}
    formats = {"BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
    torch_file({name: tensor.to(formats[dtype]) for name, tensor in stored.items()}, file)
    name = NAMES[0]
    expected = torch.from_numpy(values[name]["lora_A"]).to(formats[dtype]).float().numpy()
    np.testing.assert_array_equal(read_adapter(tmp_path).factors[name]["lora_A"], expected)


BESIDE = {
    "base_model.model.model.embed_tokens.lora_embedding_A": "LoRA factors of an embedding",
    "base_model.model.model.embed_tokens.weight": "whole weights",
    "base_model.model.lm_head.weight": "whole weights",
    "base_model.model.model.layers.0.q_proj.bias": "trained biases",
    "base_model.model.model.layers.0.q_proj.lora_B.bias": "a bias in the factors",
    "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": "trained rows of an embedding",
}


@pytest.mark.parametrize("key", BESIDE)
def test_more_than_factors_is_refused_as_what_it_is(tmp_path: Path, key: str) -> None:
    made = plan(NAMES)
    write_adapter(tmp_path, saved_form(made, factors(made)), "b", NAMES)
    file = tmp_path / "adapter_model.safetensors"
    write_tensors(file, {**load_file(file), key: np.ones((2, 2), np.float32)})
    with pytest.raises(ModelError, match=BESIDE[key]) as caught:
        read_adapter(tmp_path)
    assert caught.value.problems[0].code == "more-than-factors"
    assert "merge_and_unload" in caught.value.problems[0].help


@pytest.mark.parametrize("key", ["alora_invocation_tokens", "use_qalora", "arrow_config"])
def test_settings_of_another_model_are_refused(tmp_path: Path, key: str) -> None:
    made = plan(NAMES)
    write_adapter(tmp_path, saved_form(made, factors(made)), "b", NAMES)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: [1, 2]}))
    with pytest.raises(ModelError, match=key):
        read_adapter(tmp_path)


def test_the_file_takes_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        made = plan(NAMES)
        write_adapter(tmp_path, saved_form(made, factors(made)), "some/base", NAMES)
    finally:
        os.umask(before)
    mode = stat.S_IMODE((tmp_path / "adapter_model.safetensors").stat().st_mode)
    assert mode == 0o644


def test_targets_are_written_short_only_where_that_means_the_same() -> None:
    all_q = [name for name in NAMES if name.endswith("q_proj")]
    assert adapter_settings(plan(all_q), "b", NAMES)["target_modules"] == ["q_proj"]
    some = all_q[:3]
    assert adapter_settings(plan(some), "b", NAMES)["target_modules"] == sorted(some)


def test_ranks_that_differ_are_written_for_whole_names() -> None:
    settings = adapter_settings(plan(NAMES, v_proj=2), "b", NAMES)
    assert settings["r"] == 4
    assert settings["rank_pattern"][r"model\.layers\.0\.v_proj"] == 2
    assert len(settings["rank_pattern"]) == 12
    assert settings["init_lora_weights"] is True


def test_factors_for_another_scale_keep_their_product(tmp_path: Path) -> None:
    made = plan(NAMES, alpha=8)
    write_adapter(tmp_path, saved_form(made, factors(made)), "b", NAMES)
    target = plan(NAMES, alpha=32)
    fitted = fit_factors(read_adapter(tmp_path), target, tmp_path)
    name = NAMES[0]
    np.testing.assert_allclose(fitted[name]["lora_B"] * 8.0, factors(made)[name]["lora_B"] * 2.0, rtol=1e-6)


def test_a_run_s_output_folder_names_its_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    assert adapter_folder(tmp_path) == tmp_path / "adapter"
    (tmp_path / "adapter_config.json").write_text("{}")
    assert adapter_folder(tmp_path) == tmp_path


def damage(folder: Path, how: str) -> None:
    weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if how == "no settings":
        settings.unlink()
    elif how == "settings no JSON":
        settings.write_text("{")
    elif how == "settings a list":
        settings.write_text("[]")
    elif how == "no weights":
        weights.unlink()
    elif how == "half the weights":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif how == "empty weights":
        weights.write_bytes(b"")
    elif how == "rank zero":
        settings.write_text(json.dumps({"peft_type": "LORA", "lora_alpha": "8"}))


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ("no settings", "adapter-not-found"),
        ("settings no JSON", "damaged-adapter"),
        ("settings a list", "foreign-adapter"),
        ("no weights", "damaged-adapter"),
        ("half the weights", "damaged-adapter"),
        ("empty weights", "damaged-adapter"),
        ("rank zero", "damaged-adapter"),
    ],
)
def test_a_damaged_adapter_is_named(tmp_path: Path, how: str, code: str) -> None:
    made = plan(NAMES)
    write_adapter(tmp_path, saved_form(made, factors(made)), "b", NAMES)
    damage(tmp_path, how)
    with pytest.raises(ModelError) as caught:
        adapter_modules(read_adapter(tmp_path), tmp_path)
    assert caught.value.problems[0].code == code
    assert str(tmp_path) in caught.value.problems[0].where


def test_an_adapter_with_nan_is_refused(tmp_path: Path) -> None:
    made = plan(NAMES)
    values = factors(made)
    values[NAMES[3]]["lora_B"][0, 0] = np.nan
    write_adapter(tmp_path, saved_form(made, values), "b", NAMES)
    with pytest.raises(ModelError, match="not finite") as caught:
        read_adapter(tmp_path)
    assert NAMES[3] in str(caught.value)


LINEARS = ["model.layers.0.q_proj", "model.layers.0.mlp.down_proj"]
STACKS = ["model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"]


def expert_plan(rank: int = 2, **ranks: int) -> AdapterPlan:
    modules = [
        AdapterModule(LINEARS[0], 6, 5, rank, 8, 8 / rank),
        AdapterModule(LINEARS[1], 6, 5, rank, 8, 8 / rank, by_weight=True),
    ]
    for name in STACKS:
        own = ranks.get(name.rpartition(".")[2], rank)
        modules.append(AdapterModule(name, 6, 5, own, 8, 8 / own, experts=3))
    return AdapterPlan(tuple(modules), 0.1, "random", use_rslora=False, seed=0)


def expert_factors(of: AdapterPlan) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return {
        module.name: {
            "lora_A": rng.normal(size=module.a_shape).astype(np.float32),
            "lora_B": rng.normal(size=module.b_shape).astype(np.float32),
        }
        for module in of.modules
    }


@pytest.mark.parametrize("ranks", [{}, {"down_proj": 4}, {"gate_up_proj": 1, "down_proj": 3}])
def test_factors_of_experts_are_read_as_they_were_written(tmp_path: Path, ranks: dict[str, int]) -> None:
    made = expert_plan(**ranks)
    values = expert_factors(made)
    write_adapter(tmp_path, saved_form(made, values), "b", LINEARS)
    saved = read_adapter(tmp_path)
    assert saved.factors.keys() == values.keys()
    for name, arrays in values.items():
        for factor, array in arrays.items():
            np.testing.assert_array_equal(saved.factors[name][factor], array)
    assert sorted(adapter_modules(saved, tmp_path), key=lambda module: module.name) == sorted(
        made.modules, key=lambda module: module.name
    )


def test_experts_are_flat_in_the_file_under_nested_names(tmp_path: Path) -> None:
    made = expert_plan(down_proj=4)
    values = expert_factors(made)
    write_adapter(tmp_path, saved_form(made, values), "b", LINEARS)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1.mlp.experts"
    a, b = values[STACKS[1]]["lora_A"], values[STACKS[1]]["lora_B"]
    flat_a, flat_b = tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"]
    assert (flat_a.shape, flat_b.shape) == ((3 * 4, 5), (6, 4 * 3))
    for expert in range(3):
        for direction in range(4):
            np.testing.assert_array_equal(flat_a[expert * 4 + direction], a[expert, direction])
            np.testing.assert_array_equal(flat_b[:, direction * 3 + expert], b[expert, :, direction])
    assert f"{prefix}.base_layer.lora_A.weight" in tensors


def test_settings_name_expert_weights_whole_and_share_their_rank() -> None:
    settings = adapter_settings(expert_plan(rank=2, gate_up_proj=4, down_proj=4), "b", LINEARS)
    assert settings["target_modules"] == ["q_proj"]
    # PEFT takes the second linear's name for the experts' on some model types.
    assert settings["target_parameters"] == [f"{LINEARS[1]}.weight", *STACKS]
    assert settings["r"] == 4
    assert settings["rank_pattern"] == {
        r"model\.layers\.0\.q_proj": 2,
        r"model\.layers\.0\.mlp\.down_proj\.weight": 2,
    }
    # With a dropout PEFT would not load it.
    assert settings["lora_dropout"] == 0.0


@pytest.mark.parametrize(
    "targets",
    [
        ["down_proj", "gate_up_proj"],
        ["experts.down_proj", "mlp.experts.gate_up_proj"],
        list(reversed(STACKS)),
    ],
)
def test_expert_adapters_of_peft_are_read_however_it_names_them(tmp_path: Path, targets: list[str]) -> None:
    made = expert_plan()
    made = evolve(made, modules=(made.modules[0], *made.modules[2:]))
    values = expert_factors(made)
    write_adapter(tmp_path, saved_form(made, values), "b", LINEARS)
    edit_settings(tmp_path, target_parameters=targets)
    saved = read_adapter(tmp_path)
    for name, arrays in values.items():
        np.testing.assert_array_equal(saved.factors[name]["lora_B"], arrays["lora_B"])


def edit_settings(folder: Path, **changes: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"target_parameters": None}, "2 adapters for 0"),
        ({"target_parameters": STACKS[:1]}, "2 adapters for 1"),
        ({"r": 5}, "no stacks of rank 5"),
        ({"r": "2"}, "must be a positive integer, got '2'"),
        ({"r": True}, "must be a positive integer, got True"),
        ({"rank_pattern": []}, None),
        ({"rank_pattern": ["a"]}, "`rank_pattern` must be an object"),
    ],
)
def test_settings_that_do_not_explain_the_experts_are_damage(
    tmp_path: Path, changes: dict[str, object], match: str | None
) -> None:
    made = expert_plan()
    made = evolve(made, modules=made.modules[2:])
    write_adapter(tmp_path, saved_form(made, expert_factors(made)), "b", LINEARS)
    edit_settings(tmp_path, **changes)
    if match is None:
        assert read_adapter(tmp_path).factors.keys() == set(STACKS)
        return
    with pytest.raises(ModelError, match=match) as caught:
        read_adapter(tmp_path)
    assert caught.value.problems[0].code == "damaged-adapter"


def test_expert_factors_for_another_scale_keep_their_product(tmp_path: Path) -> None:
    made = expert_plan()
    values = expert_factors(made)
    write_adapter(tmp_path, saved_form(made, values), "b", LINEARS)
    target = evolve(made, modules=tuple(evolve(m, alpha=16, scale=8.0) for m in made.modules))
    fitted = fit_factors(read_adapter(tmp_path), target, tmp_path)
    np.testing.assert_allclose(fitted[STACKS[0]]["lora_B"] * 8, values[STACKS[0]]["lora_B"] * 4, rtol=1e-6)
