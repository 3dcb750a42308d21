from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from soup_xb.core.adapter_file import (
    adapter_folder,
    adapter_modules,
    adapter_settings,
    fit_factors,
    read_adapter,
    write_adapter,
)
from soup_xb.core.errors import ModelError
from soup_xb.core.modules import AdapterModule
from soup_xb.core.session import AdapterPlan

NAMES = [f"model.layers.{layer}.{name}" for layer in range(12) for name in ("q_proj", "v_proj", "o_proj")]


def plan(names: list[str], rank: int = 4, alpha: int = 8, **ranks: int) -> AdapterPlan:
    modules = []
    for name in names:
        own = ranks.get(name.rpartition(".")[2], rank)
        modules.append(AdapterModule(name, 6, 5, own, alpha, alpha / own))
    return AdapterPlan(tuple(modules), 0.0, "random", use_rslora=False, use_dora=False, seed=0)


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
    write_adapter(tmp_path, made, values, "some/base", NAMES)
    saved = read_adapter(tmp_path)
    assert saved.factors.keys() == values.keys()
    for name, arrays in values.items():
        for factor, array in arrays.items():
            np.testing.assert_array_equal(saved.factors[name][factor], array)
    assert {m.name: (m.rank, m.scale) for m in adapter_modules(saved, tmp_path)} == {
        m.name: (m.rank, m.scale) for m in made.modules
    }


def test_the_file_takes_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        made = plan(NAMES)
        write_adapter(tmp_path, made, factors(made), "some/base", NAMES)
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
    write_adapter(tmp_path, made, factors(made), "b", NAMES)
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
    write_adapter(tmp_path, made, factors(made), "b", NAMES)
    damage(tmp_path, how)
    with pytest.raises(ModelError) as caught:
        adapter_modules(read_adapter(tmp_path), tmp_path)
    assert caught.value.problems[0].code == code
    assert str(tmp_path) in caught.value.problems[0].where


def test_an_adapter_with_nan_is_refused(tmp_path: Path) -> None:
    made = plan(NAMES)
    values = factors(made)
    values[NAMES[3]]["lora_B"][0, 0] = np.nan
    write_adapter(tmp_path, made, values, "b", NAMES)
    with pytest.raises(ModelError, match="not finite") as caught:
        read_adapter(tmp_path)
    assert NAMES[3] in str(caught.value)
