"""Adapters of types whose modules lie elsewhere in mlx-lm: in stock PEFT, in stock mlx-lm and back, and merged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

# OpenBLAS goes in front of MLX's own before a test imports mlx.
import soup_xb.backends.mlx  # noqa: F401
from soup_xb.core.adapter.peft_file import read_adapter, saved_form, write_adapter
from soup_xb.core.base.modules import reachable_names
from soup_xb.runs.export import ExportOptions, export_adapter

MOE = ("qwen3_moe", "gpt_oss", "llama4_text", "mixtral", "granitemoe")


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """Every compiled function would call a compiler; the numbers are the same."""
    import mlx.core as mx

    mx.disable_compile()
    yield
    mx.enable_compile()


def trained(name: str, tmp_path: Path, backend: str = "mlx") -> tuple[Any, Path, Path]:
    """A trained session, its base, and its adapter as PEFT reads it."""
    from tiny import tiny_base
    from train import losses, opened

    base = tiny_base(name, tmp_path / "base")
    session, plan = opened(backend, base, "sft", max_steps=3, lr=2e-2)
    losses(session, plan)
    names = reachable_names(session.describe().modules)
    folder = tmp_path / f"adapter-{backend}"
    write_adapter(folder, saved_form(plan.adapters, session.factors()), str(base), names)
    return session, base, folder


def off(ours: Any, theirs: Any) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("name", [*MOE, "deepseek_v3", "gpt2", "falcon_h1"])
def test_stock_peft_reads_what_mlx_trained(name: str, tmp_path: Path) -> None:
    import transformers
    from peft import PeftModel
    from prove import tokens, torch_logits

    session, base, folder = trained(name, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    stock = PeftModel.from_pretrained(model, folder).eval()
    live = session.logits(tokens(40))
    assert off(live, session.logits(tokens(40), adapter=False)) > 1e-3
    assert off(live, torch_logits(stock, tokens(40))) <= 2e-5


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "mixtral", "gemma3", "minimax_m3_vl"])
def test_stock_mlx_lm_reads_what_is_exported_and_it_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    from mlx_lm.tuner.utils import load_adapters
    from prove import mlx_logits, on_mlx, tokens

    session, base, folder = trained(name, tmp_path)
    export_adapter(folder, tmp_path / "mlx", ExportOptions("mlx-lm"))
    _, model = on_mlx(base, name)
    adapted = load_adapters(model, str(tmp_path / "mlx"))
    adapted.eval()
    assert off(mlx_logits(adapted, tokens(40)), session.logits(tokens(40))) <= 1e-6
    export_adapter(tmp_path / "mlx", tmp_path / "back", ExportOptions("peft"))
    before, after = read_adapter(folder), read_adapter(tmp_path / "back")
    assert before.factors.keys() == after.factors.keys()
    for name, arrays in before.factors.items():
        rank = arrays["lora_A"].shape[-2]
        # mlx-lm has one rank: what was padded comes back padded.
        np.testing.assert_array_equal(after.factors[name]["lora_A"][..., :rank, :], arrays["lora_A"])
        assert not after.factors[name]["lora_A"][..., rank:, :].any()


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3", "gpt2", "falcon_h1", "gemma3"])
def test_a_model_merged_by_mlx_gives_what_base_and_adapter_give(name: str, tmp_path: Path) -> None:
    from prove import on_torch, tokens, torch_logits

    session, _, _ = trained(name, tmp_path)
    session.save_merged(tmp_path / "merged")
    assert off(torch_logits(on_torch(tmp_path / "merged"), tokens(40)), session.logits(tokens(40))) <= 2e-5


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("name", ["qwen3_moe", "llama4_text", "gpt_oss"])
def test_experts_that_mlx_lm_trained_apart_come_as_blocks_of_twice_the_rank(
    name: str, tmp_path: Path
) -> None:
    import json

    import mlx.core as mx
    import transformers
    from mlx.utils import tree_flatten
    from mlx_lm.models.switch_layers import SwitchLinear
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from peft import PeftModel
    from prove import mlx_logits, on_mlx, tokens, torch_logits
    from tiny import tiny_base

    base = tiny_base(name, tmp_path / "base")
    _, model = on_mlx(base, name)
    keys = [place for place, module in model.named_modules() if isinstance(module, SwitchLinear)]
    told = {"rank": 3, "scale": 2.0, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(model, 0, told)
    rng = np.random.default_rng(0)
    factors = {
        place: mx.array(rng.standard_normal(array.shape).astype(np.float32) * 0.1)
        for place, array in tree_flatten(model.parameters())
        if place.rpartition(".")[2] in ("lora_a", "lora_b")
    }
    model.load_weights(list(factors.items()), strict=False)
    folder = tmp_path / "mlx"
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), factors)
    settings = {"fine_tune_type": "lora", "model": str(base), "num_layers": 0, "lora_parameters": told}
    (folder / "adapter_config.json").write_text(json.dumps(settings), "utf-8")
    export_adapter(folder, tmp_path / "peft", ExportOptions("peft"))
    stock = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    stock = PeftModel.from_pretrained(stock, tmp_path / "peft").eval()
    assert off(mlx_logits(model, tokens(40)), torch_logits(stock, tokens(40))) <= 2e-5
