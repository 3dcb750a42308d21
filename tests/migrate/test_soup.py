"""Soup's files: the names are ours, the defaults are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from soup_xb.core.errors import ConfigError
from soup_xb.migrate import Migration, migrate

Accounted = Callable[..., Migration]
Values = Callable[[Migration], dict[str, Any]]

CHAT = """\
base: meta-llama/Llama-3.2-3B-Instruct
task: sft
modality: text
backend: unsloth
data:
  train: ./data/train.jsonl
  format: chatml
  val_split: 0.1
  max_length: 2048
  chat_template: llama3
  train_on_responses_only: true
training:
  epochs: 3
  lr: 2e-5
  batch_size: auto
  gradient_accumulation_steps: 4
  warmup_ratio: 0.03
  lora:
    r: 64
    alpha: 16
    dropout: 0.05
    target_modules: auto
  quantization: 4bit
  optimizer: adamw_torch
  scheduler: cosine
  use_liger: true
  neftune_alpha: 5
output: ./output
experiment_name: first
"""

RELORA = """\
base: Qwen/Qwen3-1.7B
data:
  train: rows.jsonl
training:
  batch_size: 8
  relora_steps: 500
  relora_warmup_ratio: 0.2
  relora_prune_ratio: 0.8
  relora_reset_optimizer: false
  load_in_16bit: true
  gradient_checkpointing: selective
  lora:
    init_strategy: pissa
    rank_pattern: {q_proj: 8, v_proj: 16}
    alpha_pattern:
      q_proj: 16
"""

SMALL = "base: tiny\ndata:\n  train: rows.jsonl\ntraining:\n  epochs: 1\n"


def test_a_chat_file_keeps_its_numbers(accounted: Accounted, values: Values) -> None:
    done = accounted(CHAT)
    assert done.tool == "soup"
    found = values(done)
    assert (found["backend"], found["data.format"], found["data.val_split"]) == ("torch", "messages", 0.1)
    assert (found["training.lr"], found["training.gradient_accumulation_steps"]) == (2e-5, 4)
    assert (found["training.lora.r"], found["training.lora.alpha"]) == (64, 16)
    assert (found["training.quantization"], found["training.save_steps"]) == ("4bit", 100)
    assert "training.batch_size" not in found
    reasons = {left.key: left.reason for left in done.left}
    assert "soupx plan" in reasons["training.batch_size"]
    assert "not a name" in reasons["data.chat_template"]
    assert "metrics.jsonl" in reasons["experiment_name"]
    assert all("does not know" not in reason for reason in reasons.values())
    notes = {carried.key: carried.note for carried in done.carried}
    assert "every linear layer" in notes["training.lora.target_modules"]


def test_relora_and_patterns_mean_the_same(accounted: Accounted, values: Values) -> None:
    done = accounted(RELORA)
    found = values(done)
    assert (found["training.relora_steps"], found["training.relora_prune_ratio"]) == (500, 0.8)
    assert found["training.relora_reset_optimizer"] is False
    assert dict(found["training.lora.rank_pattern"]) == {"q_proj": 8, "v_proj": 16}
    assert (found["training.quantization"], found["training.gradient_checkpointing"]) == ("none", True)


def test_what_soup_does_by_default_is_written_out(accounted: Accounted, values: Values) -> None:
    done = accounted(SMALL)
    found = values(done)
    assert {added.key: added.value for added in done.added} == {
        "data.val_split": 0.1,
        "training.lora.target_modules": "auto",
        "training.lora.r": 64,
        "training.lora.alpha": 16,
        "training.lora.dropout": 0.05,
        "training.lr": 2e-5,
        "training.gradient_accumulation_steps": 4,
        "training.quantization": "4bit",
        "training.save_steps": 100,
        "training.warmup_ratio": 0.03,
    }
    assert found["training.lr"] == 2e-5


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("  quantization: gptq", "training.quantization", "4bit"),
        ("  load_in_8bit: true", "training.quantization", "8bit"),
        ("  optimizer: muon", "training.optimizer", None),
        ("  scheduler: polynomial", "training.scheduler", None),
        ("  packing: true", "data.packing", True),
        ("  relora_prune_ratio: 0.5", "training.relora_prune_ratio", None),
        ("  lora: {init_strategy: loftq}", "training.lora.init_strategy", None),
        ("  lora: {use_olora: true}", "training.lora.init_strategy", "olora"),
        ("lora: {r: 4}", "training.lora.r", 4),
        ("backend: mlx", "backend", "mlx"),
        ("backend: jax", "backend", None),
    ],
)
def test_one_key_at_a_time(accounted: Accounted, values: Values, line: str, key: str, value: Any) -> None:
    assert values(accounted(f"{SMALL}{line}\n", ok="olora" not in line)).get(key) == value


@pytest.mark.parametrize(
    ("lines", "task"),
    [("task: reward_model\n", "reward"), ("task: preference\n", "dpo"), ("task: grpo\n", "grpo")],
)
def test_a_task_is_carried_by_our_name_for_it(accounted: Accounted, lines: str, task: str) -> None:
    assert f"task: {task}\n" in accounted(SMALL + lines, ok=False).text


def test_a_task_that_is_none_of_ours_ends_the_migration() -> None:
    with pytest.raises(ConfigError) as refused:
        migrate(SMALL + "task: tts\n", "soup.yaml", "soup")
    assert refused.value.problems[0].code == "migrate-task"
