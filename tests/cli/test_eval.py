"""`soupx eval`: every task by the measures of its own evaluations."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from soup_xb.core.config.support_rows import BACKENDS
from soup_xb.core.tasks import TASKS

Config = Callable[..., Path]
Soupx = Callable[..., Any]
JUDGING = [name for name, task in TASKS.items() if task.kind in ("pair", "judged")]
REWARDS = """
def vowels(completion, row):
    return sum(letter in "aeiou" for letter in completion) / 8
"""


@pytest.fixture
def config(tmp_path: Path, tiny_llama: Path) -> Config:
    """`config(task, backend, **training)`: four steps with an evaluation at the end, on rows of their own."""
    made = [
        {
            "prompt": [{"role": "user", "content": f"{index}+{index % 3}?"}],
            "chosen": [{"role": "assistant", "content": f"{index + index % 3}!" + "!" * (index % 4)}],
            "rejected": [{"role": "assistant", "content": f"Well, it may be {index + index % 3}."}],
        }
        for index in range(18)
    ]
    prompts = [{"prompt": row["prompt"], "answer": "4"} for row in made]
    for name, rows in (("pairs", made), ("prompts", prompts)):
        for part, share in (("train", rows[:12]), ("held-out", rows[12:])):
            (tmp_path / f"{name}-{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in share))
    (tmp_path / "rewards.py").write_text(REWARDS)

    def write(task: str, backend: str = "torch", **training: Any) -> Path:
        sampled = {"rewards": ["exact-match", f"{tmp_path / 'rewards.py'}:vowels"], "group_size": 3}
        settings = {**sampled, "max_new_tokens": 6} if TASKS[task].samples else {}
        stem = tmp_path / ("prompts" if TASKS[task].samples else "pairs")
        content = {
            "base": str(tiny_llama),
            "task": task,
            "backend": backend,
            "data": {"train": f"{stem}-train.jsonl", "eval": f"{stem}-held-out.jsonl", "max_length": 128},
            "training": {
                "max_steps": 4, "lr": 5e-3, "batch_size": 4, "lora": {"r": 4}, **settings, **training,
            },
            "output": str(tmp_path / "out"),
        }  # fmt: skip
        (tmp_path / "soup.yaml").write_text(json.dumps(content, indent=1))
        return tmp_path / "soup.yaml"

    return write


def last_evaluation(folder: Path) -> dict[str, Any]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    event = [event for event in map(json.loads, lines) if event["event"] == "eval"][-1]
    return {"loss": event["loss"], **event["means"]}


def figures(soupx: Soupx, *words: object) -> dict[str, Any]:
    done = soupx("eval", *words, "--json")
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found


def assert_evaluated(found: dict[str, Any], expected: dict[str, float], count: str, examples: int) -> None:
    assert found.pop(count) == examples
    assert found == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("task", JUDGING)
def test_a_file_gives_what_the_run_s_own_evaluation_gave(
    soupx: Soupx, config: Config, tmp_path: Path, task: str, backend: str
) -> None:
    done = soupx("train", config(task, backend))
    assert done.code == 0, done.err
    out, expected = tmp_path / "out", last_evaluation(tmp_path / "out")
    examples = 12 if TASKS[task].kind == "judged" else 6
    for engine in BACKENDS:
        found = figures(
            soupx, out, "--data", tmp_path / "pairs-held-out.jsonl", "--backend", engine, "--batch-size", 3
        )
        if task == "bco":
            # The running mean of its rewards is no part of an adapter: what is judged by it begins at 0.
            for name in ("loss", "reward_accuracy"):
                found["adapter"].pop(name), expected.pop(name, None)
        assert_evaluated(found.pop("adapter"), expected, "rows", examples)
        if TASKS[task].scores:
            assert not found
        elif TASKS[task].needs_reference:
            assert found["base"]["reward_margin"] == pytest.approx(0, abs=1e-5)
            assert found["base"]["reward_accuracy"] == (0.0 if task != "bco" else pytest.approx(0, abs=0.5))
        else:
            assert found["base"]["loss"] > expected["loss"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_prompts_are_answered_and_judged_by_the_rewards_that_are_named(
    soupx: Soupx, config: Config, tmp_path: Path, backend: str
) -> None:
    assert soupx("train", config("grpo", backend)).code == 0
    out, rows = tmp_path / "out", ("--data", tmp_path / "prompts-held-out.jsonl", "--backend", backend)
    refused = soupx("eval", out, *rows)
    assert refused.code == 2
    assert "error[reward-not-named]" in refused.err
    code = f"{tmp_path / 'rewards.py'}:vowels"
    assert f"--reward exact-match --reward {code}" in refused.err
    found = figures(soupx, out, *rows, "--reward", "exact-match", "--reward", code)
    base = found.pop("base")
    assert_evaluated(found["adapter"], last_evaluation(out), "answers", 18)
    assert base["kl"] == pytest.approx(0, abs=1e-6)
    assert base["reward"] != found["adapter"]["reward"]
    # Without code in its record nothing needs to be named, and other rewards may be.
    other = figures(soupx, out, *rows, "--reward", "format")
    assert "reward/vowels" not in other["adapter"]


def test_the_answers_of_an_rlhf_run_are_scored_by_its_reward_model(
    soupx: Soupx, config: Config, tmp_path: Path
) -> None:
    judge = tmp_path / "judge"
    assert soupx("train", config("reward"), "--output", judge).code == 0
    assert soupx("train", config("rlhf", rewards=[], reward_model=str(judge))).code == 0
    out, rows = tmp_path / "out", tmp_path / "prompts-held-out.jsonl"
    found = figures(soupx, out, "--data", rows)
    assert_evaluated(found["adapter"], last_evaluation(out), "answers", 18)


def test_an_adapter_without_its_run_is_evaluated_by_what_its_files_tell(
    soupx: Soupx, config: Config, tmp_path: Path
) -> None:
    pairs, alone = tmp_path / "pairs-held-out.jsonl", tmp_path / "alone"
    assert soupx("train", config("reward")).code == 0
    shutil.copytree(tmp_path / "out" / "adapter", alone)
    assert figures(soupx, alone, "--data", pairs).keys() == {"adapter"}
    assert soupx("train", config("dpo"), "--overwrite").code == 0
    shutil.rmtree(alone)
    shutil.copytree(tmp_path / "out" / "adapter", alone)
    assert "reward_margin" in figures(soupx, tmp_path / "out" / "adapter", "--data", pairs)["adapter"]
    refused = soupx("eval", alone, "--data", pairs)
    assert (refused.code, "error[preference-rows]" in refused.err) == (3, True)


def test_rows_of_words_give_a_loss_whatever_the_run_learned_from(
    soupx: Soupx, config: Config, tmp_path: Path, chat_file: Path
) -> None:
    assert soupx("train", config("dpo")).code == 0
    out = tmp_path / "out"
    assert "perplexity" in figures(soupx, out, "--data", chat_file)["adapter"]
    refused = soupx("eval", out, "--data", chat_file, "--reward", "format")
    assert (refused.code, "error[reward-without-answers]" in refused.err) == (2, True)
    # Rows that would be both are what the task reads, unless the command says otherwise.
    both = tmp_path / "both.jsonl"
    row = {"prompt": "2+2?", "completion": "4", "chosen": "4", "rejected": "5"}
    both.write_text(json.dumps(row) + "\n")
    assert "reward_margin" in figures(soupx, out, "--data", both)["adapter"]
    words = ("--data", both, "--format", "prompt-completion")
    assert "perplexity" in figures(soupx, out, *words)["adapter"]
