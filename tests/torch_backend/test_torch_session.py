"""What the contract tests cannot ask of both backends: torch's own optimizer, head, layers and devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from soup_xb.core.errors import ConfigError
from soup_xb.core.run.plan import Plan
from soup_xb.core.run.session import StepResult, StepSettings

Attached = Callable[..., tuple[Any, Plan]]


def train(session: Any, plan: Plan, first: int = 1, last: int | None = None) -> list[StepResult]:
    return [
        session.train_step(
            plan.micro_batches(step),
            StepSettings(step, plan.learning_rates.at(step), plan.target_tokens(step)),
        )
        for step in range(first, (last or plan.total_steps) + 1)
    ]


def test_the_head_on_trained_positions_gives_the_logits_of_the_full_head(attached: Attached) -> None:
    from soup_xb.backends.torch.head import head_on_positions

    session, plan = attached()
    batch = plan.micro_batches(1)[0]
    ids, positions = (
        torch.from_numpy(batch.tokens.astype(np.int64)),
        torch.from_numpy(batch.positions[batch.weights != 0]),
    )
    with torch.no_grad():
        full = session.model(input_ids=ids).logits.flatten(0, 1)[positions]
        with head_on_positions(session.model, positions):
            part = session.model(input_ids=ids).logits[0]
        again = session.model(input_ids=ids).logits.flatten(0, 1)[positions]
    torch.testing.assert_close(part, full)
    assert torch.equal(again, full)


def test_the_adapter_starts_as_nothing_and_then_matters(attached: Attached) -> None:
    session, plan = attached()
    tokens = plan.rows[0].sequences[0].tokens[None]
    base = session.logits(tokens, adapter=False)
    np.testing.assert_array_equal(session.logits(tokens), base)
    train(session, plan)
    assert np.abs(session.logits(tokens) - base).max() > 1e-2
    np.testing.assert_array_equal(session.logits(tokens, adapter=False), base)


def test_evaluation_without_the_adapter_is_the_base(attached: Attached) -> None:
    session, plan = attached()
    before = session.evaluate(plan.eval_micro_batches())
    train(session, plan)
    assert session.evaluate(plan.eval_micro_batches(), adapter=False) == before
    assert session.evaluate(plan.eval_micro_batches()).total != before.total


def test_gradient_checkpointing_changes_no_number(attached: Attached) -> None:
    plain, plan = attached()
    saving, _ = attached(gradient_checkpointing=True)
    calls: list[int] = []
    layer = saving.model.model.layers[0]
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    first, second = train(plain, plan, last=3), train(saving, plan, last=3)
    assert [r.loss for r in second] == pytest.approx([r.loss for r in first], abs=1e-6)
    assert len(calls) == 6  # each step runs the block twice: forward, and again on the way back


def test_the_optimizer_is_adamw_with_the_settings_of_the_file(attached: Attached) -> None:
    session, plan = attached(
        lr=1e-2, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-6, weight_decay=0.1, max_grad_norm=0.0, max_steps=2,
        scheduler="constant",
    )  # fmt: skip
    mirror = {k: p.detach().clone().requires_grad_() for k, p in session._adapters.parameters().items()}
    reference = torch.optim.AdamW(mirror.values(), lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    grabbed: list[dict[str, torch.Tensor]] = []
    original = session._optimizer.step

    def spy(learning_rate: float) -> Any:
        grads = {k: p.grad.clone() for k, p in session._adapters.parameters().items()}
        grabbed.append(grads)
        return original(learning_rate)

    session._optimizer.step = spy
    train(session, plan)
    for grads in grabbed:
        for key, parameter in mirror.items():
            parameter.grad = grads[key]
        reference.step()
    for key, parameter in session._adapters.parameters().items():
        torch.testing.assert_close(parameter, mirror[key])


def test_a_4bit_base_has_the_losses_of_its_dequantized_weights(attached: Attached) -> None:
    from bitsandbytes.functional import dequantize_4bit

    quantized, plan = attached(quantization="4bit")
    plain, _ = attached()
    for name, layer in quantized._adapters.layers.items():
        weight = layer.get_base_layer().weight
        exact = dequantize_4bit(weight.data, weight.quant_state)
        plain.model.get_submodule(name).get_base_layer().weight.data.copy_(exact)
    expected = [result.loss for result in train(plain, plan)]
    assert [result.loss for result in train(quantized, plan)] == pytest.approx(expected, abs=1e-5)


def test_bf16_is_refused_where_the_device_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from soup_xb.backends.torch.device import choose_device
    from soup_xb.backends.torch.processes import Processes

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Old GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    with pytest.raises(ConfigError, match="Old GPU has no bf16"):
        choose_device("bf16", Processes())
    assert choose_device("auto", Processes()).precision == "fp32"
