"""What is the MLX session's own: its formats, its compiled step, its patches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from attrs import evolve

from soup_xb.backends.mlx.session import MlxSession, open_session
from soup_xb.backends.mlx.step import Step
from soup_xb.core.config.schema import LoraConfig
from soup_xb.core.errors import ModelError, ResourceError
from soup_xb.core.run.plan import Plan
from soup_xb.core.run.session import StepResult, StepSettings

Opener = Callable[..., tuple[MlxSession, Plan]]


def train(session: MlxSession, plan: Plan, first: int = 1, last: int | None = None) -> list[StepResult]:
    return [
        session.train_step(
            plan.micro_batches(step),
            StepSettings(step, plan.learning_rates.at(step), plan.target_tokens(step)),
        )
        for step in range(first, (last or plan.total_steps) + 1)
    ]


def test_a_base_in_mlx_s_own_format_opens_as_mlx_lm_opens_it(opener: Opener, quantized_llama: Path) -> None:
    from mlx_lm.utils import load_model

    session, plan = opener(quantized_llama)
    tokens = plan.rows[0].sequences[0].tokens[None]
    stock, _ = load_model(quantized_llama)
    expected = np.array(stock(mx.array(tokens.astype(np.int32))).astype(mx.float32))
    np.testing.assert_allclose(session.logits(tokens), expected, atol=1e-4)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_a_base_in_mlx_s_own_format_has_the_losses_of_its_dequantized_weights(
    opener: Opener, quantized_llama: Path, tiny_llama: Path, use_dora: bool
) -> None:
    lora = LoraConfig(r=4, use_dora=use_dora)
    quantized, plan = opener(quantized_llama, lora=lora)
    twin = open_session(evolve(quantized.settings, base=tiny_llama))
    assert quantized.describe() == twin.describe()
    exact = {
        name.removesuffix(".linear"): mx.dequantize(
            module.weight, module.scales, module.biases, group_size=module.group_size, bits=module.bits
        )
        for name, module in quantized.model.named_modules()
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding)
    }
    assert len(exact) == 15
    for name, module in twin.model.named_modules():
        if name in exact:
            module.weight = exact[name]
    twin.attach(plan.adapters)
    expected = [result.loss for result in train(twin, plan)]
    assert [result.loss for result in train(quantized, plan)] == pytest.approx(expected, abs=2e-5)
    with pytest.raises(ModelError, match="does not fit into its format"):
        quantized.save_merged(Path("unused"))


def test_a_base_is_not_quantized_twice(opener: Opener, quantized_llama: Path) -> None:
    with pytest.raises(ModelError, match="already quantized"):
        opener(quantized_llama, quantization="4bit")


def test_quantization_is_told_and_leaves_what_does_not_divide(opener: Opener) -> None:
    session, _ = opener(quantization="8bit")
    (notice,) = [notice for notice in session.notices() if notice.code == "quantized"]
    assert "14 linear layers in 8 bits" in notice.message
    assert "differ from those of torch" in notice.message


@pytest.mark.parametrize("strategy", ["random", "pissa"])
def test_the_step_is_compiled_once_for_each_size_of_the_grid(opener: Opener, strategy: str) -> None:
    session, plan = opener(max_steps=40, lora=LoraConfig(r=4, init_strategy=strategy))
    train(session, plan)
    shapes = {batch.tokens.shape for step in range(1, 41) for batch in plan.micro_batches(step)}
    traced = session._step.traced
    assert 1 < traced < len(shapes) + 3
    train(session, plan)
    assert session._step.traced == traced


def test_padding_to_the_grid_changes_no_loss(opener: Opener) -> None:

    padded, plan = opener()
    plain, _ = opener()
    plain._step = Step(plain._state, plain._outputs, plain._adapters, plain.settings.seed, compiled=False)
    expected = train(plain, plan)
    result = train(padded, plan)
    # A few roundings of float32: products of other shapes are summed in another order.
    assert [r.loss for r in result] == pytest.approx([r.loss for r in expected], rel=5e-7)
    assert [r.grad_norm for r in result] == pytest.approx([r.grad_norm for r in expected], rel=1e-5)


def test_checkpointing_runs_each_block_twice_and_is_undone_by_close(opener: Opener) -> None:

    session, plan = opener(gradient_checkpointing=True)
    session._step = Step(
        session._state, session._outputs, session._adapters, session.settings.seed, compiled=False
    )
    layer = session.model.layers[0]
    kind, calls = type(layer), []
    inner = type(layer.mlp)

    class Counting(inner):  # type: ignore[misc, valid-type]
        def __call__(self, x: Any) -> Any:
            calls.append(1)
            return super().__call__(x)

    layer.mlp.__class__ = Counting
    train(session, plan, last=1)
    assert len(calls) == 2
    assert kind.__name__ == "CheckpointedTransformerBlock"
    session.close()
    assert type(layer).__name__ == "TransformerBlock"


@pytest.mark.parametrize(
    "lora", [LoraConfig(r=4, use_dora=True), LoraConfig(r=4, init_strategy="pissa")], ids=["dora", "pissa"]
)
def test_only_the_factors_are_trainable(opener: Opener, lora: LoraConfig) -> None:
    from mlx.utils import tree_flatten

    session, plan = opener(lora=lora)
    names = {name for name, _ in tree_flatten(session.model.trainable_parameters())}
    kinds = ("lora_a", "lora_b", "m") if lora.use_dora else ("lora_a", "lora_b")
    expected = {f"{adapter.name}.{kind}" for adapter in plan.adapters.modules for kind in kinds}
    assert names == expected
    train(session, plan, last=2)
    assert {name for name, _ in tree_flatten(session.model.trainable_parameters())} == expected


def test_adamw_takes_torch_s_steps(opener: Opener) -> None:
    import torch

    from soup_xb.backends.mlx.optimizer import Optimizer

    rng = np.random.default_rng(0)
    start = rng.normal(size=(5, 7)).astype(np.float32)
    session, _ = opener(weight_decay=0.1, adam_beta1=0.8, max_grad_norm=0.5)
    ours = Optimizer({"x.lora_A": mx.array(start)}, session.settings.optimizer)
    theirs = torch.nn.Parameter(torch.from_numpy(start.copy()))
    reference = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.8, 0.999), eps=1e-8, weight_decay=0.1)
    values = {"x.lora_A": mx.array(start)}
    for _ in range(50):
        gradient = rng.normal(size=(5, 7)).astype(np.float32)
        theirs.grad = torch.from_numpy(gradient.copy())
        expected = torch.nn.utils.clip_grad_norm_([theirs], 0.5).item()
        reference.step()
        norm, updated = ours.step(values, {"x.lora_A": mx.array(gradient)}, 1e-2)
        assert norm == pytest.approx(expected, rel=1e-6)
        assert updated is not None
        values = updated
    np.testing.assert_allclose(np.array(values["x.lora_A"]), theirs.detach().numpy(), atol=2e-7)


def test_a_lack_of_memory_is_a_message_with_ways_out(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    session, plan = opener()

    def fails(*_: Any) -> Any:
        raise RuntimeError("[malloc] Unable to allocate 123 bytes.")

    monkeypatch.setattr(session._step, "_gradients", fails)
    with pytest.raises(ResourceError, match="out of memory while training"):
        train(session, plan, last=1)


def test_a_session_s_merge_writes_weights_and_config_alone(opener: Opener, tmp_path: Path) -> None:
    session, plan = opener()
    train(session, plan, last=1)
    session.save_merged(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_an_outline_computes_no_weights(opener: Opener) -> None:
    session, _ = opener()
    before = mx.get_active_memory()
    outline = open_session(evolve(session.settings, weights=False))
    assert outline.describe() == session.describe()
    assert mx.get_active_memory() - before < 10_000


@pytest.mark.parametrize("vocabulary", [49152, 50257, 40], ids=str)
def test_the_loss_keeps_its_precision_over_a_large_vocabulary(vocabulary: int) -> None:
    from soup_xb.backends.mlx.head import log_sum_exp

    logits = np.random.default_rng(0).normal(0.0, 3.0, (16, vocabulary)).astype(np.float32)
    exact = np.log(np.exp(logits.astype(np.float64)).sum(axis=-1))
    np.testing.assert_allclose(np.array(log_sum_exp(mx.array(logits))), exact, rtol=0, atol=5e-6)
    gradient = np.array(mx.grad(lambda x: mx.sum(log_sum_exp(x)))(mx.array(logits)))
    np.testing.assert_allclose(gradient, np.exp(logits - exact[:, None]), rtol=2e-5, atol=1e-9)
