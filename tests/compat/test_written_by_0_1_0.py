"""What 0.1.0 left, a stopped run and a finished one of each kind, is gone on with and opened (see write_0_1_0.py)."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from soup_xb.core.adapter.peft_file import read_adapter

Soupx = Callable[..., Any]
WRITTEN = Path(__file__).parent.parent / "data" / "v0_1_0"
EXPECTED: dict[str, dict[str, Any]] = json.loads((WRITTEN / "expected.json").read_text("utf-8"))
# The step of each stopped run's checkpoint.
SAVED = 4
# Of losses. Cosines are multiplied by 20 before the softmax, so that float32's rounding weighs more; MLX's sum of a
# step was one of float32, whose last place is 5e-7 for a loss of 5.5.
TOLERANCE = {"embedding": 3e-6, "mlx-pissa": 2e-6}


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`written(kind)` makes a copy of what 0.1.0 left of that kind the current folder."""
    monkeypatch.chdir(tmp_path)

    def bring(kind: str) -> None:
        others = [other for other in EXPECTED if other != kind]
        shutil.copytree(WRITTEN, tmp_path, ignore=shutil.ignore_patterns(*others), dirs_exist_ok=True)

    return bring


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def losses(folder: Path, kind: str = "step") -> list[float]:
    return [event["loss"] for event in events(folder, kind)]


@pytest.mark.parametrize("kind", EXPECTED)
def test_a_stopped_run_goes_on_to_the_losses_of_the_whole_one(
    soupx: Soupx, written: Callable[[str], None], kind: str
) -> None:
    written(kind)
    folder, expected = Path("stopped", kind), EXPECTED[kind]
    within = TOLERANCE.get(kind, 1e-6)
    done = soupx("train", f"{kind}.yaml", "--resume")
    assert done.code == 0, done.err
    assert f"going on after step {SAVED}" in done.err
    assert [event["step"] for event in events(folder, "step")] == [1, 2, 3, 4, 5, 6]
    assert losses(folder)[:SAVED] == expected["losses"][:SAVED]
    assert losses(folder)[SAVED:] == pytest.approx(expected["losses"][SAVED:], abs=within)
    assert losses(folder, "eval") == pytest.approx(expected["eval_losses"], abs=within)
    # 0.1.0 left ranks as they were trained; today they are padded to one, and read back without the padding.
    whole, ours = read_adapter(Path("finished", kind, "adapter")), read_adapter(folder / "adapter")
    assert ours.factors.keys() == whole.factors.keys()
    for name, arrays in whole.factors.items():
        for factor, array in arrays.items():
            np.testing.assert_allclose(ours.factors[name][factor], array, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", [kind for kind, expected in EXPECTED.items() if "figures" in expected])
def test_a_saved_adapter_answers_as_it_did(soupx: Soupx, written: Callable[[str], None], kind: str) -> None:
    written(kind)
    rows = "texts" if kind == "embedding" else "chat"
    backend = "mlx" if kind.startswith("mlx-") else "torch"
    done = soupx("eval", f"finished/{kind}", "--data", f"rows/{rows}.jsonl", "--backend", backend, "--json")
    assert done.code == 0, done.err
    figures = json.loads(done.out)
    assert figures.keys() == EXPECTED[kind]["figures"].keys()
    for name, expected in EXPECTED[kind]["figures"].items():
        assert figures[name] == pytest.approx(expected, rel=1e-5)


def test_a_reward_model_judges_as_it_did(soupx: Soupx, written: Callable[[str], None]) -> None:
    written("reward")
    done = soupx("train", "rlhf.yaml")
    assert done.code == 0, done.err
    expected = EXPECTED["reward"]["judged"]
    for event, means in zip(events(Path("judged"), "step"), expected, strict=True):
        assert event["means"] == pytest.approx(means, abs=1e-5)


def test_a_finished_run_has_nothing_left_to_train(soupx: Soupx, written: Callable[[str], None]) -> None:
    written("sft")
    done = soupx("train", "sft.yaml", "--output", "finished/sft", "--resume")
    assert done.code == 0, done.err
    assert "already complete at step 6" in done.out


def test_the_runs_are_listed_with_how_they_ended(soupx: Soupx, written: Callable[[str], None]) -> None:
    written("sft")
    done = soupx("runs", ".", "--json")
    assert done.code == 0, done.err
    statuses = {run["path"]: run["status"] for run in json.loads(done.out)}
    # Its process was killed, which nobody could write down.
    assert statuses == {"finished/sft": "finished", "stopped/sft": "died"}


@pytest.mark.parametrize("kind", EXPECTED)
def test_the_weights_are_the_bytes_that_were_written(kind: str) -> None:
    weights = (WRITTEN / "finished" / kind / "adapter" / "adapter_model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == EXPECTED[kind]["adapter_sha256"]
