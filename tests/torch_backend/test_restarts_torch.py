from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from math import floor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from processes import in_two_processes

from soup_xb.core.errors import ModelError
from soup_xb.core.run.events import Event, RestartEvent, StepEvent
from soup_xb.core.run.loop import Hooks, run_loop
from soup_xb.core.run.session import RestartSettings, StepSettings

Attached = Callable[..., Any]


def train(
    session: Any, plan: Any, save: Callable[[int], None] = lambda step: None, done: int = 0
) -> list[Event]:
    events: list[Event] = []
    run_loop(plan, session, Hooks(events.append, save, lambda: 0), done)
    return events


def losses(events: list[Event]) -> list[float]:
    return [event.loss for event in events if isinstance(event, StepEvent)]


def restarts(events: list[Event]) -> list[RestartEvent]:
    return [event for event in events if isinstance(event, RestartEvent)]


def trained_for(attached: Attached, steps: int, lora: dict[str, Any] | None = None, **training: Any) -> Any:
    """A session stopped after `steps` of training, with its plan."""
    session, plan = attached(lora, **training)
    stop = iter([0] * (steps - 1) + [15])
    run_loop(plan, session, Hooks(lambda event: None, lambda step: None, lambda: next(stop)), 0)
    return session, plan


def merge(step: int) -> RestartSettings:
    return RestartSettings(step, "merge", 0.9, True)


@pytest.mark.parametrize("ratio", [0.29, 0.9])
@pytest.mark.parametrize("strategy", ["random", "pissa", "olora"])
def test_a_prune_leaves_exactly_its_share_at_the_initial_value(
    attached: Attached, strategy: str, ratio: float
) -> None:
    session, _ = trained_for(attached, 3, {"init_strategy": strategy})
    before = session._adapters.trained()
    result = session.restart(RestartSettings(3, "prune", ratio, True))
    entries = pruned = 0
    for name, arrays in session._adapters.trained().items():
        start = session._adapters.starts.get(name)
        for factor, first in (("lora_A", start and start.a), ("lora_B", start and start.b)):
            values = arrays[factor]
            initial = np.zeros_like(values) if first is None else first
            count = floor(values.size * ratio + 1e-9)
            assert (values == initial).sum() == count
            kept = values != initial
            np.testing.assert_array_equal(values[kept], before[name][factor][kept])
            distance = np.abs(before[name][factor] - initial)
            assert distance[~kept].max() <= distance[kept].min()
            entries, pruned = entries + values.size, pruned + count
    assert (result.entries, result.pruned) == (entries, pruned)


@pytest.mark.parametrize("reset", [True, False])
def test_the_optimizer_state_of_pruned_tensors_starts_afresh_and_no_other(
    attached: Attached, reset: bool
) -> None:
    session, _ = trained_for(attached, 3, {"use_dora": True})
    optimizer = session._optimizer
    before = {
        name: {key: value.clone() for key, value in optimizer.optimizer.state[parameter].items()}
        for name, parameter in optimizer.parameters.items()
    }
    session.restart(RestartSettings(3, "prune", 0.5, reset))
    touched = set()
    for name, parameter in optimizer.parameters.items():
        state = optimizer.optimizer.state[parameter]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        if all(torch.equal(value, before[name][key]) for key, value in state.items()):
            continue
        assert not any(value.any() for value in state.values())
        touched.add(name)
    factors = {name for name in optimizer.parameters if not name.endswith("lora_magnitude_vector")}
    assert touched == (factors if reset else set())


def test_after_a_reset_the_first_update_is_adam_s_first(attached: Attached) -> None:
    training = {"max_grad_norm": 0.0, "weight_decay": 0.0, "scheduler": "constant", "lr": 1e-3}
    session, plan = trained_for(attached, 3, **training)
    session.restart(RestartSettings(3, "prune", 0.5, True))
    before = session._adapters.trained()
    session.train_step(plan.micro_batches(4), StepSettings(4, 1e-3, plan.target_tokens(4)))
    name = plan.adapters.modules[0].name
    moved = session._adapters.trained()[name]["lora_A"] - before[name]["lora_A"]
    assert np.median(np.abs(moved)) == pytest.approx(1e-3, rel=0.02)


def test_the_loop_fires_at_its_steps_and_tells_the_losses(attached: Attached) -> None:
    session, plan = attached(relora_steps=2, relora_warmup_ratio=0.5, relora_prune_ratio=0.9)
    fired = restarts(train(session, plan))
    assert [event.step for event in fired] == [4, 6] == list(plan.restart_steps)
    parameters = sum(adapter.parameters for adapter in plan.adapters.modules)
    assert all(event.entries == parameters and 0.85 < event.pruned / parameters < 0.9 for event in fired)
    assert all(event.loss_before != event.loss_after for event in fired)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_restarts_work_under_accumulation_and_dropout(attached: Attached, precision: str) -> None:
    for mode in ({}, {"relora_mode": "merge"}):
        session, plan = attached(
            {"dropout": 0.1}, relora_steps=3, gradient_accumulation_steps=2, precision=precision, **mode
        )
        events = train(session, plan)
        assert len(restarts(events)) == 2
        assert np.isfinite(losses(events)).all()


@pytest.mark.parametrize("strategy", ["random", "pissa", "olora"])
def test_a_merge_changes_no_output_and_the_base_can_still_be_had(attached: Attached, strategy: str) -> None:
    session, plan = attached({"init_strategy": strategy}, relora_steps=3, relora_mode="merge")
    tokens = plan.rows[0].sequences[0].tokens[None]
    base = session.logits(tokens, adapter=False)
    session, plan = trained_for(attached, 4, {"init_strategy": strategy}, relora_steps=3, relora_mode="merge")
    for step in (4, 5):
        live = session.logits(tokens)
        assert np.abs(live - base).max() > 1e-2
        result = session.restart(merge(step))
        np.testing.assert_allclose(session.logits(tokens), live, atol=1e-5)
        np.testing.assert_allclose(session.logits(tokens, adapter=False), base, atol=1e-5)
        np.testing.assert_allclose(session.logits(tokens), live, atol=1e-5)
        assert result.pruned == 0
    for arrays in session._adapters.trained().values():
        assert not arrays["lora_B"].any()


@pytest.mark.parametrize("strategy", ["random", "pissa", "olora"])
def test_the_adapter_after_merges_is_one_plain_lora(
    attached: Attached, stock_logits: Callable[..., Any], tmp_path: Path, strategy: str
) -> None:
    lora = {"init_strategy": strategy, "use_rslora": True}
    session, plan = attached(lora, relora_steps=3, relora_mode="merge", relora_rewarm_steps=1)
    events = train(session, plan)
    assert [event.pruned for event in restarts(events)] == [0, 0]
    assert all(event.loss_after == pytest.approx(event.loss_before, abs=1e-5) for event in restarts(events))
    tokens = plan.rows[0].sequences[0].tokens[None]
    live = session.logits(tokens)
    np.testing.assert_allclose(stock_logits(session, plan, tokens), live, atol=1e-4)
    pieces = 3 if strategy == "random" else 4
    assert {arrays["lora_A"].shape[0] for arrays in session.factors().values()} == {4 * pieces}
    session.save_merged(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        merged = model(torch.tensor(tokens, dtype=torch.int64)).logits.numpy()
    np.testing.assert_allclose(merged, live, atol=1e-5)


def test_each_piece_starts_with_other_random_numbers_and_a_rising_rate(attached: Attached) -> None:
    session, plan = attached(relora_steps=3, relora_mode="merge", relora_rewarm_steps=2, scheduler="constant")
    events = train(session, plan)
    rates = [event.learning_rate for event in events if isinstance(event, StepEvent)]
    assert rates == pytest.approx([5e-3, 5e-3, 5e-3, 2.5e-3, 5e-3, 5e-3, 2.5e-3, 5e-3])
    for name, pieces in session._adapters.pieces.items():
        starts = [piece.a for piece in pieces] + [session._adapters.trained()[name]["lora_A"]]
        for one, two in pairwise(starts):
            assert abs(np.corrcoef(one.ravel(), two.ravel())[0, 1]) < 0.5


@pytest.mark.parametrize("cut", [2, 3, 4, 7])
@pytest.mark.parametrize("mode", ["prune", "merge"])
@pytest.mark.parametrize("strategy", ["random", "pissa"])
def test_a_run_resumed_across_restarts_goes_on_to_the_same_bytes(
    attached: Attached, tmp_path: Path, strategy: str, mode: str, cut: int
) -> None:
    training = {"relora_steps": 3, "relora_mode": mode, "save_steps": 1}
    whole, plan = attached({"init_strategy": strategy}, **training)

    def save(step: int) -> None:
        if step == cut:
            whole.save_state(tmp_path)

    seen = losses(train(whole, plan, save))
    second, _ = attached({"init_strategy": strategy}, **training)
    second.load_state(tmp_path)
    assert losses(train(second, plan, done=cut)) == seen[cut:]
    for name, arrays in whole.factors().items():
        for factor, array in arrays.items():
            assert array.tobytes() == second.factors()[name][factor].tobytes()


def test_a_merge_into_a_tied_or_quantized_weight_is_refused_before_training(
    attached: Attached, tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="share one weight"):
        attached({"target_modules": ("lm_head", "q_proj")}, relora_steps=3, relora_mode="merge")
    with pytest.raises(ModelError, match="is quantized"):
        attached(relora_steps=3, relora_mode="merge", quantization="8bit")


WORKER = """
import sys, json, hashlib
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import conftest
opener = conftest.attached.__wrapped__(Path(sys.argv[1]))
attached = next(opener)
session, plan = attached({"init_strategy": sys.argv[2]}, relora_steps=3, relora_prune_ratio=0.5, max_steps=7)
from soup_xb.core.run.loop import Hooks, run_loop
events = []
run_loop(plan, session, Hooks(events.append, lambda step: None, lambda: 0), 0)
digest = hashlib.sha256(b"".join(a.tobytes() for arrays in session.factors().values() for a in arrays.values()))
losses = [event.loss for event in events if type(event).__name__ == "StepEvent"]
pruned = [event.pruned for event in events if hasattr(event, "pruned")]
result = Path(sys.argv[4]) / f"result-{session.process}.json"
result.write_text(json.dumps([digest.hexdigest(), losses, pruned]))
session.close()
"""


@pytest.mark.parametrize("strategy", ["random", "pissa"])
def test_two_processes_prune_the_same_entries(
    attached: Attached, tiny_llama: Path, tmp_path: Path, strategy: str
) -> None:
    (tmp_path / "worker.py").write_text(WORKER, "utf-8")
    done = in_two_processes(
        "torch", tmp_path / "worker.py", tiny_llama, strategy, Path(__file__).parent, tmp_path
    )
    assert done.codes == (0, 0), done.err[-3000:]
    results = [json.loads(file.read_text()) for file in sorted(tmp_path.glob("result-*.json"))]
    assert len(results) == 2
    assert results[0] == results[1]
    session, plan = attached({"init_strategy": strategy}, relora_steps=3, relora_prune_ratio=0.5, max_steps=7)
    events = train(session, plan)
    assert results[0][2] == [event.pruned for event in restarts(events)]
    # Up to the first prune the runs differ by rounding alone.
    assert results[0][1][:3] == pytest.approx(losses(events)[:3], abs=1e-5)
