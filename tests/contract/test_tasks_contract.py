"""Every task that both backends train: thirty steps of each, on two families, with the same losses and means."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attrs import evolve
from contract.conftest import token_rows
from torch_backend.test_embeddings import rows as embedding_rows
from torch_backend.test_preferences import reference_of, rows_for_task, settings_of
from torch_backend.test_rollouts import ENDS, SomeIds, prompt_rows

from soup_xb.backends import open_session
from soup_xb.core.base.modules import resolve_adapters
from soup_xb.core.config.schema import Config, DataConfig, LoraConfig, TrainingConfig
from soup_xb.core.config.support_rows import BACKENDS
from soup_xb.core.errors import ModelError
from soup_xb.core.objectives import head_chunks
from soup_xb.core.rows.batches import collate, micro_batches
from soup_xb.core.rows.packing import pack
from soup_xb.core.run.plan import Plan, make_plan
from soup_xb.core.run.reference import Reference
from soup_xb.core.run.rollouts import RolloutSession, Rules
from soup_xb.core.run.session import GenerationSettings, StepResult
from soup_xb.core.tasks import TASKS
from soup_xb.runs.open import session_settings

# rlhf differs from grpo in who rewards: see tests/cli/test_rewards.py.
BOTH = tuple(name for name, task in TASKS.items() if task.mlx is None and name != "rlhf")
NEW = ("reward", "grpo", "embedding")
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3, "batch_size": 3},
    "pissa": {"lora": {"init_strategy": "pissa"}},
    "patterns": {"lora": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}},
}
FAMILIES = ("llama", "qwen3")
CELLS = [
    pytest.param(
        task,
        way,
        family,
        marks=()
        if (task in NEW and (way, family) in {("accumulation", "llama"), ("pissa", "qwen3")})
        else pytest.mark.slow,
        id=f"{task}-{way}-{family}",
    )
    for task in BOTH
    for way in WAYS
    for family in FAMILIES
]
Opener = Callable[..., tuple[Any, Plan]]


@pytest.fixture(scope="session")
def tiny_qwen(save_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen 3 of two blocks with a head of its own."""
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=320,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return save_model(tmp_path_factory.mktemp("tiny-qwen"), config)


def rows_of(task: str, count: int) -> Any:
    kind = TASKS[task].kind
    if kind == "tokens":
        rows = token_rows(count, seed=count)
        return pack(rows, 64) if TASKS[task].packing == "always" else rows
    if kind == "embedding":
        return embedding_rows(count)
    return prompt_rows(count) if kind == "prompt" else rows_for_task(count, task)


@pytest.fixture
def opener(tiny_llama: Path, tiny_qwen: Path) -> Iterator[Opener]:
    """`opener("mlx", "grpo", "qwen3", lora={…}, **training)`: what trains, and its plan; closed after the test."""
    sessions: list[Any] = []

    def open_it(
        backend: str, task: str, family: str = "llama", lora: dict[str, Any] | None = None, **training: Any
    ) -> tuple[Any, Plan]:
        base = {"llama": tiny_llama, "qwen3": tiny_qwen}[family]
        adapter = LoraConfig(**{"r": 4, "alpha": 8, **(lora or {})})
        # Adam divides a gradient by its size: at the usual epsilon one that is nearly zero, and so rounding alone,
        # would move its entry by a whole learning rate.
        rates = {"max_steps": 30, "lr": 2e-3, "adam_epsilon": 1e-4, "seed": 3}
        asked = {**rates, "group_size": 4, "max_new_tokens": 6, **training}
        settings = TrainingConfig(rewards=("format",) if task == "grpo" else (), lora=adapter, **asked)
        config = Config(base=str(base), task=task, data=DataConfig(train="rows.jsonl"), training=settings)
        session = open_session(backend, session_settings(config, base))
        sessions.append(session)
        resolution = resolve_adapters(session.describe().modules, adapter, {})
        rows, held_out = rows_of(task, 16), rows_of(task, 6)
        plan = make_plan(config, resolution, rows, held_out, pad_id=0)
        session.attach(plan.adapters)
        if TASKS[task].needs_reference:
            known = Reference(reference_of(session, rows), reference_of(session, held_out))
            plan = evolve(plan, reference=known)
        return (rolling(session, settings) if TASKS[task].samples else session), plan

    yield open_it
    for session in sessions:
        session.close()


def rolling(session: Any, settings: TrainingConfig) -> RolloutSession:
    generation = GenerationSettings(settings.max_new_tokens, settings.temperature, ENDS, settings.seed)
    words = Rules([SomeIds()], lambda ids: " ".join(map(str, ids)), settings.group_size, generation, 0)
    return RolloutSession(session, words)


def train(session: Any, plan: Plan, first: int = 1, last: int | None = None) -> list[StepResult]:
    return [
        session.train_step(plan.micro_batches(step), settings_of(plan, step))
        for step in range(first, (last or plan.total_steps) + 1)
    ]


def assert_same_means(first: Any, second: Any, atol: float) -> None:
    assert set(first) == set(second)
    # Sums of log-probabilities are large: there it is float32's own rounding.
    for name, mean in first.items():
        assert second[name] == pytest.approx(mean, abs=atol, rel=2e-6), name


class Recorded:
    """A sampler whose answers are kept."""

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler
        self.answers: list[Any] = []

    def sample(self, *asked: Any) -> Any:
        answers = self._sampler.sample(*asked)
        self.answers += answers
        return answers


def alike_until(first: Any, second: Any, plan: Plan) -> int:
    """How many steps of two runs drew the same tokens.

    A chance that lies within rounding of the edge between two tokens may choose either, about once in a thousand: from
    there on the runs have samples of their own.
    """
    answers = plan.config.training.group_size * plan.config.training.batch_size
    for index, (one, two) in enumerate(zip(first.answers, second.answers, strict=True)):
        if not np.array_equal(one, two):
            return index // answers // plan.config.training.gradient_accumulation_steps
    return plan.total_steps


@pytest.mark.parametrize(("task", "way", "family"), CELLS)
def test_both_backends_train_by_the_same_numbers(opener: Opener, task: str, way: str, family: str) -> None:
    (first, plan), (second, other) = (opener(backend, task, family, **WAYS[way]) for backend in BACKENDS)
    sampled = TASKS[task].samples
    if sampled:
        first._sampler, second._sampler = Recorded(first._sampler), Recorded(second._sampler)
    results, others = train(first, plan), train(second, other)
    steps = alike_until(first._sampler, second._sampler, plan) if sampled else plan.total_steps
    assert steps >= 5
    for one, two in zip(results[:steps], others[:steps], strict=True):
        assert two.loss == pytest.approx(one.loss, abs=2e-5, rel=2e-6)
        assert one.applied
        assert two.applied
        assert two.sampled_tokens == one.sampled_tokens
        assert_same_means(one.means, two.means, atol=2e-5)
    if steps < plan.total_steps:
        return
    one, two = (
        session.evaluate(its.eval_micro_batches()) for session, its in ((first, plan), (second, other))
    )
    assert (two.examples, two.target_tokens) == (one.examples, one.target_tokens)
    assert two.mean == pytest.approx(one.mean, abs=2e-5, rel=2e-6)
    assert_same_means(one.means, two.means, atol=2e-5)


@pytest.mark.parametrize("task", NEW)
def test_on_mlx_gradient_checkpointing_changes_no_number(opener: Opener, task: str) -> None:
    plain, plan = opener("mlx", task, max_steps=4)
    saving, other = opener("mlx", task, "llama", max_steps=4, gradient_checkpointing=True)
    for one, two in zip(train(plain, plan), train(saving, other), strict=True):
        assert two.loss == pytest.approx(one.loss, abs=1e-6)
        assert two.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)


def test_on_mlx_a_base_with_a_cache_answers_alike_with_and_without_checkpoints(opener: Opener) -> None:
    """Qwen's blocks are handed their cache by place, Llama's by name."""
    answers = []
    for asked in (False, True):
        session, plan = opener("mlx", "grpo", "qwen3", gradient_checkpointing=asked)
        prompts = [row.sequences[0].tokens for row in plan.rows]
        chances = np.random.default_rng(0).random((len(prompts), 6))
        answers.append(session._sampler.sample(prompts, chances, GenerationSettings(6, 1.0, ENDS)))
    for one, two in zip(*answers, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("task", NEW)
def test_on_mlx_a_resumed_session_goes_on_to_the_same_bytes(
    opener: Opener, tmp_path: Path, task: str
) -> None:
    lora = {"dropout": 0.2}
    whole, plan = opener("mlx", task, lora=lora, max_steps=6)
    results = train(whole, plan)
    first, _ = opener("mlx", task, lora=lora, max_steps=6)
    train(first, plan, last=3)
    session_of(first).save_state(tmp_path)
    second, _ = opener("mlx", task, lora=lora, max_steps=6)
    session_of(second).load_state(tmp_path)
    assert train(second, plan, first=4) == results[3:]
    trained = session_of(second).factors()
    for name, arrays in session_of(whole).factors().items():
        for factor, array in arrays.items():
            assert array.tobytes() == trained[name][factor].tobytes(), (name, factor)
    if task == "reward":
        head = whole.judge.head()
        assert head.tobytes() == second.judge.head().tobytes()
        assert head.tobytes() != opener("mlx", task)[0].judge.head().tobytes()


def session_of(session: Any) -> Any:
    return session._session if isinstance(session, RolloutSession) else session


@pytest.mark.parametrize("task", NEW)
def test_training_begun_on_one_backend_goes_on_on_the_other(
    opener: Opener, tmp_path: Path, task: str
) -> None:
    whole, plan = opener("torch", task, max_steps=6)
    results = train(whole, plan)
    first, _ = opener("torch", task, max_steps=6)
    train(first, plan, last=3)
    session_of(first).save_state(tmp_path)
    second, _ = opener("mlx", task, max_steps=6)
    session_of(second).load_state(tmp_path)
    gone_on = [result.loss for result in train(second, plan, first=4)]
    assert gone_on == pytest.approx([result.loss for result in results[3:]], abs=2e-5)


@pytest.mark.parametrize("task", NEW)
def test_on_mlx_a_step_is_not_compiled_again_for_sizes_that_are_known(opener: Opener, task: str) -> None:
    session, plan = opener("mlx", task, max_steps=12)
    train(session, plan)
    step = session_of(session)._step
    assert 1 <= step.traced < plan.total_steps
    traced = step.traced
    if task != "grpo":
        train(session, plan)
        assert step.traced == traced


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_answer_does_not_depend_on_the_batch_it_is_in(opener: Opener, backend: str) -> None:
    session, plan = opener(backend, "grpo")
    prompts = [row.sequences[0].tokens for row in plan.rows]
    chances = np.random.default_rng(0).random((len(prompts), 6))
    settings = GenerationSettings(6, 1.0, ENDS)
    together = session._sampler.sample(prompts, chances, settings)
    assert len({len(prompt) for prompt in prompts}) > 3
    for place, prompt in enumerate(prompts):
        [alone] = session._sampler.sample([prompt], chances[place : place + 1], settings)
        assert alone.dtype == np.int32
        np.testing.assert_array_equal(alone, together[place])


def test_both_backends_draw_the_same_tokens_and_end_at_the_same_end(opener: Opener) -> None:
    drawn = []
    for backend in BACKENDS:
        session, plan = opener(backend, "grpo", "qwen3")
        prompts = [row.sequences[0].tokens for row in plan.rows]
        chances = np.random.default_rng(1).random((len(prompts), 40))
        ends = tuple(range(100, 130))
        drawn.append(session._sampler.sample(prompts, chances, GenerationSettings(40, 0.9, ends)))
    lengths = {len(answer) for answer in drawn[0]}
    assert len(lengths) > 3
    assert sum(map(len, drawn[0])) > 100
    for one, two in zip(*drawn, strict=True):
        np.testing.assert_array_equal(one, two)
        assert not np.isin(one[:-1], ends).any()


def test_how_a_step_of_answers_is_cut_changes_nothing_on_mlx(opener: Opener) -> None:
    (whole, plan), (parts, _) = (opener("mlx", "grpo", batch_size=6, lr=1e-2) for _ in range(2))
    for step in (1, 2, 3):
        [places] = plan.step_rows(step)
        # Uneven parts, and the share of a process that has no row.
        cuts = (places[:1], places[1:])
        batches = [
            *micro_batches(plan.rows, None, cuts, (0, 1), 0),
            *micro_batches(plan.rows, None, cuts[:1], (1, 2), 0),
        ]
        one = whole.train_step(plan.micro_batches(step), settings_of(plan, step))
        other = parts.train_step(batches, settings_of(plan, step))
        assert other.loss == pytest.approx(one.loss, abs=1e-5)
        assert other.means == pytest.approx(one.means, abs=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_both_backends_make_the_same_vectors(opener: Opener, pooling: str) -> None:
    found = []
    for backend in BACKENDS:
        session, plan = opener(backend, "embedding", "qwen3", pooling=pooling, max_steps=4)
        assert session.embedder.pooling == pooling
        assert session.scorer is None
        train(session, plan)
        texts = [sequence for row in plan.rows[:4] for sequence in row.sequences]
        together = session.embedder.embeddings(collate(texts, 0))
        alone = np.concatenate([session.embedder.embeddings(collate([text], 0)) for text in texts])
        np.testing.assert_allclose(together, alone, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-6)
        assert np.abs(together - session.embedder.embeddings(collate(texts, 0), adapter=False)).max() > 1e-3
        found.append(together)
    np.testing.assert_allclose(found[1], found[0], atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_backends_describe_a_base_of_vectors_alike(opener: Opener, family: str) -> None:
    first, second = (opener(backend, "embedding", family)[0].describe() for backend in BACKENDS)
    assert set(first.modules) == set(second.modules)
    assert evolve(first, modules=()) == evolve(second, modules=())
    assert not any("lm_head" in module.name for module in second.modules)


def test_an_encoder_is_refused_on_mlx_with_its_reason(tiny_encoder: Path) -> None:
    from soup_xb.core.errors import ConfigError

    config = Config(base=str(tiny_encoder), task="embedding", data=DataConfig(train="rows.jsonl"))
    with pytest.raises(ConfigError, match="mlx-lm has decoders alone") as refused:
        open_session("mlx", session_settings(config, tiny_encoder))
    assert refused.value.problems[0].code == "mlx-no-encoder"


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_adapter_on_the_output_head_cannot_score(opener: Opener, backend: str) -> None:
    with pytest.raises(ModelError, match="not part of the model that scores") as refused:
        opener(backend, "reward", "qwen3", lora={"target_modules": ("q_proj", "lm_head")})
    assert refused.value.problems[0].code == "no-score-head"


@pytest.mark.parametrize("task", ["sft", "dpo", "grpo"])
@pytest.mark.parametrize("lora", [{}, {"target_modules": ("q_proj", "lm_head")}], ids=["blocks", "head"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_head_in_chunks_trains_what_the_whole_head_trains(
    opener: Opener, monkeypatch: pytest.MonkeyPatch, backend: str, task: str, lora: dict[str, Any]
) -> None:
    results = []
    for small in (False, True):
        monkeypatch.setattr(head_chunks, "MOST_AT_ONCE", 0 if small else 2**40)
        monkeypatch.setattr(head_chunks, "CHUNK", 7 * 320)
        session, plan = opener(backend, task, "qwen3", lora=lora, max_steps=5, lr=1e-2)
        results.append((train(session, plan), session_of(session).factors()))
    (whole, factors), (parts, others) = results
    for one, two in zip(whole, parts, strict=True):
        assert two.loss == pytest.approx(one.loss, abs=1e-5)
        assert two.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
        assert two.means == pytest.approx(one.means, abs=1e-4)
    for name, arrays in factors.items():
        np.testing.assert_allclose(others[name]["lora_B"], arrays["lora_B"], atol=2e-4)
        assert arrays["lora_B"].any()
