from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from attrs import define, evolve, field

from soup_xb.core.base.modules import Module, resolve_adapters
from soup_xb.core.config.schema import Config, DataConfig, LoraConfig, TrainingConfig
from soup_xb.core.errors import ConfigError, NonFiniteError
from soup_xb.core.rows.batches import MicroBatch
from soup_xb.core.rows.examples import Source
from soup_xb.core.rows.row import Row, text_row
from soup_xb.core.run.events import EvalEvent, Event, Notice, StepEvent
from soup_xb.core.run.loop import Hooks, LoopResult, run_loop
from soup_xb.core.run.plan import Plan, make_plan
from soup_xb.core.run.session import LossSum, RestartResult, RestartSettings, StepResult, StepSettings

ROWS = tuple(
    text_row(np.arange(2, 6 + index % 5), np.arange(4 + index % 5) > 1, Source("rows.jsonl", index + 1))
    for index in range(23)
)


@define
class FakeSession:
    """Counts what the loop asks for; its loss is 100 / step."""

    process: int = 0
    processes: int = 1
    bad_step: int = 0
    steps: list[tuple[StepSettings, int, int]] = field(factory=list)
    evaluations: int = 0
    restarts: list[tuple[RestartSettings, int, int]] = field(factory=list)

    def train_step(self, micro_batches: Sequence[MicroBatch], step: StepSettings) -> StepResult:
        targets = sum(batch.target_tokens for batch in micro_batches)
        self.steps.append((step, len(micro_batches), targets))
        if step.step == self.bad_step:
            return StepResult(math.nan, math.nan, applied=False)
        return StepResult(100 / step.step, 1.0, applied=True)

    def evaluate(self, micro_batches: Sequence[MicroBatch], adapter: bool = True) -> LossSum:
        self.evaluations += 1
        targets = sum(batch.target_tokens for batch in micro_batches)
        return LossSum(2.0 * targets, targets)

    def restart(self, settings: RestartSettings) -> RestartResult:
        self.restarts.append((settings, len(self.steps), self.evaluations))
        return RestartResult(entries=100, pruned=90)

    def agree(self, value: int) -> int:
        return value


def make(evaluation: tuple[Row, ...] = (), **training: Any) -> Plan:
    settings = TrainingConfig(**{"batch_size": 4, "lora": LoraConfig(r=2), **training})
    config = Config(base="tiny", data=DataConfig(train=("rows.jsonl",)), training=settings)
    resolution = resolve_adapters([Module("model.layers.0.q_proj", 8, 8)], settings.lora, {})
    return make_plan(config, resolution, ROWS, evaluation, pad_id=0)


def run(
    plan: Plan, session: Any, done: int = 0, stop_after: int = 0
) -> tuple[LoopResult, list[Event], list[int]]:
    events: list[Event] = []
    saves: list[int] = []

    def stop() -> int:
        return 15 if stop_after and len(events) >= stop_after else 0

    return run_loop(plan, session, Hooks(events.append, saves.append, stop), done), events, saves


def test_a_step_is_one_update_over_its_micro_batches() -> None:
    plan, session = make(epochs=2, gradient_accumulation_steps=4), FakeSession()
    result, events, _ = run(plan, session)
    assert plan.steps_per_epoch == 2  # 23 rows are 6 micro-batches: 4 and 2
    assert [count for _, count, _ in session.steps] == [4, 2, 4, 2]
    assert all(step.target_tokens == targets for step, _, targets in session.steps)
    assert sum(event.tokens for event in events if isinstance(event, StepEvent)) == result.tokens
    assert result.tokens == 2 * sum(row.length for row in ROWS)


def test_max_steps_decides_over_epochs() -> None:
    plan = make(epochs=1, max_steps=17)
    result, _, _ = run(plan, FakeSession())
    assert (plan.total_steps, result.step) == (17, 17)


def test_learning_rates_are_the_plan_s() -> None:
    plan, session = make(max_steps=6, lr=0.5, scheduler="linear", warmup_steps=2), FakeSession()
    run(plan, session)
    assert [step.learning_rate for step, _, _ in session.steps] == pytest.approx(
        [0.25, 0.5, 0.5, 0.375, 0.25, 0.125]
    )


def test_evaluations_and_saves_come_at_their_steps_and_at_the_end() -> None:
    plan, session = make(ROWS[:5], max_steps=7, eval_steps=3, save_steps=2), FakeSession()
    _, events, saves = run(plan, session)
    assert [event.step for event in events if isinstance(event, EvalEvent)] == [3, 6, 7]
    assert saves == [2, 4, 6, 7]
    assert {event.loss for event in events if isinstance(event, EvalEvent)} == {2.0}


def test_without_held_out_rows_nothing_is_evaluated() -> None:
    session = FakeSession()
    run(make(max_steps=3, eval_steps=1), session)
    assert session.evaluations == 0


def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint() -> None:
    result, events, saves = run(make(max_steps=9), FakeSession(), stop_after=4)
    assert (result.step, result.stopped_by, saves) == (4, 15, [4])
    assert len(events) == 4


def test_a_resumed_run_sees_the_rows_and_rates_of_the_uninterrupted_one() -> None:
    plan, whole, rest = make(epochs=3, gradient_accumulation_steps=2), FakeSession(), FakeSession()
    run(plan, whole)
    run(plan, rest, done=4)
    assert rest.steps == whole.steps[4:]


def test_a_loss_that_is_not_finite_names_step_rows_and_last_good_loss() -> None:
    with pytest.raises(NonFiniteError) as caught:
        run(make(max_steps=9), FakeSession(bad_step=5))
    text = str(caught.value)
    assert "step 5" in text
    assert "last good loss 25.0000" in text
    assert "rows.jsonl:" in text


def test_processes_together_see_the_targets_of_one(processes: int = 2) -> None:
    plan = make(max_steps=6)
    counts = []
    for process in range(processes):
        session = FakeSession(process=process, processes=processes)
        run(plan, session)
        counts.append([targets for _, _, targets in session.steps])
    alone = FakeSession()
    run(plan, alone)
    assert np.sum(counts, axis=0).tolist() == [targets for _, _, targets in alone.steps]


def test_a_restart_that_would_never_happen_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="no restart would happen: relora_steps is 500 and the run has 120 steps"
    ):
        make(max_steps=120, relora_steps=500)
    assert make(max_steps=120, relora_steps=40).restart_steps == (40, 80)


def test_a_restart_fires_after_the_step_between_two_losses_of_its_rows_and_before_the_save() -> None:
    plan = make(ROWS[:5], max_steps=7, relora_steps=3, relora_prune_ratio=0.5, eval_steps=3, save_steps=3)
    session, order = FakeSession(), []
    hooks = Hooks(
        lambda event: order.append(type(event).__name__), lambda step: order.append("save"), lambda: 0
    )
    run_loop(plan, session, hooks)
    assert [(s.step, s.mode, s.ratio, steps) for s, steps, _ in session.restarts] == [
        (3, "prune", 0.5, 3),
        (6, "prune", 0.5, 6),
    ]
    assert [evaluations for _, _, evaluations in session.restarts] == [1, 4]
    assert order[2:6] == ["StepEvent", "RestartEvent", "EvalEvent", "save"]


def test_the_loop_warns_when_the_loss_stays_high_after_a_restart() -> None:
    @define
    class Hurt(FakeSession):
        def train_step(self, micro_batches: Sequence[MicroBatch], step: StepSettings) -> StepResult:
            return StepResult(2.0 if step.step <= 30 else 3.0, 1.0, applied=True)

    plan = make(max_steps=60, relora_steps=30)
    _, events, _ = run(plan, Hurt())
    (notice,) = (event for event in events if isinstance(event, Notice))
    assert notice.warning and notice.problem.code == "restart-hurts"
    assert notice.problem.where == "step 50"


@pytest.mark.parametrize(("asked", "rewarm"), [(None, 2), (5, 5)])
def test_a_merge_warms_the_learning_rate_up_again(asked: int | None, rewarm: int) -> None:
    plan = make(
        max_steps=60, relora_steps=20, relora_mode="merge", relora_rewarm_steps=asked, scheduler="constant", lr=1.0
    )  # fmt: skip
    rates = [plan.learning_rates.at(step) for step in range(1, 61)]
    low = [step for step, rate in enumerate(rates, 1) if rate < 1.0]
    assert low == [start + k for start in (20, 40) for k in range(1, rewarm)]
    assert rates[20] == pytest.approx(1 / rewarm)
    assert make(max_steps=60, relora_steps=20).learning_rates.restarts == ()


def test_a_plan_is_frozen() -> None:
    plan = make()
    with pytest.raises(AttributeError):
        plan.total_steps = 3  # type: ignore[misc]
    assert evolve(plan, total_steps=3).total_steps == 3
