"""Starts and restarts of adapters on 3-D expert weights: each expert by itself, and the same in stock PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from soup_xb.backends.torch.experts import base_weight
from soup_xb.backends.torch.processes import Processes
from soup_xb.backends.torch.starts import weight_starts
from soup_xb.core.run.events import RestartEvent, StepEvent
from soup_xb.core.run.loop import Hooks, run_loop
from soup_xb.core.run.schedule import floor_share

Attached = Callable[..., Any]
Bases = Callable[..., Path]
Stock = Callable[..., Any]
# Llama 4 and gpt-oss store the transposed matrices; gpt-oss says so.
TYPES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "gpt_oss": {},
    "llama4_text": {"interleave_moe_layer_step": 1},
}
ALL = {"r": 2, "alpha": 4, "target_modules": "auto+experts"}


def train(
    session: Any, plan: Any, save: Callable[[int], None] = lambda step: None, done: int = 0
) -> list[Any]:
    events: list[Any] = []
    run_loop(plan, session, Hooks(events.append, save, lambda: 0), done)
    return events


def losses(events: list[Any]) -> list[float]:
    return [event.loss for event in events if isinstance(event, StepEvent)]


def tokens_of(plan: Any) -> Any:
    return plan.rows[0].sequences[0].tokens[None]


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("strategy", ["pissa", "olora"])
def test_a_start_on_experts_is_exact_and_saved_as_plain_lora_of_twice_the_rank(
    attached: Attached, tiny_experts: Bases, stock_logits: Stock, strategy: str, model_type: str
) -> None:
    base = tiny_experts(model_type, **TYPES[model_type])
    session, plan = attached({**ALL, "init_strategy": strategy}, base=base, max_steps=3)
    tokens = tokens_of(plan)
    true = session.logits(tokens, adapter=False)
    np.testing.assert_allclose(session.logits(tokens), true, atol=1e-6)
    train(session, plan)
    live = session.logits(tokens)
    assert {arrays["lora_A"].shape[-2] for arrays in session.factors().values()} == {4}
    np.testing.assert_allclose(stock_logits(session, plan, tokens, base), live, atol=1e-4)
    np.testing.assert_array_equal(session.logits(tokens, adapter=False), true)
    assert np.abs(live - true).max() > 1e-2


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_each_expert_starts_from_its_own_top_triplets(
    attached: Attached, tiny_experts: Bases, model_type: str
) -> None:
    session, plan = attached({**ALL, "init_strategy": "pissa"}, base=tiny_experts(model_type))
    stacks = [adapter for adapter in plan.adapters.modules if adapter.experts]
    assert len(stacks) == 4
    for adapter in stacks:
        start = session._adapters.starts[adapter.name]
        for expert, stored in enumerate(base_weight(session._adapters.layers[adapter.name]).detach().numpy()):
            matrix = stored.T if model_type == "gpt_oss" else stored
            left, values, right = np.linalg.svd(matrix, full_matrices=False)
            top = (left[:, :2] * values[:2]) @ right[:2]
            np.testing.assert_allclose(2.0 * start.b[expert] @ start.a[expert], top, atol=1e-4)


def test_starts_of_experts_are_the_same_whichever_process_computes_them(
    attached: Attached, tiny_experts: Bases, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_experts("mixtral")
    session, plan = attached({**ALL, "init_strategy": "olora"}, base=base)
    parts: list[list[torch.Tensor]] = []
    monkeypatch.setattr(Processes, "sum_", lambda self, tensors: parts.append(tensors))
    monkeypatch.setattr(Processes, "largest", lambda self, value: value)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    for process in range(2):
        weight_starts(model, plan.adapters, Processes(process, 2))
    summed = [one + two for one, two in zip(*parts, strict=True)]
    expected = [
        torch.from_numpy(x) for start in session._adapters.starts.values() for x in (start.a, start.b)
    ]
    assert all(torch.equal(one, two) for one, two in zip(summed, expected, strict=True))


@pytest.mark.parametrize("strategy", ["random", "pissa"])
def test_a_prune_counts_over_the_whole_stack(attached: Attached, tiny_experts: Bases, strategy: str) -> None:
    relora = {
        "relora_steps": 3,
        "relora_prune_ratio": 0.7,
        "relora_warmup_ratio": 0.0,
        "relora_reset_optimizer": True,
    }
    session, plan = attached(
        {**ALL, "init_strategy": strategy}, base=tiny_experts("mixtral"), max_steps=4, **relora
    )
    (event,) = [event for event in train(session, plan) if isinstance(event, RestartEvent)]
    sizes = [
        np.prod(shape) for adapter in plan.adapters.modules for shape in (adapter.a_shape, adapter.b_shape)
    ]
    assert event.entries == sum(sizes)
    assert event.pruned == sum(floor_share(int(size), 0.7) for size in sizes)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("strategy", ["random", "olora"])
def test_merges_fold_every_expert_and_save_all_pieces_side_by_side(
    attached: Attached, tiny_experts: Bases, stock_logits: Stock, strategy: str, model_type: str
) -> None:
    base = tiny_experts(model_type)
    relora = {"relora_steps": 2, "relora_mode": "merge", "relora_warmup_ratio": 0.0, "relora_rewarm_steps": 1}
    session, plan = attached({**ALL, "init_strategy": strategy}, base=base, max_steps=5, **relora)
    tokens = tokens_of(plan)
    true = session.logits(tokens, adapter=False)
    restarts = [event for event in train(session, plan) if isinstance(event, RestartEvent)]
    assert len(restarts) == 2
    assert all(abs(event.loss_before - event.loss_after) < 1e-5 for event in restarts)
    pieces = 3 if strategy == "random" else 4
    assert {arrays["lora_A"].shape[-2] for arrays in session.factors().values()} == {2 * pieces}
    live = session.logits(tokens)
    np.testing.assert_allclose(session.logits(tokens, adapter=False), true, atol=1e-4)
    np.testing.assert_allclose(stock_logits(session, plan, tokens, base), live, atol=1e-4)
    assert np.abs(live - true).max() > 1e-2


@pytest.mark.parametrize(
    ("lora", "training"),
    [
        ({"dropout": 0.2}, {}),
        ({"init_strategy": "pissa"}, {}),
        (
            {},
            {"relora_steps": 2, "relora_mode": "merge", "relora_warmup_ratio": 0.0, "relora_rewarm_steps": 1},
        ),
    ],
)
def test_a_resumed_run_on_experts_goes_on_to_the_same_bytes(
    attached: Attached, tiny_experts: Bases, tmp_path: Path, lora: dict[str, Any], training: dict[str, Any]
) -> None:
    base = tiny_experts("mixtral")
    whole, plan = attached({**ALL, **lora}, base=base, max_steps=5, save_steps=3, **training)
    events = train(whole, plan, lambda step: whole.save_state(tmp_path) if step == 3 else None)
    second, _ = attached({**ALL, **lora}, base=base, max_steps=5, save_steps=3, **training)
    second.load_state(tmp_path)
    assert losses(train(second, plan, done=3)) == losses(events)[3:]
    for name, arrays in whole.factors().items():
        for factor, array in arrays.items():
            assert array.tobytes() == second.factors()[name][factor].tobytes(), name


def test_a_bf16_base_trains_and_starts_at_the_base(attached: Attached, tiny_experts: Bases) -> None:
    session, plan = attached(
        {**ALL, "init_strategy": "pissa"}, base=tiny_experts("mixtral"), precision="bf16", max_steps=3
    )
    tokens = tokens_of(plan)
    np.testing.assert_array_equal(session.logits(tokens), session.logits(tokens, adapter=False))
    assert all(np.isfinite(losses(train(session, plan))))
    assert not np.array_equal(session.logits(tokens), session.logits(tokens, adapter=False))
