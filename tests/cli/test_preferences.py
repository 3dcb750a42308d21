"""Preference tasks from the command line: data, runs, reports, resumes and processes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import in_two_processes
from safetensors.numpy import load_file

Config = Callable[..., Path]
Soupx = Callable[..., Any]


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    """Twenty-four pairs, and one more whose answers are equal."""

    def turn(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    rows = [
        {
            "prompt": [turn("user", f"What is {index} and {index % 7}?")],
            "chosen": [turn("assistant", f"{index + index % 7}!" + "!" * (index % 4))],
            "rejected": [turn("assistant", f"Well, it may be {index + index % 7}.")],
        }
        for index in range(24)
    ]
    rows.append({**rows[3], "rejected": rows[3]["chosen"]})
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


@pytest.fixture
def config(tmp_path: Path, tiny_llama: Path, pairs_file: Path) -> Config:
    def write(task: str, **training: Any) -> Path:
        content = {
            "base": str(tiny_llama),
            "task": task,
            "backend": "torch",
            "data": {"train": str(pairs_file), "val_split": 0.2, "max_length": 128},
            "training": {"max_steps": 6, "lr": 5e-3, "batch_size": 4, "lora": {"r": 4}, **training},
            "output": str(tmp_path / "out"),
        }
        file = tmp_path / "soup.yaml"
        file.write_text(json.dumps(content, indent=1))
        return file

    return write


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def test_a_run_tells_how_often_the_better_answer_wins(soupx: Soupx, config: Config, tmp_path: Path) -> None:
    done = soupx("train", config("dpo", eval_steps=3, save_steps=3))
    assert done.code == 0, done.err
    assert "warning[equal-answers]" in done.err
    assert "1 row left out, whose `chosen` and `rejected` are the same tokens" in done.err
    steps, evals = events(tmp_path / "out", "step"), events(tmp_path / "out", "eval")
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert set(steps[0]["means"]) == {"reward_accuracy", "reward_margin", "reward_chosen", "reward_rejected"}
    assert evals[-1]["means"]["reward_accuracy"] == 1.0
    assert evals[-1]["perplexity"] is None
    assert "eval step 6  loss" in done.err
    assert "accuracy 100%  margin " in done.err
    page = (tmp_path / "out" / "report.html").read_text()
    assert "reward accuracy" in page
    assert "Evaluation accuracy" in page


def test_a_resumed_run_reads_the_reference_and_ends_with_the_same_bytes(
    soupx: Soupx, config: Config, tmp_path: Path
) -> None:
    file = config("dpo", save_steps=2, eval_steps=2)
    assert soupx("train", file).code == 0
    out = tmp_path / "out"
    whole = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    (out / "adapter").rename(tmp_path / "aside")
    (out / "checkpoints" / "step-00000006").rename(tmp_path / "later")
    resumed = soupx("train", file, "--resume")
    assert resumed.code == 0, resumed.err
    assert "log-probabilities" not in resumed.err
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == whole
    assert [event["step"] for event in events(out, "step")] == [1, 2, 3, 4, 5, 6]

    (out / "adapter").rename(tmp_path / "aside-too")
    (out / "checkpoints" / "step-00000006").rename(tmp_path / "later-too")
    (out / "reference.safetensors").write_bytes(b"torn")
    again = soupx("train", file, "--resume")
    assert "the base's log-probabilities of 48 answers" in again.err
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == whole


@pytest.mark.parametrize(
    ("backend", "task"),
    [
        *(("torch", task) for task in ("dpo", "kto", "bco", "orpo", "cpo")),
        *(("mlx", task) for task in ("dpo", "kto")),
        *(pytest.param("mlx", task, marks=pytest.mark.slow) for task in ("bco", "orpo", "cpo")),
    ],
)
def test_two_processes_train_what_one_trains(
    soupx: Soupx, config: Config, tmp_path: Path, backend: str, task: str
) -> None:
    file = config(task, eval_steps=3)
    words = ("train", file, "--backend", backend, "--output")
    assert soupx(*words, tmp_path / "one").code == 0
    done = in_two_processes(backend, "-m", "soup_xb", *words, tmp_path / "two")
    assert done.codes == (0, 0), done.err[-3000:]
    for kind in ("step", "eval"):
        for one, two in zip(events(tmp_path / "one", kind), events(tmp_path / "two", kind), strict=True):
            assert two["loss"] == pytest.approx(one["loss"], abs=2e-4)
            assert two["means"].keys() == one["means"].keys()
    one, two = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two")
    )
    for key, array in one.items():
        np.testing.assert_allclose(two[key], array, atol=1e-3)


def test_the_adapter_loads_in_stock_peft_with_the_live_logits(
    soupx: Soupx, config: Config, tmp_path: Path, tiny_llama: Path
) -> None:
    """What the run proved of its own adapter, asked of stock PEFT: the better answers have gained on the base."""
    import torch
    import transformers
    from peft import PeftModel

    assert soupx("train", config("ipo", lora={"r": 4, "init_strategy": "pissa"})).code == 0
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    tokens = torch.arange(40, 60)[None]
    with torch.no_grad():
        before = base(tokens).logits
        tuned = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")(tokens).logits
    assert float((tuned - before).abs().max()) > 1e-3


def test_data_shows_both_sides(soupx: Soupx, pairs_file: Path, tiny_llama: Path) -> None:
    done = soupx("data", pairs_file, "--base", tiny_llama)
    assert done.code == 0, done.err
    assert "format            preference" in done.out
    assert "chosen: " in done.out
    assert "rejected: " in done.out
    assert "‹Well, it may be 0.<|im_end|>›" in done.out
    summary = json.loads(soupx("data", pairs_file, "--base", tiny_llama, "--json").out)
    assert (summary["trained_rows"], summary["nothing_to_learn"]) == (24, 1)
    assert [side["name"] for side in summary["example"]["others"]] == ["rejected"]
    assert "equal-answers" in [notice["code"] for notice in summary["notices"]]


def test_an_answer_that_is_cut_away_leaves_its_pair_out(soupx: Soupx, config: Config) -> None:
    file = config("orpo", max_steps=1)
    cut = soupx("train", file, "--set", "data.max_length=50")
    assert cut.code == 0, cut.err
    assert "cut at 50 tokens" in cut.err
    nothing = soupx("train", file, "--set", "data.max_length=20", "--overwrite")
    assert nothing.code == 3
    assert "everything to learn lies beyond max_length" in nothing.err


def test_verdicts_are_for_kto_and_bco(soupx: Soupx, config: Config, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{index}+1=", "completion": str(index + right), "label": right == 1}
        for index in range(12)
        for right in (1, 5)
    ]
    judged = tmp_path / "judged.jsonl"
    judged.write_text("\n".join(map(json.dumps, rows)))
    for task in ("kto", "bco"):
        done = soupx("train", config(task), "--set", f"data.train={judged}", "--output", tmp_path / task)
        assert done.code == 0, done.err
    refused = soupx("train", config("dpo"), "--set", f"data.train={judged}", "--output", tmp_path / "dpo")
    assert refused.code == 3
    assert "error[unpaired-rows]" in refused.err
    assert "task: kto" in refused.err
