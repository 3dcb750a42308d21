"""pissa and olora on every backend: an exact start, the same numbers on both, a plain adapter at the end."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from soup_xb.core.adapter.peft_file import saved_form, write_adapter
from soup_xb.core.config.schema import LoraConfig
from soup_xb.core.config.support_rows import BACKENDS
from soup_xb.core.errors import CheckpointError, ModelError
from soup_xb.core.rows.batches import collate_rows
from soup_xb.core.run.plan import Plan
from soup_xb.core.run.session import GenerationSettings, Session, StepResult, StepSettings
from soup_xb.runs.export import ExportOptions, export_adapter

Opener = Callable[..., tuple[Session, Plan]]
Arrays = Mapping[str, np.ndarray]
STRATEGIES = ("pissa", "olora")
LORAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}},
}

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


def started(strategy: str, **lora: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "alpha": 8, "init_strategy": strategy, **lora})


def train(session: Session, plan: Plan, first: int = 1, last: int | None = None) -> list[StepResult]:
    return [
        session.train_step(
            plan.micro_batches(step),
            StepSettings(step, plan.learning_rates.at(step), plan.target_tokens(step)),
        )
        for step in range(first, (last or plan.total_steps) + 1)
    ]


def losses(results: list[StepResult]) -> list[float]:
    return [result.loss for result in results]


def start_product(arrays: Arrays) -> np.ndarray:
    """B0 A0 of a session that has not trained: its difference is [B - B0, B0] beside [A, A - A0]."""
    rank = arrays["lora_A"].shape[0] // 2
    product: np.ndarray = arrays["lora_B"][:, rank:] @ arrays["lora_A"][:rank]
    return product


def save(session: Session, plan: Plan, base: Path, folder: Path) -> Path:
    names = [module.name for module in session.describe().modules]
    write_adapter(folder, saved_form(plan.adapters, session.factors()), str(base), names)
    return folder


@every_backend
@every_strategy
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("quantization", ["none", "4bit", "8bit"])
def test_the_start_is_the_base_to_the_bit(
    opener: Opener, backend: str, strategy: str, quantization: str, precision: str
) -> None:
    lora = started(strategy, use_rslora=True)
    session, plan = opener(backend, lora=lora, quantization=quantization, precision=precision)
    tokens = plan.rows[0].sequences[0].tokens[None]
    np.testing.assert_array_equal(session.logits(tokens), session.logits(tokens, adapter=False))
    assert all(np.abs(start_product(arrays)).max() > 1e-2 for arrays in session.factors().values())


@every_strategy
@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
def test_both_backends_start_from_the_same_factors_and_take_the_same_steps(
    opener: Opener, strategy: str, lora: dict[str, Any]
) -> None:
    settings = {"lora": started(strategy, **lora), "max_steps": 15, "gradient_accumulation_steps": 2}
    (first, plan), (second, _) = opener("torch", **settings), opener("mlx", **settings)
    theirs = second.factors()
    for name, arrays in first.factors().items():
        np.testing.assert_allclose(start_product(theirs[name]), start_product(arrays), atol=1e-5)
    expected, found = train(first, plan), train(second, plan)
    assert expected[-1].loss < expected[0].loss - 0.3
    np.testing.assert_allclose(losses(found), losses(expected), rtol=0, atol=5e-5)
    norms = [[result.grad_norm for result in results] for results in (found, expected)]
    np.testing.assert_allclose(*norms, rtol=1e-3)


@every_backend
@every_strategy
@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
def test_the_saved_adapter_gives_the_live_logits_in_stock_peft_and_mlx_lm(
    opener: Opener, tiny_llama: Path, tmp_path: Path, backend: str, strategy: str, lora: dict[str, Any]
) -> None:
    import mlx.core as mx
    from mlx_lm import load
    from peft import PeftModel

    session, plan = opener(backend, lora=started(strategy, **lora))
    train(session, plan)
    tokens = plan.rows[0].sequences[0].tokens[None]
    live, base = session.logits(tokens), session.logits(tokens, adapter=False)
    assert np.abs(live - base).max() > 1e-2
    ranks = {arrays["lora_A"].shape[0] for arrays in session.factors().values()}
    assert ranks == ({6, 8} if "rank_pattern" in lora else {8})
    saved = save(session, plan, tiny_llama, tmp_path / "peft")
    stock = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(tiny_llama), saved)
    with torch.no_grad():
        loaded = stock(torch.tensor(tokens, dtype=torch.int64)).logits.numpy()
    np.testing.assert_allclose(loaded, live, atol=5e-5)
    export_adapter(saved, tmp_path / "mlx-lm", ExportOptions("mlx-lm"))
    model, _ = load(str(tiny_llama), adapter_path=str(tmp_path / "mlx-lm"))
    loaded = np.array(model(mx.array(tokens.astype(np.int32))).astype(mx.float32))
    np.testing.assert_allclose(loaded, live, atol=5e-5)


@every_backend
@every_strategy
def test_without_the_adapter_the_base_is_exact_after_training(
    opener: Opener, backend: str, strategy: str
) -> None:
    session, plan = opener(backend, lora=started(strategy))
    tokens, held_out = plan.rows[0].sequences[0].tokens[None], plan.eval_micro_batches()
    greedy = GenerationSettings(5, 0.0, (2,))
    base, loss, answer = (
        session.logits(tokens),
        session.evaluate(held_out),
        session.generate(tokens[0], greedy),
    )
    train(session, plan)
    np.testing.assert_array_equal(session.logits(tokens, adapter=False), base)
    assert session.evaluate(held_out, adapter=False) == loss
    assert session.generate(tokens[0], greedy, adapter=False).tolist() == answer.tolist()
    assert np.abs(session.logits(tokens) - base).max() > 1e-2
    assert session.evaluate(held_out) != loss


@every_backend
@every_strategy
def test_the_merged_model_gives_the_live_logits(
    opener: Opener, tmp_path: Path, backend: str, strategy: str
) -> None:
    session, plan = opener(backend, lora=started(strategy, **LORAS["patterns"]))
    train(session, plan)
    session.save_merged(tmp_path)
    tokens = plan.rows[0].sequences[0].tokens[None]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        merged = model(torch.tensor(tokens, dtype=torch.int64)).logits.numpy()
    np.testing.assert_allclose(merged, session.logits(tokens), atol=2e-5)


@every_backend
@every_strategy
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_resumed_session_goes_on_to_the_same_bytes(
    opener: Opener, tmp_path: Path, backend: str, strategy: str, dropout: float
) -> None:
    settings = {"lora": started(strategy, dropout=dropout), "gradient_accumulation_steps": 2}
    whole, plan = opener(backend, **settings)
    expected = losses(train(whole, plan, last=3))
    whole.save_state(tmp_path)
    expected += losses(train(whole, plan, first=4))
    second, _ = opener(backend, **settings)
    # The second has trained on another way already: nothing of that may remain.
    train(second, plan, first=5)
    second.load_state(tmp_path)
    assert losses(train(second, plan, first=4)) == expected[3:]
    for name, arrays in whole.factors().items():
        for factor, array in arrays.items():
            assert array.tobytes() == second.factors()[name][factor].tobytes(), (name, factor)


@every_backend
@every_strategy
def test_a_start_is_read_back_and_not_computed_again(
    opener: Opener, tmp_path: Path, backend: str, strategy: str
) -> None:
    session, plan = opener(backend, lora=started(strategy))
    train(session, plan, last=2)
    session.save_state(tmp_path)
    file = tmp_path / "factors.safetensors"
    tensors = load_file(file)
    name = plan.adapters.modules[0].name
    tensors[f"{name}.start_B"] = np.float32(0.5) * tensors[f"{name}.start_B"]
    save_file(tensors, file)
    before = session.evaluate(plan.eval_micro_batches())
    again = losses(train(session, plan, first=3, last=3))
    session.load_state(tmp_path)
    assert session.evaluate(plan.eval_micro_batches()) != before
    np.testing.assert_array_equal(session.factors()[name]["lora_B"][:, 4:], tensors[f"{name}.start_B"])
    assert losses(train(session, plan, first=3, last=3)) != again


@every_strategy
@pytest.mark.parametrize(("here", "there"), [("torch", "mlx"), ("mlx", "torch")])
def test_the_state_of_one_backend_goes_on_on_the_other(
    opener: Opener, tmp_path: Path, strategy: str, here: str, there: str
) -> None:
    first, plan = opener(here, lora=started(strategy))
    train(first, plan, last=3)
    first.save_state(tmp_path)
    second, _ = opener(there, lora=started(strategy))
    second.load_state(tmp_path)
    for name, arrays in first.factors().items():
        for factor, array in arrays.items():
            np.testing.assert_array_equal(second.factors()[name][factor], array)
    np.testing.assert_allclose(
        losses(train(second, plan, first=4)), losses(train(first, plan, first=4)), rtol=0, atol=5e-5
    )


@every_backend
def test_a_state_without_the_start_is_refused(opener: Opener, tmp_path: Path, backend: str) -> None:
    plain, _ = opener(backend)
    plain.save_state(tmp_path)
    session, _ = opener(backend, lora=started("pissa"))
    with pytest.raises(CheckpointError, match="has no start"):
        session.load_state(tmp_path)


@every_backend
@every_strategy
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_no_number(
    opener: Opener, backend: str, strategy: str, dropout: float
) -> None:
    lora = started(strategy, dropout=dropout)
    plain, plan = opener(backend, lora=lora)
    saving, _ = opener(backend, lora=lora, gradient_checkpointing=True)
    first, second = train(plain, plan, last=3), train(saving, plan, last=3)
    assert losses(second) == pytest.approx(losses(first), abs=1e-6)
    assert [r.grad_norm for r in second] == pytest.approx([r.grad_norm for r in first], rel=1e-5)


@every_backend
@every_strategy
def test_accumulation_changes_nothing_but_speed(opener: Opener, backend: str, strategy: str) -> None:
    settings = {"lora": started(strategy), "batch_size": 8, "max_steps": 3}
    (one, plan), (two, _) = opener(backend, **settings), opener(backend, **settings)
    for step in range(1, 4):
        rows = [plan.rows[index] for index in plan.step_rows(step)[0]]
        now = StepSettings(step, plan.learning_rates.at(step), plan.target_tokens(step))
        whole = one.train_step(plan.micro_batches(step), now)
        split = two.train_step([collate_rows(rows[:3], None, 0), collate_rows(rows[3:], None, 0)], now)
        assert split.loss == pytest.approx(whole.loss, abs=1e-5)
        assert split.grad_norm == pytest.approx(whole.grad_norm, rel=1e-4)


@every_backend
@every_strategy
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_base_with_values_that_are_not_finite_is_named(
    opener: Opener, tiny_llama: Path, tmp_path: Path, backend: str, strategy: str, value: float
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    session, plan = opener(backend, base=base, lora=started(strategy), attach=False)
    with pytest.raises(ModelError, match=r"`model\.layers\.1\.mlp\.up_proj` has values") as raised:
        session.attach(plan.adapters)
    assert raised.value.problems[0].code == "non-finite-base"
