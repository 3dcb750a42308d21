"""What every backend's session does: the same cases on each, and the same numbers on both."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
import transformers

from soup_xb.core.adapter.peft_file import saved_form, write_adapter
from soup_xb.core.config.schema import LoraConfig
from soup_xb.core.config.support_rows import BACKENDS
from soup_xb.core.errors import CheckpointError, ModelError
from soup_xb.core.rows.batches import collate_rows, idle
from soup_xb.core.rows.row import text_row
from soup_xb.core.run.plan import Plan
from soup_xb.core.run.session import GenerationSettings, Session, StepResult, StepSettings

Opener = Callable[..., tuple[Session, Plan]]
LORAS = {
    "plain": LoraConfig(r=4),
    "rslora": LoraConfig(r=4, use_rslora=True),
    "dora": LoraConfig(r=4, use_dora=True),
    "ranks": LoraConfig(r=4, target_modules=("q_proj", "down_proj"), rank_pattern={r"layers\.0\..*": 2}),
    "alphas": LoraConfig(r=4, alpha_pattern={"v_proj": 3}),
}


def train(session: Session, plan: Plan, first: int = 1, last: int | None = None) -> list[StepResult]:
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
            row = plan.rows[index].sequences[0]
            ids = torch.tensor(row.tokens[None], dtype=torch.int64)
            labels = ids.clone()
            labels[0, ~torch.from_numpy(row.trained.copy())] = -100
            logits = model(ids).logits[0, :-1]
            total += functional.cross_entropy(
                logits, labels[0, 1:], reduction="sum", ignore_index=-100
            ).item()
            count += row.target_tokens
    return total / count


def assert_same_bytes(first: Session, second: Session) -> None:
    left, right = first.factors(), second.factors()
    assert set(left) == set(right)
    for name, arrays in left.items():
        for factor, array in arrays.items():
            assert array.tobytes() == right[name][factor].tobytes(), (name, factor)


def assert_same_losses(first: list[StepResult], second: list[StepResult], atol: float) -> None:
    np.testing.assert_allclose([r.loss for r in first], [r.loss for r in second], rtol=0, atol=atol)
    np.testing.assert_allclose([r.grad_norm for r in first], [r.grad_norm for r in second], rtol=1e-3)


every_backend = pytest.mark.parametrize("backend", BACKENDS)


@every_backend
@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
def test_the_plan_counts_what_is_trained(opener: Opener, backend: str, lora: LoraConfig) -> None:
    session, plan = opener(backend, lora=lora)
    trained = sum(array.size for arrays in session.factors().values() for array in arrays.values())
    assert sum(adapter.parameters for adapter in plan.adapters.modules) == trained


@every_backend
def test_the_first_loss_is_that_of_a_plain_transformers_forward(
    opener: Opener, tiny_llama: Path, backend: str
) -> None:
    session, plan = opener(backend, gradient_accumulation_steps=2)
    assert train(session, plan, last=1)[0].loss == pytest.approx(plain_loss(tiny_llama, plan, 1), abs=1e-5)


@pytest.mark.parametrize(
    "training",
    [
        {"max_steps": 60, "gradient_accumulation_steps": 2, "scheduler": "cosine", "warmup_ratio": 0.1},
        {"max_steps": 12, "scheduler": "linear", "weight_decay": 0.1, "max_grad_norm": 0.0},
        {"max_steps": 12, "optimizer": "sgd", "weight_decay": 0.01, "lr": 0.05},
        {"max_steps": 12, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "max_grad_norm": 0.5},
    ],
    ids=["accumulation, warm-up, cosine, clipping", "decay, no clipping", "sgd", "other betas"],
)
def test_both_backends_take_the_same_steps(opener: Opener, training: dict[str, Any]) -> None:
    settings = {"lr": 2e-3, "max_grad_norm": 1.0, **training}
    losses = {}
    for backend in BACKENDS:
        session, plan = opener(backend, **settings)
        losses[backend] = train(session, plan)
        held_out = session.evaluate(plan.eval_micro_batches())
        losses[backend].append(StepResult(held_out.mean, held_out.target_tokens, True))
    assert losses["torch"][-2].loss < losses["torch"][0].loss - 0.3
    assert_same_losses(losses["torch"], losses["mlx"], atol=2e-5)


@every_backend
@pytest.mark.parametrize("pad", [320, 100_000, -1, -400])
def test_a_padding_id_that_the_base_has_no_row_for_reaches_no_model(
    opener: Opener, tiny_llama: Path, tmp_path: Path, pad: int, backend: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    config = json.loads((base / "config.json").read_text("utf-8"))
    (base / "config.json").write_text(json.dumps({**config, "pad_token_id": pad}))
    (session, plan), (usual, _) = opener(backend, base=base), opener(backend)
    assert {len(row.sequences[0].tokens) for row in plan.rows} != {plan.rows[0].length}
    assert [one.loss for one in train(session, plan)] == [one.loss for one in train(usual, plan)]
    prompts = [np.arange(3, 12, dtype=np.int32), np.arange(5, 8, dtype=np.int32)]
    settings = GenerationSettings(6, 1.0, (pad if pad > 0 else 400, 2))
    chances = np.random.default_rng(0).random((2, 6))
    answers = [one.sampler.sample(prompts, chances, settings) for one in (session, usual)]
    assert [row.tolist() for row in answers[0]] == [row.tolist() for row in answers[1]]
    session.save_merged(tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert merged.config.pad_token_id is None


@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
def test_both_backends_train_the_same_adapter(opener: Opener, lora: LoraConfig) -> None:
    (first, plan), (second, _) = opener("torch", lora=lora), opener("mlx", lora=lora)
    before = first.factors()
    for name, arrays in second.factors().items():
        np.testing.assert_array_equal(arrays["lora_A"], before[name]["lora_A"])
    assert_same_losses(train(first, plan), train(second, plan), atol=2e-5)
    trained = first.factors()
    for name, arrays in second.factors().items():
        for factor, array in arrays.items():
            np.testing.assert_allclose(array, trained[name][factor], atol=2e-4)
            assert np.abs(array - before[name][factor]).max() > 1e-3


@every_backend
@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
def test_a_saved_adapter_gives_the_live_logits_in_stock_peft(
    opener: Opener, tiny_llama: Path, tmp_path: Path, lora: LoraConfig, backend: str
) -> None:
    from peft import PeftModel

    session, plan = opener(backend, lora=lora)
    train(session, plan)
    names = [module.name for module in session.describe().modules]
    write_adapter(tmp_path, saved_form(plan.adapters, session.factors()), str(tiny_llama), names)
    tokens = plan.rows[0].sequences[0].tokens[None]
    live, base = session.logits(tokens), session.logits(tokens, adapter=False)
    stock = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path)
    with torch.no_grad():
        loaded = stock(torch.tensor(tokens, dtype=torch.int64)).logits.numpy()
    np.testing.assert_allclose(loaded, live, atol=1e-5 * max(1.0, np.abs(live).max()))
    assert np.abs(live - base).max() > 1e-2


@every_backend
def test_every_factor_trains_and_the_base_stays(opener: Opener, backend: str) -> None:
    session, plan = opener(backend)
    tokens = plan.rows[0].sequences[0].tokens[None]
    start, base = session.factors(), session.logits(tokens, adapter=False)
    np.testing.assert_array_equal(session.logits(tokens), base)
    held_out = session.evaluate(plan.eval_micro_batches())
    train(session, plan)
    for name, arrays in session.factors().items():
        for factor, array in arrays.items():
            assert array.dtype == np.float32
            assert not np.array_equal(array, start[name][factor]), (name, factor)
    assert np.abs(session.logits(tokens) - base).max() > 1e-2
    np.testing.assert_array_equal(session.logits(tokens, adapter=False), base)
    assert session.evaluate(plan.eval_micro_batches(), adapter=False) == held_out
    assert session.evaluate(plan.eval_micro_batches()).total != held_out.total


@every_backend
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_resumed_session_goes_on_to_the_same_bytes(
    opener: Opener, tmp_path: Path, backend: str, optimizer: str
) -> None:
    settings = {"lora": LoraConfig(r=4, dropout=0.2), "optimizer": optimizer}
    whole, plan = opener(backend, **settings)
    losses = [result.loss for result in train(whole, plan)]
    first, _ = opener(backend, **settings)
    train(first, plan, last=3)
    first.save_state(tmp_path)
    second, _ = opener(backend, **settings)
    second.load_state(tmp_path)
    assert [result.loss for result in train(second, plan, first=4)] == losses[3:]
    assert_same_bytes(whole, second)


@every_backend
def test_a_state_that_is_damaged_or_of_another_adapter_is_refused(
    opener: Opener, tmp_path: Path, backend: str
) -> None:
    session, plan = opener(backend)
    train(session, plan, last=1)
    session.save_state(tmp_path)
    other, _ = opener(backend, lora=LoraConfig(r=4, target_modules=("q_proj",)))
    with pytest.raises(ModelError, match="tensors do not fit"):
        other.load_state(tmp_path)
    optimizer = tmp_path / "optimizer.safetensors"
    optimizer.write_bytes(optimizer.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match="cannot be read"):
        session.load_state(tmp_path)
    optimizer.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        session.load_state(tmp_path)


@every_backend
def test_evaluation_leaves_the_training_untouched(opener: Opener, backend: str) -> None:
    lora = LoraConfig(r=4, dropout=0.2)
    quiet, plan = opener(backend, lora=lora)
    watched, _ = opener(backend, lora=lora)
    losses = [result.loss for result in train(quiet, plan)]
    seen = []
    for step in range(1, plan.total_steps + 1):
        seen += [result.loss for result in train(watched, plan, step, step)]
        watched.evaluate(plan.eval_micro_batches())
        watched.evaluate(plan.eval_micro_batches(), adapter=False)
        watched.generate(plan.rows[0].sequences[0].tokens, GenerationSettings(3, 1.0, (2,)))
    assert seen == losses
    assert_same_bytes(quiet, watched)


@every_backend
def test_dropout_acts_in_training_alone_and_is_seeded(opener: Opener, backend: str) -> None:
    plain, plan = opener(backend)
    dropping, _ = opener(backend, lora=LoraConfig(r=4, dropout=0.5))
    again, _ = opener(backend, lora=LoraConfig(r=4, dropout=0.5))
    other, _ = opener(backend, lora=LoraConfig(r=4, dropout=0.5), seed=7)
    other.load_factors(dropping.factors())
    for session in (plain, dropping, again, other):
        train(session, plan, last=2)
    held_out = [s.evaluate(plan.eval_micro_batches()).total for s in (plain, dropping, again, other)]
    assert held_out[1] == held_out[2]
    assert len(set(held_out)) == 3
    tokens = plan.rows[0].sequences[0].tokens[None]
    np.testing.assert_array_equal(dropping.logits(tokens), dropping.logits(tokens))


@every_backend
@pytest.mark.parametrize("lora", [LoraConfig(r=4), LoraConfig(r=4, dropout=0.3)], ids=["plain", "dropout"])
def test_gradient_checkpointing_changes_no_number(opener: Opener, backend: str, lora: LoraConfig) -> None:
    plain, plan = opener(backend, lora=lora)
    saving, _ = opener(backend, lora=lora, gradient_checkpointing=True)
    first, second = train(plain, plan, last=3), train(saving, plan, last=3)
    assert [r.loss for r in second] == pytest.approx([r.loss for r in first], abs=1e-6)
    assert [r.grad_norm for r in second] == pytest.approx([r.grad_norm for r in first], rel=1e-5)


@every_backend
def test_accumulation_changes_nothing_but_speed(opener: Opener, backend: str) -> None:
    one, plan = opener(backend, batch_size=8, max_steps=3)
    two, _ = opener(backend, batch_size=8, max_steps=3)
    for step in range(1, 4):
        rows = [plan.rows[index] for index in plan.step_rows(step)[0]]
        settings = StepSettings(step, plan.learning_rates.at(step), plan.target_tokens(step))
        whole = one.train_step(plan.micro_batches(step), settings)
        # Uneven parts of different padding, and one of a process that has no rows.
        parts = [collate_rows(part, None, 0) for part in (rows[:3], rows[3:], rows[:1])]
        split = two.train_step([*parts[:2], idle(parts[2])], settings)
        assert split.loss == pytest.approx(whole.loss, abs=1e-5)
        assert split.grad_norm == pytest.approx(whole.grad_norm, rel=1e-4)


@every_backend
def test_a_loss_of_weighted_tokens_is_divided_by_the_sum_of_their_weights(
    opener: Opener, backend: str
) -> None:
    one, plan = opener(backend, batch_size=8, max_steps=1)
    two, _ = opener(backend, batch_size=8, max_steps=1)
    rows = []
    for number, index in enumerate(plan.step_rows(1)[0]):
        row = plan.rows[index].sequences[0]
        # The first row has no weights; the others have three of them.
        weights = np.resize([0.25, 1.0, 3.0], row.length) if number else None
        rows.append(text_row(row.tokens, row.trained, row.source, weights))
    batch = collate_rows(rows, None, 0)
    assert batch.target_weight != batch.target_tokens
    scorer = one.scorer
    assert scorer is not None
    expected = -float((scorer.token_logps(batch) * batch.weights).sum()) / batch.target_weight
    assert one.evaluate([batch]).mean == pytest.approx(expected, abs=1e-5)
    settings = StepSettings(
        1, 1e-3, batch.target_tokens, target_weight=sum(row.target_weight for row in rows)
    )
    whole = one.train_step([batch], settings)
    parts = [collate_rows(part, None, 0) for part in (rows[:3], rows[3:], rows[:1])]
    split = two.train_step([*parts[:2], idle(parts[2])], settings)
    assert whole.loss == pytest.approx(expected, abs=1e-5)
    assert split.loss == pytest.approx(expected, abs=1e-5)
    assert split.grad_norm == pytest.approx(whole.grad_norm, rel=1e-4)


@every_backend
def test_a_gradient_above_the_limit_is_clipped(opener: Opener, backend: str) -> None:
    settings = {"optimizer": "sgd", "weight_decay": 0.0, "scheduler": "constant", "lr": 1.0}
    free, plan = opener(backend, max_grad_norm=0.0, **settings)
    tight, _ = opener(backend, max_grad_norm=0.01, **settings)
    before = free.factors()
    norm = train(free, plan, last=1)[0].grad_norm
    assert train(tight, plan, last=1)[0].grad_norm == pytest.approx(norm)

    def moved(session: Session) -> float:
        after = session.factors()
        return float(sum(((after[n][f] - before[n][f]) ** 2).sum() for n in after for f in after[n]) ** 0.5)

    assert moved(free) == pytest.approx(norm, rel=1e-4)
    assert moved(tight) == pytest.approx(0.01, rel=1e-3)


@every_backend
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_updates_nothing(opener: Opener, backend: str, value: float) -> None:
    session, plan = opener(backend)
    train(session, plan, last=2)
    factors = {name: dict(arrays) for name, arrays in session.factors().items()}
    name = plan.adapters.modules[0].name
    factors[name]["lora_B"] = np.full_like(factors[name]["lora_B"], value)
    session.load_factors(factors)
    before = session.factors()
    result = train(session, plan, first=3, last=3)[0]
    assert not result.applied
    for module, arrays in session.factors().items():
        for factor, array in arrays.items():
            np.testing.assert_array_equal(array, before[module][factor])


@every_backend
def test_the_merged_model_gives_the_live_logits(opener: Opener, tmp_path: Path, backend: str) -> None:
    for index, lora in enumerate((LORAS["plain"], LORAS["dora"], LORAS["ranks"])):
        session, plan = opener(backend, lora=lora)
        train(session, plan)
        tokens = plan.rows[0].sequences[0].tokens[None]
        folder = tmp_path / str(index)
        session.save_merged(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            merged = model(torch.tensor(tokens, dtype=torch.int64)).logits.numpy()
        live = session.logits(tokens)
        np.testing.assert_allclose(merged, live, atol=1e-5 * max(1.0, np.abs(live).max()))


@every_backend
def test_a_merged_weight_that_its_format_cannot_hold_is_refused(
    opener: Opener, tmp_path: Path, backend: str
) -> None:
    session, _ = opener(backend)
    session.load_factors(
        {
            name: {factor: np.full_like(array, 1e20) for factor, array in arrays.items()}
            for name, arrays in session.factors().items()
        }
    )
    with pytest.raises(ModelError, match="has entries that float32 cannot hold"):
        session.save_merged(tmp_path)


@every_backend
def test_generation_ends_before_the_end_token_and_repeats_with_its_seed(opener: Opener, backend: str) -> None:
    session, plan = opener(backend)
    train(session, plan)
    prompt = plan.rows[0].sequences[0].tokens[:5]
    greedy = session.generate(prompt, GenerationSettings(8, 0.0, (2,)))
    assert greedy.dtype == np.int32
    sequence = np.concatenate([prompt, greedy])
    chosen = session.logits(sequence[None])[0].argmax(-1)
    assert chosen[4 : 4 + len(greedy)].tolist() == greedy.tolist()
    end = int(greedy[3])
    cut = session.generate(prompt, GenerationSettings(8, 0.0, (end,)))
    assert cut.tolist() == greedy.tolist()[: greedy.tolist().index(end)]
    sampled = [
        session.generate(prompt, GenerationSettings(8, 5.0, (2,), seed)).tolist() for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    base = session.generate(prompt, GenerationSettings(8, 0.0, (2,)), adapter=False)
    assert base.tolist() != greedy.tolist()


@every_backend
@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_a_quantized_base_trains_float32_factors(opener: Opener, backend: str, quantization: str) -> None:
    session, plan = opener(backend, quantization=quantization)
    first = session.evaluate(plan.eval_micro_batches()).mean
    plain, _ = opener(backend)
    assert first != plain.evaluate(plan.eval_micro_batches()).mean
    assert all(result.applied for result in train(session, plan))
    assert session.evaluate(plan.eval_micro_batches()).mean != first
    assert {array.dtype for arrays in session.factors().values() for array in arrays.values()} == {
        np.dtype(np.float32)
    }
    with pytest.raises(ModelError, match="quantized"):
        session.save_merged(Path("unused"))


@every_backend
def test_bf16_trains_float32_factors(opener: Opener, backend: str) -> None:
    session, plan = opener(backend, precision="bf16")
    exact, _ = opener(backend)
    losses = [result.loss for result in train(session, plan)]
    assert losses == pytest.approx([result.loss for result in train(exact, plan)], rel=0.02)
    assert {array.dtype for arrays in session.factors().values() for array in arrays.values()} == {
        np.dtype(np.float32)
    }
    assert (session.precision, exact.precision) == ("bf16", "fp32")


@every_backend
def test_the_outline_has_the_base_s_structure(opener: Opener, backend: str) -> None:
    session, _ = opener(backend, attach=False)
    outline, _ = opener(backend, weights=False)
    assert outline.describe() == session.describe()
    assert outline.notices()


def test_both_backends_describe_the_same_base(opener: Opener) -> None:
    first, second = (opener(backend, attach=False)[0].describe() for backend in BACKENDS)
    # A tied head is the embedding in MLX, and a linear layer that shares its weight in transformers.
    theirs = {module for module in first.modules if module.name != "lm_head"}
    assert theirs == set(second.modules)
    fields = ("model_type", "parameters", "layers", "hidden_size", "intermediate_size", "vocabulary_size")
    for field in (*fields, "other_weights", "layer_settings"):
        assert getattr(first, field) == getattr(second, field), field


@every_backend
def test_factors_of_another_shape_are_refused(opener: Opener, backend: str) -> None:
    session, _ = opener(backend)
    factors = {name: dict(arrays) for name, arrays in session.factors().items()}
    name = next(iter(factors))
    factors[name]["lora_A"] = factors[name]["lora_A"][:2]
    with pytest.raises(ModelError, match="has another rank"):
        session.load_factors(factors)
    del factors[name]
    with pytest.raises(ModelError, match="the adapter has no"):
        session.load_factors(factors)


def test_training_begun_on_one_backend_goes_on_on_the_other(opener: Opener) -> None:
    settings = {"optimizer": "sgd", "lr": 0.05}
    whole, plan = opener("torch", **settings)
    losses = train(whole, plan)
    first, _ = opener("torch", **settings)
    train(first, plan, last=3)
    second, _ = opener("mlx", **settings)
    second.load_factors(first.factors())
    assert_same_losses(losses[3:], train(second, plan, first=4), atol=2e-5)


@every_backend
def test_peak_memory_processes_and_agreement_are_told(opener: Opener, backend: str) -> None:
    session, _ = opener(backend, attach=False)
    assert session.peak_memory_bytes() > 2**20
    assert (session.process, session.processes, session.agree(3)) == (0, 1, 3)
    assert json.dumps([session.backend, session.device]) == json.dumps([backend, session.device])
