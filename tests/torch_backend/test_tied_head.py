"""An adapter on an output head that shares its weight with the embedding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from soup_xb.core.adapter.peft_file import saved_form, write_adapter
from soup_xb.core.config.support_rows import BACKENDS
from soup_xb.core.errors import ModelError
from soup_xb.core.run.events import StepEvent
from soup_xb.core.run.loop import Hooks, run_loop
from soup_xb.runs.adapters import TrainedOptions, open_trained

Attached = Callable[..., Any]
HEAD = {"target_modules": ("lm_head", "q_proj")}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "pissa": {"init_strategy": "pissa"},
    "vera": {"use_vera": True, "r": 8},
}


def train(session: Any, plan: Any) -> list[float]:
    events: list[Any] = []
    run_loop(plan, session, Hooks(events.append, lambda step: None, lambda: 0), 0)
    return [event.loss for event in events if isinstance(event, StepEvent)]


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_and_reloads_in_stock_peft(
    attached: Attached, stock_logits: Callable[..., Any], kind: str
) -> None:
    session, plan = attached({**HEAD, **KINDS[kind]})
    tokens = plan.rows[0].sequences[0].tokens[None]
    base = session.logits(tokens)
    losses = train(session, plan)
    live = session.logits(tokens)
    assert losses[-1] < losses[0] and np.abs(live - base).max() > 1e-2
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        stock = stock_logits(session, plan, tokens)
    np.testing.assert_allclose(stock, live, atol=1e-4)
    np.testing.assert_array_equal(session.logits(tokens, adapter=False), base)


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_has_a_head_of_its_own_and_the_embedding_of_the_base(
    attached: Attached, tiny_llama: Path, tmp_path: Path, kind: str
) -> None:
    session, plan = attached({**HEAD, **KINDS[kind]})
    train(session, plan)
    tokens = plan.rows[0].sequences[0].tokens[None]
    live = session.logits(tokens)
    session.save_merged(tmp_path)
    assert session.model.config.tie_word_embeddings is True
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    merged, base = load_file(tmp_path / "model.safetensors"), load_file(tiny_llama / "model.safetensors")
    embedding = "model.embed_tokens.weight"
    np.testing.assert_array_equal(merged[embedding], base[embedding])
    assert np.abs(merged["lm_head.weight"] - merged[embedding]).max() > 1e-3
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        logits = model(torch.tensor(tokens, dtype=torch.int64)).logits.numpy()
    np.testing.assert_allclose(logits, live, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_either_engine_reads_the_merged_model(
    attached: Attached, tiny_llama: Path, tmp_path: Path, backend: str
) -> None:
    session, plan = attached(HEAD)
    train(session, plan)
    session.save_merged(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / file).write_bytes((tiny_llama / file).read_bytes())
    tokens = plan.rows[0].sequences[0].tokens[None]
    with open_trained(TrainedOptions(backend, base=str(tmp_path))) as opened:
        np.testing.assert_allclose(opened.session.logits(tokens), session.logits(tokens), atol=1e-4)


def test_mlx_says_that_it_has_no_tied_head(attached: Attached, tiny_llama: Path, tmp_path: Path) -> None:
    session, plan = attached(HEAD)
    names = [module.name for module in session.describe().modules]
    write_adapter(tmp_path, saved_form(plan.adapters, session.factors()), str(tiny_llama), names)
    with open_trained(TrainedOptions("torch", tmp_path)) as opened:
        assert opened.has_adapter
    with pytest.raises(ModelError) as caught, open_trained(TrainedOptions("mlx", tmp_path)):
        raise AssertionError("opened")
    (problem,) = caught.value.problems
    assert problem.code == "adapter-of-another-base" and "`--backend torch`" in problem.help


def test_a_head_that_is_not_adapted_stays_tied(attached: Attached, tmp_path: Path) -> None:
    session, plan = attached({"target_modules": ("q_proj",)})
    train(session, plan)
    session.save_merged(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_another_shared_weight_is_not_merged(attached: Attached, tmp_path: Path) -> None:
    session, _ = attached({"target_modules": ("q_proj",)})
    first, second = (layer.self_attn.q_proj.get_base_layer() for layer in session.model.model.layers)
    second.weight = first.weight
    with pytest.raises(ModelError, match="shares its weight with another module") as caught:
        session.save_merged(tmp_path)
    assert caught.value.problems[0].code == "merge-shared-weight"
