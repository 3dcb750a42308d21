"""The load-balancing loss beside a task's: transformers' value, over the whole step, and refused without a router."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from processes import in_two_processes

from soup_xb.backends.torch.router_balance import router_logits
from soup_xb.core.config.load import parse_config
from soup_xb.core.config.support import check_supported
from soup_xb.core.errors import ConfigError
from soup_xb.core.rows.batches import MicroBatch, collate, idle
from soup_xb.core.rows.examples import Source
from soup_xb.core.rows.row import TokenSequence
from soup_xb.core.run.session import StepSettings

Attached = Callable[..., Any]
Bases = Callable[..., Path]
TYPES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "phimoe")
COEFFICIENT = 0.5


def row(length: int, seed: int) -> TokenSequence:
    tokens = np.random.default_rng(seed).integers(3, 250, length)
    return TokenSequence(tokens, np.arange(length) >= length // 3, Source("rows.jsonl", seed + 1))


ROWS = [row(length, seed) for seed, length in enumerate((9, 31, 14, 22))]


def batches(size: int) -> list[MicroBatch]:
    return [collate(ROWS[first : first + size], 0) for first in range(0, len(ROWS), size)]


def step(session: Any, micro_batches: list[MicroBatch]) -> Any:
    targets = sum(batch.target_tokens for batch in micro_batches)
    return session.train_step(micro_batches, StepSettings(1, 1e-2, targets, len(ROWS)))


def transformers_value(base: Path, batch: MicroBatch) -> float:
    """What transformers' own forward gives for the rows, its mask over their real tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids = torch.from_numpy(batch.tokens.astype(np.int64))
    mask = torch.arange(ids.shape[1]) < torch.from_numpy(batch.lengths).unsqueeze(1)
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask.long(), output_router_logits=True)
    return float(output.aux_loss)


@pytest.fixture
def balanced(attached: Attached, tiny_experts: Bases) -> Attached:
    """A session on a tiny mixture of experts; the coefficient is None for a run without the loss."""

    def open_with(coefficient: float | None, model_type: str = "olmoe", **changes: Any) -> Any:
        base = tiny_experts(model_type)
        return attached(base=base, router_aux_loss_coef=coefficient, **changes)[0]

    return open_with


@pytest.mark.parametrize("model_type", TYPES)
def test_the_loss_is_the_task_s_plus_what_transformers_computes(
    balanced: Attached, tiny_experts: Bases, model_type: str
) -> None:
    (batch,) = batches(4)
    plain = step(balanced(None, model_type), [batch])
    found = step(balanced(COEFFICIENT, model_type), [batch])
    expected = transformers_value(tiny_experts(model_type), batch)
    assert found.means["router_aux_loss"] == pytest.approx(expected, abs=1e-5)
    assert found.loss - plain.loss == pytest.approx(COEFFICIENT * expected, abs=1e-5)
    assert found.grad_norm != pytest.approx(plain.grad_norm, rel=1e-4)


def test_accumulation_and_padding_change_nothing(balanced: Attached) -> None:
    whole, pieces = balanced(COEFFICIENT), balanced(COEFFICIENT)
    one, other = step(whole, batches(4)), step(pieces, batches(1))
    assert one.loss == pytest.approx(other.loss, abs=1e-5)
    assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
    assert one.means["router_aux_loss"] == pytest.approx(other.means["router_aux_loss"], abs=1e-5)
    # A process without a row of a micro-batch has one that counts for nothing, no token of it.
    empty = step(balanced(COEFFICIENT), [*batches(4), idle(collate(ROWS[1:2], 0))])
    assert empty.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
    assert empty.means["router_aux_loss"] == pytest.approx(one.means["router_aux_loss"], abs=1e-5)
    assert empty.loss == pytest.approx(one.loss, abs=1e-5)


def test_the_router_stays_as_it_is_and_layers_below_it_learn(balanced: Attached) -> None:
    session = balanced(COEFFICIENT)
    routers = {name: weight.clone() for name, weight in session.model.named_parameters() if ".gate." in name}
    step(session, batches(4))
    weights = dict(session.model.named_parameters())
    assert routers
    assert all(torch.equal(before, weights[name]) for name, before in routers.items())


def test_checkpointed_layers_have_the_same_gradient(balanced: Attached) -> None:
    one, other = (
        step(balanced(COEFFICIENT, gradient_checkpointing=asked), batches(2)) for asked in (False, True)
    )
    assert one.loss == pytest.approx(other.loss, abs=1e-6)
    assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-5)


def test_training_on_it_alone_spreads_the_tokens(balanced: Attached) -> None:
    session = balanced(9.0)
    found = [step(session, batches(2)).means["router_aux_loss"] for _ in range(25)]
    assert found[-1] < found[0] - 0.02
    assert found[-1] >= 1


def test_two_processes_have_the_losses_of_one(
    soupx: Callable[..., Any], tiny_experts: Bases, chat_file: Path, tmp_path: Path
) -> None:
    found = []
    for processes in (1, 2):
        content = {
            "base": str(tiny_experts("olmoe")),
            "backend": "torch",
            "data": {"train": str(chat_file), "max_length": 64},
            "training": {
                "max_steps": 4,
                "batch_size": 2,
                "lr": 5e-3,
                "gradient_accumulation_steps": 2,
                "router_aux_loss_coef": COEFFICIENT,
            },
            "output": str(tmp_path / f"out-{processes}"),
        }
        (tmp_path / "soup.yaml").write_text(json.dumps(content))
        words = ("train", tmp_path / "soup.yaml")
        if processes == 1:
            alone = soupx(*words)
            assert alone.code == 0, alone.err
        else:
            both = in_two_processes("torch", "-m", "soup_xb", *words)
            assert both.codes == (0, 0), both.err[-3000:]
        lines = (tmp_path / f"out-{processes}" / "metrics.jsonl").read_text().splitlines()
        steps = [event for event in map(json.loads, lines) if event["event"] == "step"]
        found.append([(event["loss"], event["means"]["router_aux_loss"]) for event in steps])
    assert np.array(found[0]) == pytest.approx(np.array(found[1]), abs=1e-5)


def test_an_evaluation_tells_it_beside_the_loss(balanced: Attached, tiny_experts: Bases) -> None:
    session, plain = balanced(COEFFICIENT), balanced(None)
    found, without = session.evaluate(batches(1)), plain.evaluate(batches(1))
    assert found.mean == pytest.approx(without.mean, abs=1e-6)
    assert found.means["router_aux_loss"] == pytest.approx(
        transformers_value(tiny_experts("olmoe"), batches(4)[0]), abs=1e-5
    )


def test_the_hooks_are_gone_after_a_step(balanced: Attached) -> None:
    session = balanced(COEFFICIENT)
    with pytest.raises(ZeroDivisionError), router_logits(session.model):
        raise ZeroDivisionError
    step(session, batches(2))
    assert not session.model._forward_hooks
    assert not session.model._forward_pre_hooks


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
def test_a_base_without_such_a_router_is_refused(
    balanced: Attached, attached: Attached, tiny_llama: Path, model_type: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        if model_type == "llama":
            attached(base=tiny_llama, router_aux_loss_coef=0.01)
        else:
            balanced(0.01, model_type)
    (problem,) = refused.value.problems
    assert problem.code == "no-router"
    assert f"`{model_type}`" in problem.message


def test_mlx_refuses_it_by_its_own_row() -> None:
    text = "base: tiny\ndata:\n  train: rows.jsonl\ntraining:\n  router_aux_loss_coef: 0.01\n"
    with pytest.raises(ConfigError) as refused:
        check_supported(parse_config(text, "soup.yaml"), "mlx")
    (problem,) = refused.value.problems
    assert problem.code == "mlx-no-router-loss"
