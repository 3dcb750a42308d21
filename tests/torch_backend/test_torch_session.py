from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
import transformers
from attrs import evolve

from soup_xb.backends.torch.session import TorchSession, open_session
from soup_xb.core.adapter_file import write_adapter
from soup_xb.core.batches import collate
from soup_xb.core.config import Config, DataConfig, LoraConfig, TrainingConfig
from soup_xb.core.errors import ConfigError, ModelError
from soup_xb.core.examples import Source, TokenRow
from soup_xb.core.modules import resolve_adapters
from soup_xb.core.plan import Plan, make_plan, optimizer_settings
from soup_xb.core.session import GenerationSettings, SessionSettings, StepResult, StepSettings

Opener = Callable[..., tuple[TorchSession, Plan]]


def token_rows(count: int = 24, seed: int = 0) -> tuple[TokenRow, ...]:
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        length = int(rng.integers(6, 40))
        tokens = rng.integers(3, 250, length)
        rows.append(TokenRow(tokens, np.arange(length) >= length // 3, Source("rows.jsonl", index + 1)))
    return tuple(rows)


@pytest.fixture
def opener(tiny_llama: Path) -> Iterator[Opener]:
    sessions = []

    def open_it(base: Path = tiny_llama, attach: bool = True, **training: Any) -> tuple[TorchSession, Plan]:
        settings = TrainingConfig(**{"max_steps": 6, "lr": 5e-3, "lora": LoraConfig(r=4), **training})
        config = Config(base=str(base), data=DataConfig(train=("rows.jsonl",)), training=settings)
        session = open_session(
            SessionSettings(
                base=base,
                precision=settings.precision,
                quantization=settings.quantization,
                gradient_checkpointing=settings.gradient_checkpointing,
                optimizer=optimizer_settings(settings),
                seed=settings.seed,
            )
        )
        sessions.append(session)
        resolution = resolve_adapters(session.describe().modules, settings.lora, {})
        plan = make_plan(config, resolution, token_rows(), token_rows(5, seed=1), pad_id=0)
        if attach:
            session.attach(plan.adapters)
        return session, plan

    yield open_it
    for session in sessions:
        session.close()


def train(session: TorchSession, plan: Plan, first: int = 1, last: int | None = None) -> list[StepResult]:
    return [
        session.train_step(
            plan.micro_batches(step),
            StepSettings(step, plan.learning_rates.at(step), plan.target_tokens(step)),
        )
        for step in range(first, (last or plan.total_steps) + 1)
    ]


def plain_loss(base: Path, plan: Plan, step: int) -> float:
    """Token-weighted mean over the trained tokens, by a plain transformers forward, row by row, full head."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    total, count = 0.0, 0
    with torch.no_grad():
        for index in np.concatenate(plan.step_rows(step)):
            row = plan.rows[index]
            ids = torch.tensor(row.tokens[None], dtype=torch.int64)
            labels = ids.clone()
            labels[0, ~torch.from_numpy(row.trained.copy())] = -100
            logits = model(ids).logits[0, :-1]
            total += functional.cross_entropy(
                logits, labels[0, 1:], reduction="sum", ignore_index=-100
            ).item()
            count += row.target_tokens
    return total / count


def test_the_first_loss_is_that_of_a_plain_transformers_forward(opener: Opener, tiny_llama: Path) -> None:
    session, plan = opener(gradient_accumulation_steps=2)
    assert train(session, plan, last=1)[0].loss == pytest.approx(plain_loss(tiny_llama, plan, 1), abs=1e-5)


def test_the_head_on_trained_positions_gives_the_logits_of_the_full_head(opener: Opener) -> None:
    from soup_xb.backends.torch.head import head_on_positions

    session, plan = opener()
    batch = plan.micro_batches(1)[0]
    ids, positions = torch.from_numpy(batch.tokens.astype(np.int64)), torch.from_numpy(batch.positions)
    with torch.no_grad():
        full = session.model(input_ids=ids).logits.flatten(0, 1)[positions]
        with head_on_positions(session.model, positions):
            part = session.model(input_ids=ids).logits[0]
        again = session.model(input_ids=ids).logits.flatten(0, 1)[positions]
    torch.testing.assert_close(part, full)
    assert torch.equal(again, full)


def test_accumulation_changes_nothing_but_speed(opener: Opener) -> None:
    one, plan_one = opener(batch_size=8, gradient_accumulation_steps=1, max_steps=3)
    two, _ = opener(batch_size=4, gradient_accumulation_steps=2, max_steps=3)
    # The same rows a step: the plan of small micro-batches is given the large ones, halved.
    for step in range(1, 4):
        rows = plan_one.step_rows(step)[0]
        halves = [[plan_one.rows[i] for i in rows[:4]], [plan_one.rows[i] for i in rows[4:]]]
        settings = StepSettings(step, plan_one.learning_rates.at(step), plan_one.target_tokens(step))
        whole = one.train_step(plan_one.micro_batches(step), settings)
        split = two.train_step([collate(half, 0) for half in halves], settings)
        assert split.loss == pytest.approx(whole.loss, abs=1e-5)
        assert split.grad_norm == pytest.approx(whole.grad_norm, rel=1e-4)


def test_only_the_factors_train_and_all_of_them_do(opener: Opener) -> None:
    session, plan = opener()
    before = {name: p.detach().clone() for name, p in session.model.named_parameters()}
    train(session, plan)
    moved = {name for name, p in session.model.named_parameters() if not torch.equal(before[name], p)}
    assert moved == {name for name in before if ".lora_A." in name or ".lora_B." in name}
    assert len(moved) == 2 * len(plan.adapters.modules)


def test_the_adapter_starts_as_nothing_and_then_matters(opener: Opener) -> None:
    session, plan = opener()
    tokens = plan.rows[0].tokens[None]
    base = session.logits(tokens, adapter=False)
    np.testing.assert_array_equal(session.logits(tokens), base)
    train(session, plan)
    assert np.abs(session.logits(tokens) - base).max() > 1e-2
    np.testing.assert_array_equal(session.logits(tokens, adapter=False), base)


@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(r=4),
        LoraConfig(r=4, use_rslora=True),
        LoraConfig(r=4, use_dora=True),
        LoraConfig(r=4, target_modules=("q_proj", "down_proj"), rank_pattern={r"layers\.0\..*": 2}),
        LoraConfig(r=4, alpha_pattern={"v_proj": 3}),
    ],
    ids=["plain", "rslora", "dora", "ranks", "alphas"],
)
def test_a_saved_adapter_gives_the_live_logits_in_stock_peft(
    opener: Opener, tiny_llama: Path, tmp_path: Path, lora: LoraConfig
) -> None:
    from peft import PeftModel

    session, plan = opener(lora=lora)
    train(session, plan)
    names = [module.name for module in session.describe().modules]
    write_adapter(tmp_path, plan.adapters, session.factors(), str(tiny_llama), names)
    tokens = plan.rows[0].tokens[None]
    live, base = session.logits(tokens), session.logits(tokens, adapter=False)
    stock = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path)
    with torch.no_grad():
        loaded = stock(torch.tensor(tokens, dtype=torch.int64)).logits.numpy()
    np.testing.assert_allclose(loaded, live, atol=1e-5)
    assert np.abs(live - base).max() > 1e-2


def test_a_resumed_session_goes_on_to_the_same_bytes(opener: Opener, tmp_path: Path) -> None:
    lora = LoraConfig(r=4, dropout=0.2)
    whole, plan = opener(lora=lora)
    losses = [result.loss for result in train(whole, plan)]
    first, _ = opener(lora=lora)
    train(first, plan, last=3)
    first.save_state(tmp_path)
    second, _ = opener(lora=lora)
    second.load_state(tmp_path)
    assert [result.loss for result in train(second, plan, first=4)] == losses[3:]
    for name, arrays in whole.factors().items():
        for factor, array in arrays.items():
            assert array.tobytes() == second.factors()[name][factor].tobytes()


def test_evaluation_leaves_the_training_untouched(opener: Opener) -> None:
    lora = LoraConfig(r=4, dropout=0.2)
    quiet, plan = opener(lora=lora)
    watched, _ = opener(lora=lora)
    losses = [result.loss for result in train(quiet, plan)]
    seen = []
    for step in range(1, plan.total_steps + 1):
        seen += [result.loss for result in train(watched, plan, step, step)]
        watched.evaluate(plan.eval_micro_batches())
        watched.evaluate(plan.eval_micro_batches(), adapter=False)
        watched.generate(plan.rows[0].tokens, GenerationSettings(3, 1.0, (2,)))
    assert seen == losses


def test_evaluation_without_the_adapter_is_the_base(opener: Opener) -> None:
    session, plan = opener()
    before = session.evaluate(plan.eval_micro_batches())
    train(session, plan)
    assert session.evaluate(plan.eval_micro_batches(), adapter=False) == before
    assert session.evaluate(plan.eval_micro_batches()).total != before.total


def test_dropout_acts_in_training_alone(opener: Opener) -> None:
    plain, plan = opener()
    dropping, _ = opener(lora=LoraConfig(r=4, dropout=0.5))
    train(plain, plan, last=2)
    train(dropping, plan, last=2)
    assert (
        plain.evaluate(plan.eval_micro_batches()).total != dropping.evaluate(plan.eval_micro_batches()).total
    )
    tokens = plan.rows[0].tokens[None]
    np.testing.assert_array_equal(dropping.logits(tokens), dropping.logits(tokens))


def test_gradient_checkpointing_changes_no_number(opener: Opener) -> None:
    plain, plan = opener()
    saving, _ = opener(gradient_checkpointing=True)
    calls: list[int] = []
    layer = saving.model.model.layers[0]
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    first, second = train(plain, plan, last=3), train(saving, plan, last=3)
    assert [r.loss for r in second] == pytest.approx([r.loss for r in first], abs=1e-6)
    assert len(calls) == 6  # each step runs the block twice: forward, and again on the way back


def test_a_gradient_above_the_limit_is_clipped(opener: Opener) -> None:
    free, plan = opener(optimizer="sgd", weight_decay=0.0, max_grad_norm=0.0, scheduler="constant", lr=1.0)
    tight, _ = opener(optimizer="sgd", weight_decay=0.0, max_grad_norm=0.01, scheduler="constant", lr=1.0)
    before = free.factors()
    norm = train(free, plan, last=1)[0].grad_norm
    assert train(tight, plan, last=1)[0].grad_norm == pytest.approx(norm)

    def moved(session: TorchSession) -> float:
        after = session.factors()
        return sum(((after[n][f] - before[n][f]) ** 2).sum() for n in after for f in after[n]) ** 0.5

    assert moved(free) == pytest.approx(norm, rel=1e-4)
    assert moved(tight) == pytest.approx(0.01, rel=1e-3)


def test_the_optimizer_is_adamw_with_the_settings_of_the_file(opener: Opener) -> None:
    session, plan = opener(
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


def test_a_loss_that_is_not_finite_updates_nothing(opener: Opener) -> None:
    session, plan = opener()
    train(session, plan, last=2)
    before = session.factors()
    name = plan.adapters.modules[0].name
    with torch.no_grad():
        session.model.model.norm.weight.fill_(float("nan"))
    result = train(session, plan, first=3, last=3)[0]
    assert not result.applied
    np.testing.assert_array_equal(session.factors()[name]["lora_B"], before[name]["lora_B"])


def test_the_merged_model_gives_the_live_logits(opener: Opener, tmp_path: Path) -> None:
    session, plan = opener()
    train(session, plan)
    tokens = plan.rows[0].tokens[None]
    session.save_merged(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        merged = model(torch.tensor(tokens, dtype=torch.int64)).logits.numpy()
    np.testing.assert_allclose(merged, session.logits(tokens), atol=1e-5)


def test_generation_ends_before_the_end_token_and_repeats_with_its_seed(opener: Opener) -> None:
    session, plan = opener()
    prompt = plan.rows[0].tokens[:5]
    greedy = session.generate(prompt, GenerationSettings(8, 0.0, (2,)))
    assert greedy.dtype == np.int32
    end = int(greedy[3])
    cut = session.generate(prompt, GenerationSettings(8, 0.0, (end,)))
    assert cut.tolist() == greedy.tolist()[: greedy.tolist().index(end)]
    sampled = [
        session.generate(prompt, GenerationSettings(8, 5.0, (2,), seed)).tolist() for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_a_quantized_base_trains_and_its_adapter_is_float32(opener: Opener, quantization: str) -> None:
    session, plan = opener(quantization=quantization)
    first = session.evaluate(plan.eval_micro_batches()).mean
    results = train(session, plan)
    assert all(result.applied for result in results)
    assert session.evaluate(plan.eval_micro_batches()).mean != first
    assert {array.dtype for arrays in session.factors().values() for array in arrays.values()} == {
        np.dtype(np.float32)
    }
    with pytest.raises(ModelError, match="quantized"):
        session.save_merged(Path("unused"))


def test_a_4bit_base_has_the_losses_of_its_dequantized_weights(opener: Opener) -> None:
    from bitsandbytes.functional import dequantize_4bit

    quantized, plan = opener(quantization="4bit")
    plain, _ = opener()
    for name, layer in quantized._adapters.layers.items():
        weight = layer.get_base_layer().weight
        exact = dequantize_4bit(weight.data, weight.quant_state)
        plain.model.get_submodule(name).get_base_layer().weight.data.copy_(exact)
    expected = [result.loss for result in train(plain, plan)]
    assert [result.loss for result in train(quantized, plan)] == pytest.approx(expected, abs=1e-5)


def test_bf16_trains_float32_factors(opener: Opener) -> None:
    session, plan = opener(precision="bf16")
    assert session.model.dtype == torch.bfloat16
    losses = [result.loss for result in train(session, plan)]
    exact, _ = opener()
    assert losses == pytest.approx([result.loss for result in train(exact, plan)], rel=0.02)
    assert {p.dtype for p in session._adapters.parameters().values()} == {torch.float32}


def test_the_outline_has_the_base_s_structure_without_its_weights(opener: Opener, tiny_llama: Path) -> None:
    session, _ = opener(attach=False)
    settings = evolve(session.settings, weights=False)
    outline = open_session(settings)
    assert outline.describe() == session.describe()
    assert next(outline.model.parameters()).device.type == "meta"


def test_factors_of_another_shape_are_refused(opener: Opener) -> None:
    session, _ = opener()
    factors = {name: dict(arrays) for name, arrays in session.factors().items()}
    name = next(iter(factors))
    factors[name]["lora_A"] = factors[name]["lora_A"][:2]
    with pytest.raises(ModelError, match="has another rank"):
        session.load_factors(factors)
    del factors[name]
    with pytest.raises(ModelError, match="the adapter has no"):
        session.load_factors(factors)


def test_bf16_is_refused_where_the_device_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from soup_xb.backends.torch.device import choose_device
    from soup_xb.backends.torch.processes import Processes

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Old GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    with pytest.raises(ConfigError, match="Old GPU has no bf16"):
        choose_device("bf16", Processes())
    assert choose_device("auto", Processes()).precision == "fp32"
