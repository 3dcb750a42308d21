"""Answers sampled in the training loop: chosen by numbers alone, whatever batch they are in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from soup_xb.backends.torch.session import open_session
from soup_xb.core.base.modules import resolve_adapters
from soup_xb.core.config.schema import Config, DataConfig, LoraConfig, TrainingConfig
from soup_xb.core.rows.batches import micro_batches
from soup_xb.core.rows.examples import Source
from soup_xb.core.rows.row import Prompt, Row, TokenSequence
from soup_xb.core.run.plan import Plan, make_plan, objective_of, optimizer_settings
from soup_xb.core.run.rollouts import RolloutSession, Rules
from soup_xb.core.run.session import GenerationSettings, SessionSettings, StepResult, StepSettings

ENDS = (2,)
Opener = Callable[..., tuple[Any, RolloutSession, Plan]]


class SomeIds:
    """Earns the share of thirty of the token ids in an answer, whose text are its ids."""

    name = "some"

    def check(self, rows: Any) -> None:
        """Every row will do."""

    def earned(self, answers: Any) -> list[float]:
        ids = [[int(word) for word in answer.text.split()] for answer in answers]
        return [sum(token in range(60, 90) for token in one) / max(1, len(one)) for one in ids]


def prompt_rows(count: int) -> tuple[Row, ...]:
    rng = np.random.default_rng(count)
    # Every prompt ends alike, as chat prompts do.
    heads = [rng.integers(3, 250, int(rng.integers(3, 12))) for _ in range(count)]
    made = [np.concatenate([head, [5, 77, 10, 9]]).astype(np.int32) for head in heads]
    return tuple(
        Row(
            "prompt",
            (TokenSequence(tokens, np.zeros(len(tokens), dtype=bool), Source("rows.jsonl", place + 1)),),
            Prompt({}, place),
        )
        for place, tokens in enumerate(made)
    )


@pytest.fixture
def opener(tiny_llama: Path) -> Iterator[Opener]:
    """`opener(lora={…}, **training)`: a session with adapters, the same behind rollouts, and a plan."""
    sessions: list[Any] = []

    def open_it(lora: dict[str, Any] | None = None, **training: Any) -> tuple[Any, RolloutSession, Plan]:
        adapter = LoraConfig(**{"r": 4, "alpha": 8, **(lora or {})})
        chosen = {"max_steps": 6, "lr": 1e-2, "group_size": 4, "max_new_tokens": 6, "seed": 3, **training}
        settings = TrainingConfig(lora=adapter, rewards=("format",), **chosen)
        config = Config(
            base=str(tiny_llama), task="grpo", data=DataConfig(train="rows.jsonl"), training=settings
        )
        session = open_session(
            SessionSettings(
                base=tiny_llama,
                precision="fp32",
                quantization="none",
                gradient_checkpointing=settings.gradient_checkpointing,
                optimizer=optimizer_settings(settings),
                seed=settings.seed,
                objective=objective_of(config),
            )
        )
        sessions.append(session)
        resolution = resolve_adapters(session.describe().modules, adapter, {})
        plan = make_plan(config, resolution, prompt_rows(12), prompt_rows(3), pad_id=0)
        session.attach(plan.adapters)
        generation = GenerationSettings(settings.max_new_tokens, settings.temperature, ENDS, settings.seed)
        words = Rules([SomeIds()], lambda ids: " ".join(map(str, ids)), settings.group_size, generation, 0)
        return session, RolloutSession(session, words), plan

    yield open_it
    for session in sessions:
        session.close()


def train(rolling: RolloutSession, plan: Plan, first: int = 1, last: int | None = None) -> list[StepResult]:
    results = []
    for step in range(first, (last or plan.total_steps) + 1):
        settings = StepSettings(step, plan.learning_rates.at(step), 0, plan.examples(step))
        results.append(rolling.train_step(plan.micro_batches(step), settings))
        if step in plan.restart_steps:
            rolling.restart(plan.restart(step))
    return results


def test_numbers_choose_a_sample_of_the_stock_distribution(opener: Opener, tiny_llama: Path) -> None:
    session, _, _ = opener()
    prompts = [np.array(ids, dtype=np.int32) for ids in ([5, 9, 30], [7, 80, 81, 82, 90, 12, 40])]
    chances = np.array([[0.1, 0.5, 0.9], [0.999, 0.0, 0.3]])
    answers = session.sampler.sample(prompts, chances, GenerationSettings(3, 0.7, ENDS))
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    for prompt, answer, row in zip(prompts, answers, chances, strict=True):
        ids = list(prompt)
        for token, chance in zip(answer, row, strict=False):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
            shares = (logits / 0.7).softmax(-1).cumsum(-1)
            assert shares[token] > chance - 1e-6
            assert token == 0 or shares[token - 1] <= chance + 1e-6
            ids.append(int(token))
        assert len(answer) == 3 or answer[-1] in ENDS


def test_the_tokens_of_a_step_are_those_that_are_trained_on(
    opener: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, rolling, plan = opener()
    trained: list[Any] = []
    own = session.train_step

    def seen(batches: Any, step: StepSettings) -> StepResult:
        trained.extend(batches)
        result: StepResult = own(batches, step)
        return result

    monkeypatch.setattr(session, "train_step", seen)
    for step in (1, 2):
        trained.clear()
        [result] = train(rolling, plan, step, step)
        assert result.sampled_tokens == sum(batch.target_tokens for batch in trained)
        assert plan.real_tokens(step) + result.sampled_tokens == sum(batch.real_tokens for batch in trained)


def test_an_answer_does_not_depend_on_the_batch_it_is_in(opener: Opener) -> None:
    session, _, plan = opener()
    prompts = [row.sequences[0].tokens for row in plan.rows]
    chances = np.random.default_rng(0).random((len(prompts), 6))
    settings = GenerationSettings(6, 1.0, ENDS)
    torch.manual_seed(1)
    together = session.sampler.sample(prompts, chances, settings)
    torch.manual_seed(2)
    for place, prompt in enumerate(prompts):
        [alone] = session.sampler.sample([prompt], chances[place : place + 1], settings)
        np.testing.assert_array_equal(alone, together[place])


@pytest.mark.parametrize("way", ["random", "pissa", "gradient checkpointing", "without a base"])
def test_what_earns_more_becomes_more_frequent(opener: Opener, way: str) -> None:
    training: dict[str, Any] = {
        "random": {},
        "pissa": {"lora": {"init_strategy": "pissa"}},
        "gradient checkpointing": {"gradient_checkpointing": True},
        "without a base": {"beta": 0.0},
    }[way]
    _, rolling, plan = opener(max_steps=16, lr=2e-2, scheduler="constant", **training)
    before = rolling.evaluate(plan.eval_micro_batches())
    results = train(rolling, plan)
    after = rolling.evaluate(plan.eval_micro_batches())
    assert after.means["reward"] > before.means["reward"] + 0.05
    assert before.examples == 12
    assert ("kl" in after.means) == (way != "without a base")
    if way != "without a base":
        # At first the policy is the base, the true one.
        assert results[0].means["kl"] == pytest.approx(0.0, abs=1e-5)
        assert after.mean == pytest.approx(0.04 * after.means["kl"] - after.means["reward"], abs=1e-5)


def test_how_a_step_is_cut_into_micro_batches_changes_nothing(opener: Opener) -> None:
    _, whole, plan = opener(batch_size=6)
    _, parts, _ = opener(batch_size=6)
    for step in (1, 2, 3):
        [places] = plan.step_rows(step)
        # Uneven parts, and the share of a process that has no row.
        cuts = (places[:1], places[1:])
        batches = [
            *micro_batches(plan.rows, None, cuts, (0, 1), 0),
            *micro_batches(plan.rows, None, cuts[:1], (1, 2), 0),
        ]
        assert not batches[-1].counted.any()
        settings = StepSettings(step, plan.learning_rates.at(step), 0, plan.examples(step))
        one = whole.train_step(plan.micro_batches(step), settings)
        other = parts.train_step(batches, settings)
        assert other.loss == pytest.approx(one.loss, abs=1e-5)
        assert other.means == pytest.approx(one.means, abs=1e-4)


@pytest.mark.parametrize("mode", ["none", "prune", "merge"])
def test_a_resumed_session_goes_on_to_the_same_bytes(opener: Opener, tmp_path: Path, mode: str) -> None:
    training: dict[str, Any] = {"lora": {"dropout": 0.2}}
    if mode != "none":
        training |= {"relora_steps": 2, "relora_warmup_ratio": 0.0, "relora_mode": mode}
    session, rolling, plan = opener(**training)
    results = train(rolling, plan)
    first, first_rolling, _ = opener(**training)
    train(first_rolling, plan, last=3)
    first.save_state(tmp_path)
    second, second_rolling, _ = opener(**training)
    second.load_state(tmp_path)
    torch.manual_seed(77)
    assert train(second_rolling, plan, first=4) == results[3:]
    for name, arrays in session.factors().items():
        for factor, array in arrays.items():
            np.testing.assert_array_equal(second.factors()[name][factor], array)


def test_the_divergence_is_from_the_true_base_after_merges(opener: Opener) -> None:
    _, rolling, plan = opener(relora_steps=2, relora_warmup_ratio=0.0, relora_mode="merge", max_steps=5)
    results = train(rolling, plan)
    assert len(plan.restart_steps) == 2
    # New factors begin at zero: measured from the merged weights the divergence would be zero here.
    assert results[2].means["kl"] > 1e-3
