"""Bases that see or hear: opened whole, opened as their text part and told so, or refused with their own message."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel

from soup_xb.backends.torch.session import open_session
from soup_xb.core.adapter.peft_file import saved_form, write_adapter
from soup_xb.core.base.modules import reachable_names
from soup_xb.core.errors import ModelError
from soup_xb.core.run.plan import Plan
from soup_xb.core.run.session import OptimizerSettings, SessionSettings, StepSettings

Attached = Callable[..., tuple[Any, Plan]]
TEXT = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def gemma3() -> Any:
    layers = {"head_dim": 8, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    return transformers.Gemma3Config(
        text_config=TEXT | layers, vision_config=VISION, mm_tokens_per_image=4, image_token_id=300,
        boi_token_index=301, eoi_token_index=302,
    )  # fmt: skip


def qwen3_5() -> Any:
    layers = {
        "head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
        "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32,
        "patch_size": 4, "num_position_embeddings": 16,
    }  # fmt: skip
    return transformers.Qwen3_5Config(text_config=TEXT | layers, vision_config=vision)


def qwen2_5_vl() -> Any:
    rope = {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}
    return transformers.Qwen2_5_VLConfig(text_config=TEXT | rope, vision_config=vision)


def llava() -> Any:
    text = {"model_type": "llama", **TEXT}
    vision = {"model_type": "clip_vision_model", "projection_dim": 32, **VISION}
    return transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=300)


def mllama() -> Any:
    text = TEXT | {"cross_attention_layers": [1], "rope_parameters": ROPE}
    return transformers.MllamaConfig(
        text_config=text, vision_config={"hidden_size": 32, "num_hidden_layers": 2}
    )


def gemma3_that_looks_ahead() -> Any:
    config = gemma3()
    config.text_config.use_bidirectional_attention = True
    return config


def saved(config: Any, folder: Path, tokenizer: Path) -> Path:
    """The whole model, as its makers would publish it."""
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.15)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer / file, folder / file)
    return folder


def stock_logits(base: Path, adapter: Path, tokens: Any) -> Any:
    config = transformers.AutoConfig.from_pretrained(base)
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForImageTextToText
    model = kind.from_pretrained(base, dtype=torch.float32)
    stock = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        return stock(input_ids=torch.tensor(tokens)).logits.numpy()


@pytest.mark.parametrize(
    ("config", "told"),
    [(gemma3, ""), (qwen3_5, "Qwen3_5ForCausalLM is the text part"), (qwen2_5_vl, ""), (llava, "")],
)
def test_text_trains_and_the_saved_adapter_fits_what_stock_peft_opens(
    attached: Attached, tiny_llama: Path, tmp_path: Path, config: Callable[[], Any], told: str
) -> None:
    base = saved(config(), tmp_path / "base", tiny_llama)
    session, plan = attached(base=base, gradient_checkpointing=True)
    notices = [problem.message for problem in session.notices()[1:]]
    assert [message.startswith(told) for message in notices] == ([True] if told else [])
    assert not any("vision" in adapter.name for adapter in plan.adapters.modules)
    for step in (1, 2):
        settings = StepSettings(step, 5e-3, plan.target_tokens(step))
        assert session.train_step(plan.micro_batches(step), settings).applied
    for name, factors in session.factors().items():
        assert np.abs(factors["lora_B"]).max() > 0, name
    names = reachable_names(session.describe().modules)
    write_adapter(tmp_path / "adapter", saved_form(plan.adapters, session.factors()), str(base), names)
    tokens = plan.rows[0].sequences[0].tokens[None]
    live = session.logits(tokens)
    np.testing.assert_allclose(stock_logits(base, tmp_path / "adapter", tokens), live, atol=1e-5)
    assert np.abs(live - session.logits(tokens, adapter=False)).max() > 1e-3


@pytest.mark.parametrize(
    ("config", "code"),
    [
        (gemma3_that_looks_ahead, "not-causal"),
        (mllama, "text-part-alone"),
    ],
)
def test_what_cannot_be_trained_on_text_is_refused_before_its_weights_are_read(
    tmp_path: Path, config: Callable[[], Any], code: str
) -> None:
    config().save_pretrained(tmp_path)
    optimizer = OptimizerSettings("sgd", 0.0, 0.0, 0.0, 0.0, 0.0)
    settings = SessionSettings(tmp_path, "fp32", "none", False, optimizer, seed=0, weights=False)
    with pytest.raises(ModelError) as caught:
        open_session(settings)
    problem = caught.value.problems[0]
    assert problem.code == code
    assert f"`{config().model_type}`" in problem.message
    assert "<class" not in problem.message
