"""One config, two readings: transformers' logits and ours, for every model type that the MLX backend opens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from soup_xb.backends.mlx.session import MlxSession, open_session
from soup_xb.core.base.layers import layer_settings
from soup_xb.core.errors import ConfigError, ModelError
from soup_xb.core.run.session import OptimizerSettings, SessionSettings

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 30000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
THETA = {"rope_type": "default", "rope_theta": 500000.0}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [2.0] * 6, "original_max_position_embeddings": 64,
}  # fmt: skip
GEMMA3 = {
    "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 8, "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
IRREGULAR = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
WINDOWED = {"sliding_window": 8, "max_window_layers": 1}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama tied": ("llama", {"tie_word_embeddings": True, "rope_parameters": THETA}),
    "llama untied": ("llama", {"tie_word_embeddings": False}),
    "llama with biases and wide heads": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 20}),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama linear rope": ("llama", {"rope_parameters": LINEAR}),
    "llama yarn": ("llama", {"rope_parameters": YARN}),
    "llama yarn with mscale": (
        "llama", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 16}},
    ),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16, "rope_parameters": THETA}),
    "mistral beyond its window": ("mistral", {"sliding_window": 8}),
    "qwen2 with windows": ("qwen2", {"use_sliding_window": True, **WINDOWED}),
    "llama yarn with a gain": ("llama", {"rope_parameters": {**YARN, "attention_factor": 3.0}}),
    "llama yarn, not truncated": ("llama", {"rope_parameters": {**YARN, "truncate": False}}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "rope_parameters": THETA}),
    "qwen2 yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True, "head_dim": 16, "rope_parameters": THETA}),
    "qwen3 yarn": ("qwen3", {"tie_word_embeddings": False, "head_dim": 16, "rope_parameters": YARN}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4, "no_rope_layer_interval": 2, "rope_parameters": THETA}),
    "olmo2": ("olmo2", {"rope_parameters": THETA}),
    "granite": (
        "granite",
        {"logits_scaling": 0.5, "attention_multiplier": 0.2, "embedding_multiplier": 5.0,
         "residual_multiplier": 0.4, "tie_word_embeddings": True},
    ),
    "phi3": ("phi3", {"sliding_window": None, "rope_parameters": THETA}),
    "phi3 partly rotated, tied": (
        "phi3", {"tie_word_embeddings": True, "rope_parameters": {**THETA, "partial_rotary_factor": 0.5}},
    ),
    "phi3 longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}),
    "gemma2": ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 8}),
    "gemma3": ("gemma3_text", GEMMA3),
    "gemma3 untied": ("gemma3_text", {**GEMMA3, "tie_word_embeddings": False}),
    "gemma3 with two ropes": (
        "gemma3_text",
        {**GEMMA3, "rope_parameters": {"full_attention": LINEAR, "sliding_attention": {**THETA, "rope_theta": 900.0}}},
    ),
}  # fmt: skip
Saver = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Saver:
    def save_it(kind: str, **changes: Any) -> Path:
        torch.manual_seed(1)
        config = transformers.CONFIG_MAPPING[kind](**{**SIZES, **changes})
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.1 if parameter.ndim > 1 else 0.3)
        model.save_pretrained(tmp_path)
        return tmp_path

    return save_it


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **changes}), "utf-8")


def opened(folder: Path, **changes: Any) -> MlxSession:
    optimizer = OptimizerSettings("adamw", 0.9, 0.999, 1e-8, 0.0, 1.0)
    settings = {"precision": "fp32", "quantization": "none", "gradient_checkpointing": False, "seed": 0}
    return open_session(SessionSettings(base=folder, optimizer=optimizer, **{**settings, **changes}))


def torch_logits(folder: Path, tokens: Any) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


@pytest.mark.parametrize("case", CASES)
def test_logits_agree_with_transformers(save: Saver, case: str) -> None:
    kind, changes = CASES[case]
    folder = save(kind, **changes)
    tokens = np.random.default_rng(0).integers(0, 96, (2, 40))
    expected = torch_logits(folder, tokens)
    session = opened(folder)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(session.logits(tokens), expected, atol=1e-5 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("case", ["smollm3", "gemma3"])
def test_the_keys_that_tell_layers_apart_are_those_of_transformers(save: Saver, case: str) -> None:
    kind, changes = CASES[case]
    folder = save(kind, **changes)
    base = opened(folder, weights=False).describe()
    assert base.layer_settings == layer_settings(transformers.AutoConfig.from_pretrained(folder).to_dict())
    assert "layer_types" in base.layer_settings
    assert base.other_weights == ("model.embed_tokens",)


@pytest.mark.parametrize("case", ["llama tied", "llama untied", "granite", "gemma2", "gemma3"])
def test_the_head_on_trained_positions_gives_the_logits_of_the_full_head(save: Saver, case: str) -> None:
    import mlx.core as mx

    from soup_xb.backends.mlx.head import at_places, head_logits, hidden_states

    kind, changes = CASES[case]
    session = opened(save(kind, **changes))
    tokens = mx.array(np.random.default_rng(0).integers(0, 96, (2, 12)).astype(np.int32))
    positions = mx.array([3, 7, 20])
    full = np.array(session.model(tokens)).reshape(24, -1)
    part = np.array(head_logits(session.model, at_places(hidden_states(session.model, tokens), positions)))
    np.testing.assert_allclose(part, full[[3, 7, 20]], atol=1e-5)
    np.testing.assert_array_equal(np.array(session.model(tokens)).reshape(24, -1), full)


@pytest.mark.parametrize("case", CASES)
def test_rows_that_are_answered_together_have_the_logits_of_each_alone(save: Saver, case: str) -> None:
    """Prompts of different lengths, with a cache, a token at a time; Gemma 3's window is 8."""
    from soup_xb.backends.mlx.generation import _PaddedBatch

    kind, changes = CASES[case]
    session = opened(save(kind, **changes))
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 96, length + 14).astype(np.int32) for length in (1, 12, 5, 20)]
    batch = _PaddedBatch(session.model, [row[:-14] for row in rows], 14)
    following = (np.stack([row[place : place + 1] for row in rows]) for place in range(-14, -1))
    found = [batch.read_prompts(), *map(batch.read, following)]
    for index, row in enumerate(rows):
        alone = session.logits(row[None])[0, -15:-1]
        together = np.stack([logits[index] for logits in found])
        np.testing.assert_allclose(together, alone, atol=1e-5 * max(1.0, np.abs(alone).max()))


@pytest.mark.parametrize("case", ["gemma2", "gemma3", "llama tied"])
def test_several_rows_of_several_documents_have_the_logits_of_each_document(save: Saver, case: str) -> None:
    import mlx.core as mx

    from soup_xb.backends.mlx.head import head_logits, hidden_states

    kind, changes = CASES[case]
    session = opened(save(kind, **changes))
    tokens = np.random.default_rng(0).integers(0, 96, (2, 20)).astype(np.int32)
    documents = (np.arange(20) >= np.array([[7], [12]])).astype(np.int32)
    hidden = hidden_states(session.model, mx.array(tokens), mx.array(documents))
    for row, cut in enumerate((7, 12)):
        parts = [session.logits(part[None])[0] for part in (tokens[row, :cut], tokens[row, cut:])]
        found = np.array(head_logits(session.model, hidden[row]))
        np.testing.assert_allclose(found, np.concatenate(parts), atol=1e-5 * np.abs(found).max())


@pytest.mark.parametrize(
    ("kind", "changes", "field"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act: gelu"),
        ("llama", {"rope_parameters": {**LLAMA3, "rope_type": "dynamic"}}, "rope_type: dynamic"),
        ("llama", {"rope_parameters": {**YARN, "rope_type": "dynamic"}}, "rope_type: dynamic"),
        ("llama", {"rope_parameters": {**THETA, "twist": 0.5}}, "rope_parameters.twist"),
        ("llama", {"rope_parameters": {**THETA, "partial_rotary_factor": 0.5}}, "partial_rotary_factor: 0.5"),
        ("qwen3", {"attention_bias": True}, "attention_bias: True"),
        ("gemma3_text", {**GEMMA3, "final_logit_softcapping": 30.0}, "final_logit_softcapping: 30.0"),
        ("gemma3_text", {**GEMMA3, "layer_types": IRREGULAR}, "layer_types"),
    ],
)  # fmt: skip
def test_a_field_that_mlx_lm_would_read_differently_is_refused_by_name(
    save: Saver, kind: str, changes: dict[str, Any], field: str
) -> None:
    folder = save(kind, **{name: value for name, value in GEMMA3.items() if kind == "gemma3_text"})
    change_config(folder, **changes)
    with pytest.raises(ModelError, match=field) as raised:
        opened(folder)
    assert raised.value.problems[0].code == "mlx-misreads-base"


def test_a_field_that_a_later_transformers_adds_is_refused_by_name(
    save: Saver, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save("llama")
    cls = transformers.LlamaConfig
    plain = cls.to_dict
    monkeypatch.setattr(cls, "to_dict", lambda self: {**plain(self), "twist": getattr(self, "twist", 1)})
    opened(folder)
    change_config(folder, twist=2)
    with pytest.raises(ModelError, match="`twist: 2` would be read differently"):
        opened(folder)


def test_a_rope_that_mlx_lm_would_build_otherwise_takes_no_part(
    save: Saver, monkeypatch: pytest.MonkeyPatch
) -> None:
    from soup_xb.backends.mlx import reading

    folder = save("llama", rope_parameters=THETA)
    honest = reading.translate
    monkeypatch.setattr(reading, "translate", lambda *told: {**honest(*told), "rope_theta": 10000.0})
    tokens = np.arange(40)[None]
    np.testing.assert_allclose(opened(folder).logits(tokens), torch_logits(folder, tokens), atol=1e-5)


@pytest.mark.parametrize("case", ["phi3 longrope"])
def test_a_row_beyond_what_mlx_computes_alike_is_refused(save: Saver, case: str) -> None:
    kind, changes = CASES[case]
    session = opened(save(kind, **changes))
    assert any(notice.code == "longest-row" and "64 tokens" in notice.message for notice in session.notices())
    session.logits(np.ones((1, 64), dtype=np.int64))
    with pytest.raises(ModelError, match="exact up to 64"):
        session.logits(np.ones((1, 65), dtype=np.int64))


def test_a_key_that_transformers_does_not_know_does_not_reach_mlx_lm(save: Saver) -> None:
    folder = save("llama")
    tokens = np.arange(20)[None]
    before = opened(folder).logits(tokens)
    change_config(folder, rope_traditional=True, rope_theta=77.0)
    expected = torch_logits(folder, tokens)
    np.testing.assert_allclose(opened(folder).logits(tokens), expected, atol=1e-5)
    np.testing.assert_array_equal(before, opened(folder).logits(tokens))


def test_a_type_without_proof_is_refused(save: Saver) -> None:
    folder = save("bitnet")
    with pytest.raises(ConfigError, match="this is `bitnet`: mlx-lm builds only the packed layer") as raised:
        opened(folder)
    assert raised.value.problems[0].code == "mlx-no-model-type"


def test_a_missing_weight_is_named(save: Saver) -> None:
    from safetensors.numpy import load_file, save_file

    folder = save("llama")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing.*layers\.1\.mlp\.up_proj"):
        opened(folder)


def test_a_base_of_bitsandbytes_is_refused_with_the_row_of_the_table(save: Saver) -> None:
    folder = save("llama")
    change_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(ConfigError) as raised:
        opened(folder)
    assert raised.value.problems[0].code == "mlx-no-bitsandbytes"
