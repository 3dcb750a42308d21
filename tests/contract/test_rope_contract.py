"""Stretched positions: what transformers means by them, on both backends, and an adapter that tells of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from soup_xb.backends import open_session
from soup_xb.core.config.schema import Config, DataConfig, RopeScalingConfig, TrainingConfig
from soup_xb.core.errors import ConfigError, ModelError
from soup_xb.runs.open import session_settings

TOKENS = np.random.default_rng(0).integers(3, 250, (1, 300))
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
CASES = [
    *((backend, dict(scaling)) for backend in ("torch", "mlx") for scaling in (YARN, {**YARN, "type": "linear"})),
    ("torch", {"type": "dynamic", "factor": 2.0}),
]  # fmt: skip
for _, scaling in CASES:
    if scaling["type"] != "yarn":
        scaling.pop("original_max_position_embeddings", None)


def stock(base: Path, scaling: dict[str, Any] | None) -> Any:
    """transformers' own model with these positions."""
    config = transformers.AutoConfig.from_pretrained(base)
    if scaling is not None:
        config.rope_parameters.update({"rope_type": scaling["type"], **scaling})
    return transformers.AutoModelForCausalLM.from_pretrained(base, config=config, dtype=torch.float32).eval()


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


def open_with(backend: str, base: Path, scaling: dict[str, Any]) -> Any:
    training = TrainingConfig(precision="fp32", rope_scaling=RopeScalingConfig(**scaling))
    config = Config(base=str(base), data=DataConfig(train=("rows.jsonl",)), training=training)
    return open_session(backend, session_settings(config, base))


@pytest.mark.parametrize(("backend", "scaling"), CASES, ids=lambda value: str(value)[:24])
def test_the_base_has_the_logits_of_transformers_with_that_rope(
    backend: str, scaling: dict[str, Any], tiny_llama: Path
) -> None:
    session = open_with(backend, tiny_llama, scaling)
    found = session.logits(TOKENS)
    session.close()
    np.testing.assert_allclose(found, logits(stock(tiny_llama, scaling)), atol=2e-4)
    assert np.abs(found - logits(stock(tiny_llama, None))).max() > 0.05


def test_yarn_starts_from_the_length_that_the_base_was_made_for(tiny_llama: Path) -> None:
    session = open_with("torch", tiny_llama, {"type": "yarn", "factor": 4.0})
    rope = session.model.config.rope_parameters
    session.close()
    assert (rope["original_max_position_embeddings"], rope["factor"]) == (256, 4.0)


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_a_base_whose_rope_is_scaled_already_is_refused(
    backend: str, save_model: Callable[..., Path], tmp_path: Path
) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    base = save_model(tmp_path, transformers.LlamaConfig(**sizes, **heads, rope_parameters=rope))
    with pytest.raises(ModelError, match=r"scaled already \(`linear`\)") as refused:
        open_with(backend, base, YARN)
    assert refused.value.problems[0].code == "rope-not-scalable"


def test_a_base_without_rotary_positions_is_refused(save_model: Callable[..., Path], tmp_path: Path) -> None:
    base = save_model(tmp_path, transformers.GPT2Config(vocab_size=320, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(ModelError, match="not one rotary embedding"):
        open_with("torch", base, YARN)


@pytest.mark.parametrize(
    ("written", "code"),
    [
        ({"type": "yarn"}, "missing-key"),
        ({"factor": 2}, "key-without-effect"),
        ({"type": "linear", "factor": 2, "original_max_position_embeddings": 64}, "key-without-effect"),
        ({"type": "linear", "factor": 1}, "out-of-range"),
        ({"type": "ntk", "factor": 2}, "unknown-choice"),
    ],
)
def test_half_a_scaling_is_refused(written: dict[str, Any], code: str) -> None:
    from soup_xb.core.config.load import parse_config

    content = {"base": "tiny", "data": {"train": "a.jsonl"}, "training": {"rope_scaling": written}}
    with pytest.raises(ConfigError) as refused:
        parse_config(json.dumps(content), "soup.yaml")
    assert [problem.code for problem in refused.value.problems] == [code]


def test_vectors_are_of_the_base_as_it_stands() -> None:
    from soup_xb.core.config.load import parse_config

    content = {
        "base": "tiny",
        "task": "embedding",
        "data": {"train": "a.jsonl"},
        "training": {"rope_scaling": {"type": "linear", "factor": 2}},
    }
    with pytest.raises(ConfigError, match="sentence-transformers opens the base as it stands"):
        parse_config(json.dumps(content), "soup.yaml")


def test_the_adapter_says_which_base_it_is_for_and_is_opened_on_it(
    tiny_llama: Path, chat_file: Path, tmp_path: Path, monkeypatch: Any, soupx: Callable[..., Any]
) -> None:
    from peft import PeftModel

    from soup_xb.runs.adapters import TrainedOptions, open_trained

    monkeypatch.chdir(tmp_path)
    config = {
        "base": str(tiny_llama),
        "backend": "torch",
        "data": {"train": str(chat_file), "max_length": 128},
        "training": {"max_steps": 3, "lr": 1e-2, "rope_scaling": YARN, "lora": {"r": 4}},
        "output": "out",
    }
    (tmp_path / "soup.yaml").write_text(json.dumps(config))
    done = soupx("train", "--backend", "torch")
    assert done.code == 0, done.err
    assert "belongs to the base with `training.rope_scaling`" in done.err
    card = Path("out/adapter/README.md").read_text()
    assert "this adapter is for the base with the same setting" in card
    assert "config.rope_parameters.update({'rope_type': 'yarn', 'factor': 4.0" in card
    with pytest.warns(UserWarning, match="soup_xb_rope_parameters"):
        tuned = PeftModel.from_pretrained(stock(tiny_llama, YARN), "out/adapter").eval()
    expected = logits(tuned)
    for backend in ("torch", "mlx"):
        with open_trained(TrainedOptions(adapter=Path("out/adapter"), backend=backend)) as trained:
            np.testing.assert_allclose(trained.session.logits(TOKENS), expected, atol=2e-4)
        merged = soupx("merge", "out/adapter", "--output", f"merged-{backend}", "--backend", backend)
        assert merged.code == 0, merged.err
        model = transformers.AutoModelForCausalLM.from_pretrained(f"merged-{backend}", dtype=torch.float32)
        np.testing.assert_allclose(logits(model.eval()), expected, atol=2e-4)
