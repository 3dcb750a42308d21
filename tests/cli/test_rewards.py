"""grpo and rlhf from the command line: rewards, runs, resumes, processes, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import in_two_processes
from safetensors.numpy import load_file

from soup_xb.core.config.support_rows import BACKENDS
from soup_xb.core.objectives.answer_pattern import compiled_pattern
from soup_xb.core.objectives.rewards import Answer, PatternReward
from soup_xb.core.rows.examples import Source
from soup_xb.core.rows.row import Prompt, Row, TokenSequence

Config = Callable[..., Path]
Soupx = Callable[..., Any]
COUNTS = ("tokens", "target_tokens")
FUNCTIONS = """
def vowels(completion, row):
    return sum(letter in "aeiou" for letter in completion) / 8


def short(completion, row):
    return -len(completion) / 8


def alike(completion, row):
    return 0.25


def divides(completion, row):
    return 1 / (len(row) - len(row))


def talks(completion, row):
    return "much"
"""


@pytest.fixture
def config(tmp_path: Path, tiny_llama: Path) -> Config:
    """`config(task, **training)`: a file over ten prompts, with functions to reward answers by beside it."""
    rows = [
        {"prompt": [{"role": "user", "content": f"{index}+{index % 3}?"}], "answer": index + index % 3}
        for index in range(10)
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "rewards.py").write_text(FUNCTIONS)

    def write(task: str = "grpo", function: str = "vowels", backend: str = "torch", **training: Any) -> Path:
        content = {
            "base": str(tiny_llama),
            "task": task,
            "backend": backend,
            "data": {"train": str(tmp_path / "prompts.jsonl"), "val_split": 0.2},
            "training": {
                "rewards": [f"{tmp_path / 'rewards.py'}:{function}", "exact-match"],
                "max_steps": 4, "lr": 5e-3, "group_size": 4, "max_new_tokens": 6, "lora": {"r": 4}, **training,
            },
            "output": str(tmp_path / "out"),
        }  # fmt: skip
        (tmp_path / "soup.yaml").write_text(json.dumps(content, indent=1))
        return tmp_path / "soup.yaml"

    return write


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_tells_what_its_answers_earn_and_resumes_to_the_same_bytes(
    soupx: Soupx, config: Config, tmp_path: Path, backend: str
) -> None:
    file, out = config(backend=backend, save_steps=2, eval_steps=2), tmp_path / "out"
    done = soupx("train", file)
    assert done.code == 0, done.err
    assert "reward 0." in done.err
    told = {
        "reward",
        "reward/vowels",
        "reward/exact-match",
        "completion_tokens",
        "cut_off",
        "equal_groups",
        "kl",
    }
    assert set(events(out, "step")[0]["means"]) == told
    whole, steps = (out / "adapter" / "adapter_model.safetensors").read_bytes(), events(out, "step")
    (out / "adapter").rename(tmp_path / "aside")
    (out / "checkpoints" / "step-00000004").rename(tmp_path / "later")
    resumed = soupx("train", file, "--resume")
    assert resumed.code == 0, resumed.err
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == whole
    assert [event["loss"] for event in events(out, "step")] == [event["loss"] for event in steps]

    (out / "adapter").rename(tmp_path / "aside-too")
    (out / "checkpoints" / "step-00000004").rename(tmp_path / "later-too")
    (tmp_path / "rewards.py").write_text(FUNCTIONS + "\n# another text")
    changed = soupx("train", file, "--resume")
    assert changed.code == 5
    assert "rewards.py" in changed.err


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_processes_train_what_one_trains(
    soupx: Soupx, config: Config, tmp_path: Path, backend: str
) -> None:
    file = config(backend=backend, eval_steps=4, batch_size=4)
    assert soupx("train", file, "--output", tmp_path / "one").code == 0
    done = in_two_processes(backend, "-m", "soup_xb", "train", file, "--output", tmp_path / "two")
    assert done.codes == (0, 0), done.err
    for kind in ("step", "eval"):
        for one, two in zip(events(tmp_path / "one", kind), events(tmp_path / "two", kind), strict=True):
            assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
            assert [two.get(key) for key in COUNTS] == [one.get(key) for key in COUNTS]
            assert two["means"] == pytest.approx(one["means"], abs=1e-5)
    one, two = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two")
    )
    for key, array in one.items():
        np.testing.assert_allclose(two[key], array, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_policy_learns_from_a_reward_model(
    soupx: Soupx, config: Config, tmp_path: Path, backend: str
) -> None:
    rows = [{"prompt": f"{index}?", "chosen": "aeiou" * 2, "rejected": "XQZ!" * 2} for index in range(16)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first = config("reward", backend=backend, rewards=[], max_steps=12, lr=1e-2)
    for key in ("rewards", "group_size", "max_new_tokens"):
        content = json.loads(first.read_text())
        content["training"].pop(key)
        first.write_text(json.dumps(content))
    judge = tmp_path / "judge"
    made = soupx("train", first, "--set", f"data.train={tmp_path / 'pairs.jsonl'}", "--output", judge)
    assert made.code == 0, made.err
    judged = {"rewards": [], "reward_model": str(judge), "max_steps": 8, "eval_steps": 8, "lr": 1e-2}
    file = config("rlhf", backend=backend, **judged)
    done = soupx("train", file)
    assert done.code == 0, done.err
    steps = events(tmp_path / "out", "step")
    assert steps[-1]["means"]["reward"] > steps[0]["means"]["reward"]
    assert "reward_model" not in steps[0]["means"]
    refused = soupx(
        "train", file, "--set", f"training.reward_model={tmp_path / 'out'}", "--output", tmp_path / "c"
    )
    assert refused.code == 4
    assert "error[no-reward-model]" in refused.err


def test_answers_that_all_earn_the_same_are_told_early_and_end_the_run_with_the_way_out(
    soupx: Soupx, config: Config, tmp_path: Path
) -> None:
    file = config(function="alike", save_steps=2)
    done = soupx("train", file)
    assert done.code == 4
    assert "warning[equal-rewards] step 2: 2 steps in a row, from step 1, in which no answer" in done.err
    assert f"error[equal-rewards] {file}:" in done.err
    assert "training.rewards: in none of 4 steps did any answer earn more" in done.err
    assert "0.25 on average" in done.err
    assert all(f"`training.{key}`" in done.err for key in ("answer_pattern", "temperature", "max_new_tokens"))
    assert "adapter-inert" not in done.err
    assert not (tmp_path / "out" / "adapter").exists()


@pytest.mark.parametrize(
    ("function", "code", "line", "words"),
    [
        ("divides", "reward-failed", ":15", "ZeroDivisionError: division by zero"),
        ("talks", "reward-not-a-number", "", "returns much"),
        ("vowel", "reward-file", "", "did you mean `vowels`?"),
    ],
)
def test_a_function_that_fails_is_named_with_its_line(
    soupx: Soupx, config: Config, tmp_path: Path, function: str, code: str, line: str, words: str
) -> None:
    done = soupx("train", config(function=function))
    assert done.code == 2
    assert f"error[{code}] {tmp_path / 'rewards.py'}{line}" in done.err
    assert words in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("text", "words"), [("def vowels(:\n", "rewards.py:1"), ("\nimport nothing_like_this\n", "rewards.py:2")]
)
def test_a_file_of_rewards_that_does_not_run_stops_before_the_base_is_opened(
    soupx: Soupx, config: Config, tmp_path: Path, text: str, words: str
) -> None:
    file = config()
    (tmp_path / "rewards.py").write_text(text)
    done = soupx("train", file, "--set", "base=./no-such-base")
    assert done.code == 2
    assert "error[reward-failed]" in done.err
    assert words in done.err
    assert not list(tmp_path.glob("__pycache__"))


def test_nothing_of_a_persons_file_runs_in_a_check(soupx: Soupx, config: Config, tmp_path: Path) -> None:
    file = config()
    (tmp_path / "rewards.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for command in ("check", "plan"):
        soupx(command, file)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"rewards": ["exact-mach"]}, "unknown-reward", "did you mean `exact-match`?"),
        ({"rewards": []}, "missing-key", "no reward is named"),
        ({"rewards": ["format", "format"]}, "contradiction", "twice"),
        ({"answer_pattern": "(a"}, "bad-pattern", "no"),
        ({"group_size": 1}, "out-of-range", "2 to 1024"),
        ({"reward_model": "./judge"}, "key-without-effect", "rlhf"),
        ({"temperature": 0}, "out-of-range", "above 0"),
    ],
)
def test_keys_that_make_no_sense_are_refused(
    soupx: Soupx, config: Config, change: dict[str, Any], code: str, words: str
) -> None:
    done = soupx("check", config(**change))
    assert done.code == 2
    assert f"error[{code}]" in done.err
    assert words in done.err


def test_rows_that_cannot_be_judged_or_answered_are_refused(
    soupx: Soupx, config: Config, tmp_path: Path
) -> None:
    file, data = config(), tmp_path / "prompts.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"{index}?"}) for index in range(8)))
    missing = soupx("train", file)
    assert missing.code == 3
    assert f"error[missing-answer] {data}:" in missing.err
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    data.write_text(json.dumps({"prompt": turns, "answer": 4}))
    answered = soupx("train", file, "--overwrite")
    assert answered.code == 3
    assert "error[answered-prompt]" in answered.err
    data.write_text(json.dumps({"prompt": [], "answer": 4}))
    empty = soupx("train", file, "--overwrite")
    assert empty.code == 3
    assert f"error[empty-prompt] {data}:1: prompt: there is no turn" in empty.err


@pytest.mark.parametrize(
    ("name", "text", "answer", "earned"),
    [
        ("format", "So: <answer>4</answer>", 4, 1.0),
        ("format", "<answer>4</answer><answer>5</answer>", 4, 0.0),
        ("format", "4", 4, 0.0),
        ("exact-match", "<answer>3</answer> no, <answer> 4.0\n</answer>", 4, 1.0),
        ("exact-match", "<answer>New  york</answer>", "New York", 1.0),
        ("exact-match", "<answer>1,250</answer>", "1250", 1.0),
        ("exact-match", "4", 4, 0.0),
        ("exact-match", "<answer>44</answer>", 4, 0.0),
    ],
)
def test_built_in_rewards_pay_for_the_form_and_for_the_answer(
    name: str, text: str, answer: Any, earned: float
) -> None:
    reward = PatternReward(name, compiled_pattern("<answer>(.*?)</answer>", "here"), "here")
    prompt = TokenSequence([5], [False], Source("rows.jsonl", 1))
    row = Row("prompt", (prompt,), Prompt({"answer": answer}))
    reward.check([row])
    assert reward.earned([Answer(row, text)]) == [earned]
