"""The model types that hold experts as 3-D weights: found, adapted, and the same in stock PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel

from soup_xb.backends.torch.injection import lora_layers
from soup_xb.core.adapter.peft_file import read_adapter, saved_form, write_adapter
from soup_xb.core.base.modules import is_decoder_linear
from soup_xb.core.run.loop import Hooks, run_loop

Attached = Callable[..., Any]
# Latent attention rotates a part of its own size and shares no keys between heads.
_LATENT = {"head_dim": 4, "num_key_value_heads": 4}
_FAST: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "aria_text": {},
    "axk1": _LATENT,
    "bailing_hybrid": {},
    "cohere2_moe": {},
    "deepseek_v2": _LATENT,
    "deepseek_v32": _LATENT,
    "dots1": {},
    "ernie4_5_moe": {},
    "exaone_moe": {},
    "flex_olmo": {},
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 320,
    },
    "glm4_moe_lite": _LATENT,
    "granitemoe": {},
    "granitemoehybrid": {},
    "hunyuan_v1_moe": {},
    "inkling_text": {"n_shared_experts": 2},
    "jamba": {},
    "jetmoe": {},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"]},
    "longcat_flash": _LATENT,
    "minimax": {},
    "phimoe": {},
    "qwen3_5_moe_text": {},
    "qwen3_next": {},
    "solar_open": {},
}
_OTHERS: dict[str, dict[str, Any]] = {
    "axk2": _LATENT,
    "beam": {
        "num_hidden_layers": 4,
        "mlp_layer_types": ["dense", "sparse"] * 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "deepseek_v4": {
        "head_dim": 16,
        "num_key_value_heads": 1,
        "o_groups": 2,
        "o_lora_rank": 8,
        "hc_mult": 2,
        "layer_types": ["sliding_attention"] * 2,
        "mlp_layer_types": ["moe"] * 2,
    },
    "dots3_note": {
        **_LATENT,
        "layer_types": ["indexed_attention"] * 2,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "flint": {"mlp_only_layers": [0]},
    "glm_moe_dsa": _LATENT,
    "granitemoe_swa": {},
    "granitemoeshared": {},
    "hy_v3": {},
    "hy_v4": {},
    "inkling2_text": {},
    "kolibri1": {},
    "laguna": {},
    "mellum": {},
    "mimo_v2_flash": {},
    "minimax_m2": {},
    "minimax_m3_vl_text": {},
    "nemotron_h": {},
    "qwen4_exp_text": {},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
# PEFT loses the shared experts of laguna while it loads (its own files' too), and refuses `out_proj` of nemotron_h.
_TARGETS = {"laguna": (r"experts\..*", "q_proj"), "nemotron_h": (r"experts\..*", "q_proj")}


@pytest.mark.parametrize(
    "model_type", [*_FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in _OTHERS)]
)
def test_every_expert_weight_is_found_trained_and_the_same_in_stock_peft(
    attached: Attached, tiny_experts: Callable[..., Path], tmp_path: Path, model_type: str
) -> None:
    base = tiny_experts(model_type, **(_FAST | _OTHERS)[model_type])
    targets = _TARGETS.get(model_type, "auto+experts")
    lora = {"r": 2, "alpha": 4, "target_modules": targets}
    session, plan = attached(lora, base=base, max_steps=2, weight_decay=0.0)
    stacks = {adapter.name for adapter in plan.adapters.modules if adapter.experts}
    assert stacks == {
        name.replace(".base_layer", "")
        for name, parameter in session.model.named_parameters()
        if parameter.ndim == 3 and "conv" not in name and ".lora_" not in name
    }
    assert all(is_decoder_linear(name) for name in stacks)
    first, tokens = session._adapters.trained(), plan.rows[0].sequences[0].tokens[None]
    run_loop(plan, session, Hooks(lambda event: None, lambda step: None, lambda: 0), 0)
    last = session._adapters.trained()
    for name in stacks:
        assert all(np.abs(array - first[name][factor]).max() > 0 for factor, array in last[name].items()), (
            name
        )
    factors = session.factors()
    names = [module.name for module in session.describe().modules if not module.experts]
    write_adapter(tmp_path, saved_form(plan.adapters, factors), str(base), names)
    saved = read_adapter(tmp_path).factors
    assert saved.keys() == factors.keys()
    for name in stacks:
        np.testing.assert_array_equal(saved[name]["lora_B"], factors[name]["lora_B"])
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    stock = PeftModel.from_pretrained(model, tmp_path)
    reached = {name.removesuffix(".weight") for name in lora_layers(stock.base_model.model)}
    assert reached == {adapter.name.removesuffix(".weight") for adapter in plan.adapters.modules}
    with torch.no_grad():
        theirs = stock(input_ids=torch.tensor(tokens, dtype=torch.int64), use_cache=False).logits.numpy()
    live = session.logits(tokens)
    np.testing.assert_allclose(theirs, live, atol=1e-4)
    assert np.abs(live - session.logits(tokens, adapter=False)).max() > 1e-4
