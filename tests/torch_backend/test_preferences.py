"""Preference tasks on the one training loop: references, losses that nothing but the rows decides, and adapters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from attrs import evolve

from soup_xb.backends.torch.session import open_session
from soup_xb.core.base.modules import resolve_adapters
from soup_xb.core.config.schema import Config, DataConfig, LoraConfig, TrainingConfig
from soup_xb.core.objectives.objective import row_log_probabilities
from soup_xb.core.rows.batches import micro_batches, sequence_batches
from soup_xb.core.rows.examples import Source
from soup_xb.core.rows.judged import learned_rows
from soup_xb.core.rows.row import Row, TokenSequence
from soup_xb.core.rows.table import Rows
from soup_xb.core.run.plan import Plan, make_plan, objective_of, optimizer_settings
from soup_xb.core.run.reference import Reference
from soup_xb.core.run.session import SessionSettings, StepResult, StepSettings
from soup_xb.core.tasks import TASKS as ALL_TASKS

TASKS = ("dpo", "ipo", "orpo", "simpo", "cpo", "kto", "bco")
# A model that still is the base: -log sigmoid(0), (0 - 1 / (2 beta))^2, 1 - sigmoid(0).
FIRST_LOSSES = {"dpo": math.log(2), "ipo": 25.0, "kto": 0.5, "bco": math.log(2)}
WAYS: dict[str, dict[str, Any]] = {
    "random": {},
    "pissa": {"lora": {"init_strategy": "pissa"}},
    "olora": {"lora": {"init_strategy": "olora"}},
    "dora": {"lora": {"use_dora": True}},
    "vera": {"lora": {"use_vera": True, "alpha": 32}},
    "4bit": {"quantization": "4bit"},
    "gradient checkpointing": {"gradient_checkpointing": True},
}
Opener = Callable[..., tuple[Any, Plan]]


def pair_rows(count: int, seed: int) -> tuple[Row, ...]:
    """Chosen answers are of a few low token ids, rejected ones of a few high ids, after random prompts."""
    rng = np.random.default_rng(seed)

    def answer(prompt: Any, low: int, high: int) -> TokenSequence:
        tokens = np.concatenate([prompt, rng.integers(low, high, int(rng.integers(2, 12)))])
        return TokenSequence(tokens, np.arange(tokens.size) >= prompt.size, Source("rows.jsonl", 1))

    prompts = [rng.integers(3, 250, int(rng.integers(3, 15))) for _ in range(count)]
    return tuple(Row("pair", (answer(prompt, 10, 14), answer(prompt, 200, 204))) for prompt in prompts)


def rows_for_task(count: int, task: str) -> Rows:
    kind = ALL_TASKS[task]
    return learned_rows(pair_rows(count, count), kind.kind, 64, kind.needs_mismatched)


def reference_of(session: Any, rows: Rows) -> Any:
    known = np.zeros((len(rows), len(rows[0].sequences)))
    for places, batch in sequence_batches(rows, 4, 0, 0, 1):
        known.reshape(-1)[places] = row_log_probabilities(session.scorer, batch)
    return known


@pytest.fixture
def opener(tiny_llama: Path) -> Iterator[Opener]:
    """`opener("dpo", lora={…}, **training)` gives a session and its plan; closed after the test."""
    sessions: list[Any] = []

    def open_it(task: str, lora: dict[str, Any] | None = None, **training: Any) -> tuple[Any, Plan]:
        adapter = LoraConfig(**{"r": 4, "alpha": 8, **(lora or {})})
        settings = TrainingConfig(**{"max_steps": 8, "lr": 5e-3, "lora": adapter, **training})
        config = Config(
            base=str(tiny_llama), task=task, data=DataConfig(train=("rows.jsonl",)), training=settings
        )
        session = open_session(
            SessionSettings(
                base=tiny_llama,
                precision=settings.precision,
                quantization=settings.quantization,
                gradient_checkpointing=settings.gradient_checkpointing,
                optimizer=optimizer_settings(settings),
                seed=settings.seed,
                objective=objective_of(config),
            )
        )
        sessions.append(session)
        resolution = resolve_adapters(session.describe().modules, adapter, {})
        rows, held_out = (rows_for_task(count, task) for count in (16, 6))
        plan = make_plan(config, resolution, rows, held_out, pad_id=0)
        session.attach(plan.adapters)
        if ALL_TASKS[task].needs_reference:
            plan = evolve(
                plan, reference=Reference(reference_of(session, rows), reference_of(session, held_out))
            )
        return session, plan

    yield open_it
    for session in sessions:
        session.close()


def settings_of(plan: Plan, step: int) -> StepSettings:
    return StepSettings(step, plan.learning_rates.at(step), plan.target_tokens(step), plan.examples(step))


def train(session: Any, plan: Plan, first: int = 1, last: int | None = None) -> list[StepResult]:
    results = []
    for step in range(first, (last or plan.total_steps) + 1):
        results.append(session.train_step(plan.micro_batches(step), settings_of(plan, step)))
        if step in plan.restart_steps:
            session.restart(plan.restart(step))
    return results


def stock_log_probabilities(model: Any, row: TokenSequence) -> float:
    """The sum over an answer's tokens in stock transformers, from the logits of the whole sequence."""
    ids = torch.from_numpy(row.tokens.astype(np.int64))
    with torch.no_grad():
        scores = model(input_ids=ids[None]).logits[0, :-1].double().log_softmax(-1)
    each = scores.gather(1, ids[1:, None])[:, 0]
    return float(each[torch.from_numpy(row.trained[1:].copy())].sum())


def assert_is_the_base(values: Any, rows: Rows, base: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = [[stock_log_probabilities(model, row) for row in one.sequences] for one in rows]
    np.testing.assert_allclose(values, expected, atol=2e-4)


@pytest.mark.parametrize("way", ["random", "pissa", "olora", "dora", "vera"])
def test_the_reference_is_the_stock_base_before_and_after_training(
    opener: Opener, tiny_llama: Path, way: str
) -> None:
    session, plan = opener("dpo", **WAYS[way])
    assert plan.reference is not None
    assert_is_the_base(plan.reference.train, plan.rows, tiny_llama)
    train(session, plan, last=4)
    assert_is_the_base(reference_of(session, plan.rows), plan.rows, tiny_llama)


def test_the_reference_is_the_true_base_after_merges(opener: Opener, tiny_llama: Path) -> None:
    session, plan = opener("dpo", relora_steps=2, relora_warmup_ratio=0.0, relora_mode="merge")
    assert len(plan.restart_steps) == 3
    train(session, plan)
    assert_is_the_base(reference_of(session, plan.rows), plan.rows, tiny_llama)


@pytest.mark.parametrize("task", FIRST_LOSSES)
def test_the_first_loss_is_that_of_a_model_that_is_its_reference(opener: Opener, task: str) -> None:
    session, plan = opener(task)
    assert train(session, plan, last=1)[0].loss == pytest.approx(FIRST_LOSSES[task], rel=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_dpo_starts_at_ln_2_and_learns_in_every_way(opener: Opener, way: str) -> None:
    session, plan = opener("dpo", **WAYS[way], **({"lr": 0.05} if way == "vera" else {}))
    results = train(session, plan)
    assert results[0].loss == pytest.approx(math.log(2), abs=1e-4)
    assert results[-1].loss < 0.65
    assert results[-1].means["reward_accuracy"] == 1.0


@pytest.mark.parametrize("task", TASKS)
def test_every_task_learns_what_was_preferred(opener: Opener, task: str) -> None:
    session, plan = opener(task, max_steps=32, lr=1e-2)
    before = session.evaluate(plan.eval_micro_batches())
    results = train(session, plan)
    after = session.evaluate(plan.eval_micro_batches())
    assert before.examples == len(plan.evaluation)
    assert after.mean < before.mean
    assert after.means["reward_accuracy"] > 0.7
    assert after.means["reward_margin"] > before.means["reward_margin"] + 0.01
    assert all(math.isfinite(result.loss) for result in results)


@pytest.mark.parametrize("task", TASKS)
def test_how_a_step_is_cut_into_micro_batches_changes_nothing(opener: Opener, task: str) -> None:
    whole, plan = opener(task, batch_size=8, max_steps=3)
    parts, _ = opener(task, batch_size=8, max_steps=3)
    known = None if plan.reference is None else plan.reference.train
    for step in (1, 2, 3):
        [places] = plan.step_rows(step)
        # Uneven parts of different padding, and the share of a process that has no row.
        cuts = (places[:1], places[1:6], places[6:])
        batches = [
            *micro_batches(plan.rows, known, cuts, (0, 1), 0),
            *micro_batches(plan.rows, known, cuts[:1], (1, 2), 0),
        ]
        assert not batches[-1].counted.any()
        one = whole.train_step(plan.micro_batches(step), settings_of(plan, step))
        other = parts.train_step(batches, settings_of(plan, step))
        assert other.loss == pytest.approx(one.loss, rel=2e-5)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-3)
        # At first all margins are rounding, and so is which of them are above zero.
        rounding = {"reward_accuracy"} if step == 1 and task in FIRST_LOSSES else set()
        kept = {name: mean for name, mean in one.means.items() if name not in rounding}
        assert {name: other.means[name] for name in kept} == pytest.approx(kept, abs=1e-4)


@pytest.mark.parametrize("task", TASKS)
def test_a_resumed_session_goes_on_to_the_same_bytes(opener: Opener, tmp_path: Path, task: str) -> None:
    whole, plan = opener(task, lora={"dropout": 0.2})
    results = train(whole, plan)
    first, _ = opener(task, lora={"dropout": 0.2})
    train(first, plan, last=3)
    first.save_state(tmp_path)
    second, _ = opener(task, lora={"dropout": 0.2})
    second.load_state(tmp_path)
    assert train(second, plan, first=4) == results[3:]
    for name, arrays in whole.factors().items():
        for factor, array in arrays.items():
            np.testing.assert_array_equal(second.factors()[name][factor], array)


def test_bco_s_mean_reward_is_state_that_must_be_whole(opener: Opener, tmp_path: Path) -> None:
    from soup_xb.core.errors import CheckpointError

    session, plan = opener("bco")
    train(session, plan, last=3)
    session.save_state(tmp_path)
    state = tmp_path / "task.json"
    assert '"count": 12.0' in state.read_text()
    state.write_text('{"mean": NaN, "count": 12.0}')
    with pytest.raises(CheckpointError, match="not the state of this task"):
        session.load_state(tmp_path)
    state.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        session.load_state(tmp_path)


def test_evaluation_leaves_the_training_of_a_preference_untouched(opener: Opener) -> None:
    for task in ("dpo", "kto", "bco"):
        quiet, plan = opener(task, lora={"dropout": 0.2}, max_steps=4)
        watched, _ = opener(task, lora={"dropout": 0.2}, max_steps=4)
        seen = []
        for step in range(1, 5):
            seen += train(watched, plan, step, step)
            watched.evaluate(plan.eval_micro_batches())
        assert seen == train(quiet, plan)


def test_a_prune_keeps_the_reference_and_the_run_going(opener: Opener) -> None:
    session, plan = opener("dpo", relora_steps=3, relora_warmup_ratio=0.0, relora_prune_ratio=0.5)
    results = train(session, plan)
    assert len(plan.restart_steps) == 2
    assert results[-1].means["reward_accuracy"] == 1.0


def test_dpo_by_hand_gives_the_loss_of_the_session(
    opener: Opener, tiny_llama: Path, stock_logits: Any
) -> None:
    session, plan = opener("dpo", beta=0.3, label_smoothing=0.1)
    train(session, plan)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    losses = []
    for row in plan.evaluation:
        assert row.kind == "pair"
        ratios = []
        for side in row.sequences:
            logits = torch.from_numpy(stock_logits(session, plan, side.tokens[None]))[0, :-1].double()
            ids = torch.from_numpy(side.tokens[1:].astype(np.int64))
            each = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
            tuned = float(each[torch.from_numpy(side.trained[1:].copy())].sum())
            ratios.append(tuned - stock_log_probabilities(model, side))
        margin = 0.3 * (ratios[0] - ratios[1])
        losses.append(0.9 * math.log1p(math.exp(-margin)) + 0.1 * math.log1p(math.exp(margin)))
    assert session.evaluate(plan.eval_micro_batches()).mean == pytest.approx(np.mean(losses), rel=1e-3)
