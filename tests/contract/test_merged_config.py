"""A merged model computes the same in transformers and in stock mlx-lm, whichever backend wrote it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from soup_xb.core.base import model_config
from soup_xb.core.base.model_config import ConfigChanges, changed_config

TOKENS = np.random.default_rng(0).integers(3, 250, (1, 200))
ROPE = {"rope_theta": 30_000.0}
SCALED: dict[str, dict[str, Any]] = {
    "linear": {**ROPE, "rope_type": "linear", "factor": 4.0},
    "llama3": {
        **ROPE, "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    },
    "yarn": {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}  # fmt: skip
SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "rope_parameters": ROPE,
}  # fmt: skip
TYPES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 16},
    "mistral": {"head_dim": 16, "sliding_window": None},
    "phi3": {"original_max_position_embeddings": 512, "sliding_window": None},
    "smollm3": {},
    "olmo2": {},
    "granite": {"logits_scaling": 0.5, "embedding_multiplier": 5.0, "residual_multiplier": 0.4},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 512},
    "gemma3_text": {
        "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": ROPE, "full_attention": {**SCALED["linear"], "rope_theta": 9e5}},
    },
}  # fmt: skip
CASES = {**TYPES, **{f"llama-{kind}": {"head_dim": 16, "rope_parameters": SCALED[kind]} for kind in SCALED}}


def base_of(case: str, folder: Path, save_model: Callable[..., Path]) -> Path:
    """A tiny base of a case, saved by transformers 5."""
    config = transformers.CONFIG_MAPPING[case.partition("-")[0]](**{**SIZES, **CASES[case]})
    return save_model(folder, config)


def merged_by(backend: str, base: Path, folder: Path, opener: Any) -> Path:
    session, _ = opener(backend, base=base, precision="fp32")
    rng = np.random.default_rng(1)
    session.load_factors(
        {
            name: {key: rng.normal(0, 0.1, array.shape).astype(np.float32) for key, array in arrays.items()}
            for name, arrays in session.factors().items()
        }
    )
    session.save_merged(folder)
    return folder


def logits(folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


def mlx_lm_logits(folder: Path) -> Any:
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    return np.array(model(mx.array(TOKENS)).astype(mx.float32))


@pytest.mark.parametrize("case", CASES)
def test_stock_mlx_lm_gives_the_logits_of_transformers(
    case: str, tmp_path: Path, save_model: Callable[..., Path], opener: Any
) -> None:
    base = base_of(case, tmp_path / "base", save_model)
    written = {}
    for backend in ("torch", "mlx"):
        folder = merged_by(backend, base, tmp_path / backend, opener)
        expected = logits(folder)
        assert np.abs(expected - logits(base)).max() > 1e-2
        np.testing.assert_allclose(mlx_lm_logits(folder), expected, atol=1e-3)
        written[backend] = json.loads((folder / "config.json").read_text())
    assert written["torch"] == written["mlx"]
    plain = json.loads((base / "config.json").read_text())
    assert {key: written["mlx"][key] for key in plain} == plain
    assert written["mlx"]["torch_dtype"] == "float32"


def test_a_config_of_the_older_spelling_stays_as_it_is(
    tmp_path: Path, save_model: Callable[..., Path], opener: Any
) -> None:
    """Byte for byte, but for the code that it names: that is left behind."""
    base = base_of("llama-linear", tmp_path / "base", save_model)
    config = json.loads((base / "config.json").read_text())
    del config["rope_parameters"], config["dtype"]
    old = {"rope_theta": 3e4, "rope_scaling": {"type": "linear", "factor": 4.0}, "torch_dtype": "float32"}
    (base / "config.json").write_text(json.dumps(config | old, indent=1))
    for backend in ("torch", "mlx"):
        folder = merged_by(backend, base, tmp_path / backend, opener)
        assert (folder / "config.json").read_bytes() == (base / "config.json").read_bytes()
        np.testing.assert_allclose(mlx_lm_logits(folder), logits(folder), atol=1e-3)


def test_a_merge_leaves_what_is_not_the_model_s(
    tiny_llama: Path, tmp_path: Path, opener: Any, save_model: Callable[..., Path]
) -> None:
    base = base_of("llama", tmp_path / "base", save_model)
    for name in ("prepared.json", "trainer_state.json", "notes.txt", "model.safetensors.index.json"):
        (base / name).write_text("{}")
    for backend in ("torch", "mlx"):
        folder = merged_by(backend, base, tmp_path / backend, opener)
        assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors"}


def test_a_base_in_shards_is_merged_with_an_index_that_fits(
    tmp_path: Path, save_model: Callable[..., Path], opener: Any
) -> None:
    base = base_of("llama", tmp_path / "base", save_model)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="100KB")
    assert len(list(base.glob("*.safetensors"))) > 1
    for backend in ("torch", "mlx"):
        folder = merged_by(backend, base, tmp_path / backend, opener)
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            places = set(json.loads(index.read_text())["weight_map"].values())
            assert places == {file.name for file in folder.glob("*.safetensors")}
        np.testing.assert_allclose(mlx_lm_logits(folder), logits(folder), atol=1e-3)


def _read(config: dict[str, Any]) -> Any:
    """What transformers 5 makes of a config, without the names that only older versions read."""

    def plain(value: Any) -> Any:
        return (
            {key: plain(one) for key, one in value.items() if key != "type"}
            if isinstance(value, dict)
            else value
        )

    return plain(
        transformers.CONFIG_MAPPING[config["model_type"]].from_dict(json.loads(json.dumps(config))).to_dict()
    )


def _differences(new: Any, both: Any, path: str = "") -> list[str]:
    found = []
    for key, value in new.items():
        if isinstance(value, dict) and "model_type" in value:
            found += _differences(value, both[key], f"{path}{key}.")
        # One type keeps the older name as a field of its own, which its model does not read.
        elif both[key] != value and key != "rope_scaling":
            found.append(path + key)
    return found


def _with_rope(kind: Any, scaling: dict[str, Any]) -> dict[str, Any] | None:
    """The default config of a class with its full layers scaled, None where there are no rotary positions."""
    config = kind.to_dict()
    inside = [value for key, value in config.items() if isinstance(value, dict) and key.endswith("_config")]
    ropes = [
        part["rope_parameters"] for part in (config, *inside) if isinstance(part.get("rope_parameters"), dict)
    ]
    for rope in ropes:
        by_layer = any(isinstance(one, dict) for one in rope.values())
        ((rope.get("full_attention") or {}) if by_layer else rope).update(scaling)
    return config if ropes else None


# Those that are spelled in a way of their own, and some that hold others.
SPELLED = {
    *TYPES, *model_config._NAMES, *model_config._BY_LAYER, *model_config._STRICT, *model_config._PATTERNED,
    *model_config._RECOUNTED, *model_config._NEW_ALONE, "gemma3", "gemma4", "gpt_oss", "mixtral", "deepseek_v3", "glm4",
    "stablelm", "phi", "qwen3_5", "qwen3_vl", "llama4", "mistral3", "laguna", "mellum", "minimax_m2",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["default", *SCALED])
def test_transformers_means_the_same_by_both_spellings(kind: str) -> None:
    seen, wrong = 0, {}
    for name in sorted(SPELLED):
        config = _with_rope(transformers.CONFIG_MAPPING[name](), SCALED.get(kind, {}))
        try:
            new = None if config is None else _read(config)
        except Exception:  # noqa: BLE001 - a scaling that the type refuses, in words of its own
            continue
        if config is None or new is None:
            continue
        seen += 1
        if different := _differences(new, _read(changed_config(config, ConfigChanges()))):
            wrong[name] = different
    assert seen > 20
    assert wrong == {}
