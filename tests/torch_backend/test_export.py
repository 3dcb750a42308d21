from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from soup_xb.core.adapter.peft_file import saved_form, write_adapter
from soup_xb.core.adapter.plan import AdapterPlan
from soup_xb.core.base.modules import AdapterModule, Module
from soup_xb.core.base.rope import RopeScaling, note_scaling
from soup_xb.core.errors import ModelError, ResourceError
from soup_xb.runs.adapters import TrainedOptions, open_trained
from soup_xb.runs.export import ExportOptions, export_adapter, merge_adapter

TOKENS = np.array([[5, 9, 40, 77, 200, 31, 8]])


def save_random_adapter(base: Path, folder: Path, dora: bool = False) -> None:
    """An adapter whose ranks and scales differ from module to module, as a run of ours would save it."""
    with open_trained(TrainedOptions("torch", base=str(base))) as opened:
        modules = [m for m in opened.session.describe().modules if "layers" in m.name]
    rng = np.random.default_rng(0)
    adapters, factors = [], {}
    for index, module in enumerate(modules):
        rank, alpha = 2 + index % 3, 4 + index % 2
        adapters.append(
            AdapterModule(
                module.name, module.out_features, module.in_features, rank, alpha, alpha / rank, dora=dora
            )
        )
        factors[module.name] = {
            "lora_A": rng.normal(size=(rank, module.in_features)).astype(np.float32) * 0.1,
            "lora_B": rng.normal(size=(module.out_features, rank)).astype(np.float32) * 0.1,
        }
        if dora:
            magnitude = rng.uniform(0.5, 2.0, module.out_features).astype(np.float32)
            factors[module.name]["lora_magnitude_vector"] = magnitude
    plan = AdapterPlan(tuple(adapters), 0.0, "random", use_rslora=False, seed=0)
    write_adapter(folder, saved_form(plan, factors), str(base), names(modules))


def names(modules: list[Module]) -> list[str]:
    return [module.name for module in modules]


def live_logits(base: Path, adapter: Path) -> tuple[np.ndarray, np.ndarray]:
    with open_trained(TrainedOptions("torch", adapter, str(base))) as opened:
        return opened.session.logits(TOKENS), opened.session.logits(TOKENS, adapter=False)


def stock_mlx_lm_logits(base: Path, adapter: Path, **settings: object) -> np.ndarray:
    import soup_xb.backends.mlx  # isort: skip - loads the fast BLAS before mlx, where there is one
    import mlx.core as mx
    from mlx_lm import load

    assert soup_xb.backends.mlx.__doc__
    model, _ = load(str(base), adapter_path=str(adapter), model_config=settings)
    return np.array(model(mx.array(TOKENS)).astype(mx.float32))


@pytest.fixture
def adapter(tiny_llama: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    save_random_adapter(tiny_llama, folder)
    return folder


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_stock_mlx_lm_gives_the_logits_of_the_exported_adapter(
    tiny_llama: Path, tmp_path: Path, dora: bool
) -> None:
    source, target = tmp_path / "adapter", tmp_path / "exported"
    save_random_adapter(tiny_llama, source, dora)
    export_adapter(source, target, ExportOptions("mlx-lm"))
    live, base = live_logits(tiny_llama, source)
    np.testing.assert_allclose(stock_mlx_lm_logits(tiny_llama, target), live, atol=1e-4)
    assert np.abs(live - base).max() > 1e-2


def test_an_adapter_comes_back_from_mlx_lm_s_form(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    export_adapter(adapter, tmp_path / "there", ExportOptions("mlx-lm"))
    export_adapter(tmp_path / "there", tmp_path / "back", ExportOptions("peft", str(tiny_llama)))
    np.testing.assert_allclose(
        live_logits(tiny_llama, tmp_path / "back")[0], live_logits(tiny_llama, adapter)[0], atol=1e-5
    )


@pytest.mark.parametrize("original", [64, 0], ids=["length", "the base's length"])
@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_stock_mlx_lm_stretches_positions_as_the_exported_adapter_says(
    adapter: Path, tiny_llama: Path, tmp_path: Path, kind: str, original: int
) -> None:
    note_scaling(adapter, RopeScaling(kind, 4.0, original))
    target = tmp_path / "exported"
    notice, _ = export_adapter(adapter, target, ExportOptions("mlx-lm", str(tiny_llama)))
    written = re.search(r"model_config=({.*})\)\n", (target / "README.md").read_text())
    assert written
    assert written[1] in notice.message
    stretched = stock_mlx_lm_logits(tiny_llama, target, **json.loads(written[1]))
    live, _ = live_logits(tiny_llama, adapter)
    np.testing.assert_allclose(stretched, live, atol=1e-4)
    assert np.abs(stock_mlx_lm_logits(tiny_llama, target) - live).max() > 1e-2
    export_adapter(target, tmp_path / "back", ExportOptions("peft", str(tiny_llama)))
    np.testing.assert_allclose(live_logits(tiny_llama, tmp_path / "back")[0], live, atol=1e-5)


def test_positions_that_mlx_lm_stretches_otherwise_are_refused(adapter: Path, tmp_path: Path) -> None:
    note_scaling(adapter, RopeScaling("dynamic", 2.0))
    with pytest.raises(ModelError, match="which mlx-lm computes otherwise"):
        export_adapter(adapter, tmp_path / "exported", ExportOptions("mlx-lm"))
    assert not (tmp_path / "exported").exists()


def test_the_merged_model_stands_alone(adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    merge_adapter(TrainedOptions("torch", adapter, str(tiny_llama), "base"), tmp_path / "merged")
    with open_trained(TrainedOptions("torch", base=str(tmp_path / "merged"))) as opened:
        merged = opened.session.logits(TOKENS)
    np.testing.assert_allclose(merged, live_logits(tiny_llama, adapter)[0], atol=1e-5)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


def test_nothing_is_written_over(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="already exists"):
        export_adapter(adapter, tmp_path, ExportOptions("mlx-lm"))


def test_an_export_to_the_form_that_it_has_is_refused(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="already is in peft's form"):
        export_adapter(adapter, tmp_path / "new", ExportOptions("peft"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora_parameters": {"scale": "big"}}, "must be a number"),
        ({}, "must be a number"),
        ({"fine_tune_type": "full"}, "is no adapter"),
        ([], "must be an object"),
    ],
)
def test_a_damaged_mlx_lm_adapter_is_named(
    adapter: Path, tmp_path: Path, settings: object, words: str
) -> None:
    folder = tmp_path / "there"
    export_adapter(adapter, folder, ExportOptions("mlx-lm"))
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=words):
        export_adapter(folder, tmp_path / "back", ExportOptions("peft"))
