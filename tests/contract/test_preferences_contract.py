"""Preference tasks on both backends: the same references, losses and metrics; and what MLX's step adds to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attrs import evolve
from torch_backend.test_preferences import reference_of, rows_for_task, settings_of, train

from soup_xb.backends import open_session
from soup_xb.backends.mlx.head import padded_grid
from soup_xb.core.base.modules import resolve_adapters
from soup_xb.core.config.schema import Config, DataConfig, LoraConfig, TrainingConfig
from soup_xb.core.run.plan import Plan, make_plan, objective_of, optimizer_settings
from soup_xb.core.run.reference import Reference
from soup_xb.core.run.session import SessionSettings, StepResult
from soup_xb.core.tasks import TASKS as ALL_TASKS

TASKS = ("dpo", "ipo", "orpo", "simpo", "cpo", "kto", "bco")
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"gradient_accumulation_steps": 2},
    "pissa": {"lora": {"init_strategy": "pissa"}},
    "patterns": {"lora": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}},
}
# Every task with accumulation; the other ways once with a pair and once with a judged answer, or more.
CELLS = [
    *((task, "plain") for task in TASKS),
    *(("dpo", way) for way in ("pissa", "patterns")),
    *(("kto", way) for way in ("pissa", "patterns")),
    ("simpo", "pissa"),
    ("ipo", "patterns"),
    ("bco", "pissa"),
]
RESUMED = ("dpo", "kto", "bco")
Opener = Callable[..., tuple[Any, Plan]]


@pytest.fixture
def opener(tiny_llama: Path) -> Iterator[Opener]:
    """`opener("mlx", "dpo", lora={…}, **training)` gives a session and its plan; closed after the test."""
    sessions: list[Any] = []

    def open_it(
        backend: str, task: str, lora: dict[str, Any] | None = None, **training: Any
    ) -> tuple[Any, Plan]:
        adapter = LoraConfig(**{"r": 4, "alpha": 8, **(lora or {})})
        settings = TrainingConfig(**{"max_steps": 6, "lr": 5e-3, "lora": adapter, **training})
        config = Config(
            base=str(tiny_llama), task=task, data=DataConfig(train=("rows.jsonl",)), training=settings
        )
        session = open_session(
            backend,
            SessionSettings(
                base=tiny_llama,
                precision=settings.precision,
                quantization=settings.quantization,
                gradient_checkpointing=settings.gradient_checkpointing,
                optimizer=optimizer_settings(settings),
                seed=settings.seed,
                objective=objective_of(config),
            ),
        )
        sessions.append(session)
        resolution = resolve_adapters(session.describe().modules, adapter, {})
        rows, held_out = (rows_for_task(count, task) for count in (16, 6))
        plan = make_plan(config, resolution, rows, held_out, pad_id=0)
        session.attach(plan.adapters)
        if ALL_TASKS[task].needs_reference:
            known = Reference(reference_of(session, rows), reference_of(session, held_out))
            plan = evolve(plan, reference=known)
        return session, plan

    yield open_it
    for session in sessions:
        session.close()


def assert_same_means(first: Any, second: Any, atol: float) -> None:
    assert set(first) == set(second)
    assert first["reward_accuracy"] == second["reward_accuracy"]
    for name, mean in first.items():
        assert second[name] == pytest.approx(mean, abs=atol), name


def assert_same_results(first: list[StepResult], second: list[StepResult], atol: float) -> None:
    np.testing.assert_allclose([r.loss for r in second], [r.loss for r in first], rtol=0, atol=atol)
    np.testing.assert_allclose([r.grad_norm for r in second], [r.grad_norm for r in first], rtol=1e-3)
    for one, other in zip(first, second, strict=True):
        assert one.applied
        assert other.applied
        assert_same_means(one.means, other.means, atol)


@pytest.mark.parametrize(("task", "way"), CELLS, ids=["-".join(cell) for cell in CELLS])
def test_both_backends_prefer_by_the_same_numbers(opener: Opener, task: str, way: str) -> None:
    (first, plan), (second, other) = (opener(backend, task, **WAYS[way]) for backend in ("torch", "mlx"))
    assert (plan.reference is None) == (other.reference is None) == (not ALL_TASKS[task].needs_reference)
    if plan.reference is not None and other.reference is not None:
        np.testing.assert_allclose(other.reference.train, plan.reference.train, rtol=0, atol=1e-4)
        np.testing.assert_allclose(other.reference.evaluation, plan.reference.evaluation, rtol=0, atol=1e-4)
    assert_same_results(train(first, plan), train(second, other), atol=2e-5)
    one, two = (
        session.evaluate(its.eval_micro_batches()) for session, its in ((first, plan), (second, other))
    )
    assert (two.examples, two.target_tokens) == (one.examples, one.target_tokens)
    assert two.mean == pytest.approx(one.mean, abs=2e-5)
    assert_same_means(one.means, two.means, atol=2e-5)


@pytest.mark.parametrize("way", ["plain", "pissa"])
def test_on_mlx_the_reference_stays_that_of_the_base(opener: Opener, way: str) -> None:
    session, plan = opener("mlx", "dpo", **WAYS[way])
    assert plan.reference is not None
    train(session, plan)
    np.testing.assert_array_equal(reference_of(session, plan.rows), plan.reference.train)


@pytest.mark.parametrize("task", ["dpo", "kto"])
def test_on_mlx_gradient_checkpointing_changes_no_number(opener: Opener, task: str) -> None:
    plain, plan = opener("mlx", task, max_steps=3)
    saving, other = opener("mlx", task, max_steps=3, gradient_checkpointing=True)
    assert_same_results(train(plain, plan), train(saving, other), atol=1e-6)


def test_on_mlx_dora_learns_what_was_preferred(opener: Opener) -> None:
    session, plan = opener("mlx", "dpo", lora={"use_dora": True})
    results = train(session, plan)
    assert results[0].loss == pytest.approx(math.log(2), abs=1e-4)
    assert results[-1].loss < 0.68
    assert results[-1].means["reward_accuracy"] == 1.0


@pytest.mark.parametrize("task", RESUMED)
def test_on_mlx_a_resumed_session_goes_on_to_the_same_bytes(
    opener: Opener, tmp_path: Path, task: str
) -> None:
    whole, plan = opener("mlx", task, lora={"dropout": 0.2})
    results = train(whole, plan)
    first, _ = opener("mlx", task, lora={"dropout": 0.2})
    train(first, plan, last=3)
    first.save_state(tmp_path)
    assert (tmp_path / "task.json").exists() == (task == "bco")
    second, _ = opener("mlx", task, lora={"dropout": 0.2})
    second.load_state(tmp_path)
    assert train(second, plan, first=4) == results[3:]
    trained = second.factors()
    for name, arrays in whole.factors().items():
        for factor, array in arrays.items():
            assert array.tobytes() == trained[name][factor].tobytes(), (name, factor)


@pytest.mark.parametrize("task", RESUMED)
def test_on_mlx_a_step_is_compiled_once_for_each_size_of_the_grid(opener: Opener, task: str) -> None:
    session, plan = opener("mlx", task, max_steps=12)
    sizes, scalars, traced = set(), set(), []
    for step in range(1, plan.total_steps + 1):
        batches = plan.micro_batches(step)
        sizes |= {tuple(array.shape for array in padded_grid(batch).arrays) for batch in batches}
        session.train_step(batches, settings_of(plan, step))
        scalars.add(tuple(sorted(session._state.scalars.items())))
        traced.append((session._step.traced, len(sizes)))
    assert all(count == expected for count, expected in traced), traced
    assert traced[-1][0] < plan.total_steps
    # What moves from step to step is an argument of the compiled step, not a part of it.
    assert (len(scalars) > 3) == (task != "dpo")
