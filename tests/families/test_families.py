"""A dozen model types of proven.json, proven again; `make prove-families` proves and trains all of them."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# OpenBLAS goes in front of MLX's own before a test imports mlx.
import soup_xb.backends.mlx  # noqa: F401
from soup_xb.core.base.proven import FILE, Part, left_out, proven_type, proven_types, proven_with

SAMPLE = (
    "deepseek_v3", "falcon_h1", "gemma2", "gemma3", "glm4_moe", "gpt2", "gpt_oss", "lfm2_moe", "llama4", "mixtral",
    "qwen3_moe", "qwen3_next",
)  # fmt: skip
# What the proof is about: each is tried with one type.
MOE, MULTIMODAL, LATENT = "qwen3_moe", "gemma3", "deepseek_v3"


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """Every compiled function would call a compiler; the numbers are the same."""
    import mlx.core as mx

    mx.disable_compile()
    yield
    mx.enable_compile()


def test_every_type_that_both_libraries_know_has_a_row_or_a_reason() -> None:
    from prove import both_libraries

    assert set(both_libraries()) == {*proven_types(), *left_out()}
    assert not set(proven_types()) & set(left_out())
    assert len(proven_types()) >= 85
    assert all(reason and "Error" not in reason for reason in left_out().values())


def test_the_proof_was_made_with_the_installed_versions() -> None:
    for name in ("transformers", "mlx-lm"):
        installed = importlib.metadata.version(name)
        assert installed == proven_with()[name], f"run `make prove-families`, which writes {FILE.name}"


@pytest.mark.parametrize("name", SAMPLE)
def test_logits_agree_at_both_scales(name: str, tmp_path: Path) -> None:
    from prove import logits_proof

    assert logits_proof(name, tmp_path, 3.0)["equal"]
    assert logits_proof(name, tmp_path, 8.0)["equal"]


@pytest.mark.parametrize("name", SAMPLE)
def test_training_agrees(name: str, tmp_path: Path) -> None:
    from train import compare

    told = compare(name, tmp_path, ["sft"], max_steps=5)["sft"]
    assert told["equal"], told
    assert told["moved"] > 1e-3


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (
            "falcon_h1",
            {"mamba_d_ssm": 96, "mamba_n_heads": 6, "hidden_size": 96, "mlp_multipliers": [0.5, 1.5]},
        ),
        (
            "qwen3_moe",
            {"mlp_only_layers": [1], "num_experts_per_tok": 3, "num_hidden_layers": 5, "head_dim": 24},
        ),
        ("deepseek_v3", {"num_experts_per_tok": 4, "num_hidden_layers": 3, "v_head_dim": 24}),
    ],
)
def test_other_sizes_than_the_proven_ones_open_and_agree(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    from prove import on_torch, relative, settings, tokens, torch_logits
    from tiny import tiny_base

    from soup_xb.backends.mlx.session import open_session

    folder = tiny_base(name, tmp_path / "base", seed=7, **changes)
    ours = open_session(settings(folder)).logits(tokens(60))
    assert relative(ours, torch_logits(on_torch(folder), tokens(60))) < 1e-5


def test_another_version_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from soup_xb.backends.mlx import load

    assert load.other_versions() == []
    monkeypatch.setattr(load, "proven_with", lambda: {"transformers": "5.0.0", "mlx-lm": "0.1"})
    (told,) = load.other_versions()
    assert told.code == "other-versions"
    assert "proven with 5.0.0" in told.message


def test_a_part_s_place_is_found_both_ways() -> None:
    proven = proven_type(MOE)
    assert proven is not None
    gate, up = proven.parts_of("model.layers.3.mlp.experts.gate_up_proj")
    assert gate == Part("model.layers.3.mlp.switch_mlp.gate_proj", index=0, of=2)
    assert proven.module_at(up.place) == ("model.layers.3.mlp.experts.gate_up_proj", up)
    assert proven.parts_of("model.layers.3.self_attn.q_proj") == (Part("model.layers.3.self_attn.q_proj"),)
    assert proven.module_at("model.layers.3.self_attn.q_proj") == (
        "model.layers.3.self_attn.q_proj",
        Part("model.layers.3.self_attn.q_proj"),
    )


@pytest.mark.parametrize(
    ("name", "changes", "field"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("gemma3_text", {"layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]},
         "layer_types"),
        ("glm4_moe", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}, "dynamic"),
    ],
)  # fmt: skip
def test_a_field_that_is_not_followed_is_refused_by_name(
    name: str, changes: dict[str, Any], field: str, tmp_path: Path
) -> None:
    from prove import settings
    from tiny import tiny_base

    from soup_xb.backends.mlx.session import open_session
    from soup_xb.core.errors import ModelError

    folder = tiny_base(name, tmp_path / "base", **changes)
    with pytest.raises(ModelError, match=field) as raised:
        open_session(settings(folder))
    assert raised.value.problems[0].code == "mlx-misreads-base"


@pytest.mark.parametrize("name", [MOE, LATENT, MULTIMODAL])
def test_experts_and_latents_start_from_their_weights(name: str, tmp_path: Path) -> None:
    from train import compare

    for way, told in compare(name, tmp_path, ["sft pissa", "sft olora"], max_steps=2).items():
        assert told["equal"], (way, told)


def test_answers_of_a_type_without_a_cache_are_those_of_whole_rows(tmp_path: Path) -> None:
    from prove import on_mlx, tokens
    from tiny import tiny_base

    from soup_xb.backends.mlx.generation import generate_tokens
    from soup_xb.core.run.session import GenerationSettings

    _, model = on_mlx(tiny_base("llama", tmp_path / "base"), "llama")
    told = GenerationSettings(max_new_tokens=12, temperature=0.0, seed=0, end_ids=(127,))
    prompt = tokens(40)[0][:9]
    cached, plain = (generate_tokens(model, prompt, told, cached=each) for each in (True, False))
    np.testing.assert_array_equal(cached, plain)
