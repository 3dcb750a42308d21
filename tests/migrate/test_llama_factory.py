"""LLaMA-Factory's files: examples in its documented form, and what its keys mean here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from soup_xb.core.errors import ConfigError
from soup_xb.migrate import Migration, migrate

Accounted = Callable[..., Migration]
Values = Callable[[Migration], dict[str, Any]]

SFT = """\
### model
model_name_or_path: Qwen/Qwen3-4B-Instruct-2507
trust_remote_code: true

### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 16
lora_target: all

### dataset
dataset: identity,support_tickets
template: qwen3_nothink
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
dataloader_num_workers: 4

### output
output_dir: saves/qwen3-4b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null

### eval
val_size: 0.1
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 500
"""

PISSA = """\
model_name_or_path: meta-llama/Llama-3.2-3B-Instruct
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_alpha: 32
lora_target: q_proj, v_proj
pissa_init: true
pissa_iter: 16
pissa_convert: true
use_rslora: true
dataset_dir: ./corpora/
dataset: notes
eval_dataset: held_out
template: llama3
packing: true
output_dir: saves/pissa
max_steps: 300
num_train_epochs: 5
warmup_steps: 20
optim: adamw_8bit
fp16: true
disable_gradient_checkpointing: true
"""

DPO = """\
model_name_or_path: Qwen/Qwen3-1.7B
quantization_bit: 4
quantization_method: bnb
double_quantization: false
stage: dpo
finetuning_type: lora
pref_beta: 0.1
pref_loss: orpo
dataset_dir: ONLINE
dataset: org/preferences
template: qwen3
output_dir: saves/dpo
"""


def test_an_sft_file_keeps_its_numbers(accounted: Accounted, values: Values) -> None:
    done = accounted(SFT)
    assert done.tool == "llama-factory"
    found = {
        key: value for key, value in values(done).items() if key not in ("data", "training", "training.lora")
    }
    assert found == {
        "base": "Qwen/Qwen3-4B-Instruct-2507",
        "task": "sft",
        "data.train": ("./data/identity.json", "./data/support_tickets.json"),
        "data.val_split": 0.1,
        "data.max_length": 2048,
        "training.epochs": 3,
        "training.lr": 1e-4,
        "training.batch_size": 1,
        "training.gradient_accumulation_steps": 8,
        "training.scheduler": "cosine",
        "training.warmup_ratio": 0.1,
        "training.weight_decay": 0.0,
        "training.precision": "bf16",
        "training.gradient_checkpointing": True,
        "training.eval_steps": 500,
        "training.save_steps": 500,
        "training.logging_steps": 10,
        "training.lora.r": 16,
        "training.lora.alpha": 32,
        "training.lora.target_modules": "auto",
        "output": "saves/qwen3-4b/lora/sft",
    }


def test_what_means_something_else_here_is_told(accounted: Accounted) -> None:
    done = accounted(SFT)
    notes = {carried.key: carried.note for carried in done.carried}
    reasons = {left.key: left.reason for left in done.left}
    assert "dataset_info.json" in notes["dataset"]
    assert "all processes" in notes["per_device_train_batch_size"]
    assert "own chat template" in reasons["template"]
    assert "never run" in reasons["trust_remote_code"]
    assert "--overwrite" in reasons["overwrite_output_dir"]
    assert all("does not know" not in reason for reason in reasons.values())


def test_a_pissa_start_and_a_folder_of_datasets(accounted: Accounted, values: Values) -> None:
    done = accounted(PISSA)
    found = values(done)
    assert found["data.train"] == ("./corpora/notes.json",)
    assert found["data.eval"] == ("./corpora/held_out.json",)
    assert found["training.lora.init_strategy"] == "pissa"
    assert found["training.lora.target_modules"] == ("q_proj", "v_proj")
    assert (found["training.max_steps"], "training.epochs" in found) == (300, False)
    assert (found["training.scheduler"], found["training.lr"]) == ("linear", 5e-5)
    assert (found["training.batch_size"], found["training.gradient_checkpointing"]) == (8, False)
    reasons = {left.key: left.reason for left in done.left}
    assert {"pissa_iter", "fp16", "num_train_epochs"} <= reasons.keys()
    assert "gradients overflow" in reasons["fp16"]
    notes = {carried.key: carried.note for carried in done.carried}
    assert "plain LoRA" in notes["pissa_convert"]
    assert "full precision" in notes["optim"]


def test_the_weight_of_the_load_balancing_loss_is_carried_over(accounted: Accounted) -> None:
    assert "router_aux_loss_coef: 0.001" in accounted(DPO + "moe_aux_loss_coef: 0.001\n", ok=False).text


def test_a_preference_stage_takes_the_task_of_its_loss(accounted: Accounted) -> None:
    done = accounted(DPO, ok=False)
    assert "task: orpo" in done.text
    assert "train: org/preferences" in done.text
    assert 'quantization: "4bit"' in done.text
    assert {carried.to for carried in done.carried if carried.key == "pref_beta"} == {"training.beta"}


def test_ppo_is_left_with_the_reason_and_the_task_that_does_its_work(accounted: Accounted) -> None:
    done = accounted(LEAST.replace("stage: sft", "stage: ppo"), ok=False)
    [left] = [left for left in done.left if left.key == "stage"]
    assert "no critic" in left.reason
    assert "task: rlhf" in done.text
    assert "training.reward_model" in done.problems[0].where


LEAST = "model_name_or_path: tiny\nstage: sft\ndataset: a\noutput_dir: out\n"


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("stage: pt", "task", "pretrain"),
        ("stage: rm", "task", "reward"),
        ("quantization_bit: 8", "training.quantization", "8bit"),
        ("quantization_bit: 2", "training.quantization", None),
        ("quantization_method: hqq\nquantization_bit: 4", "training.quantization", None),
        ("adapter_name_or_path: saves/one", "adapter", "saves/one"),
        ("adapter_name_or_path: one,two", "adapter", None),
        ("lora_rank: 4", "training.lora.alpha", 8),
        ("lora_target: [1, 2]", "training.lora.target_modules", None),
        ("dataset: rows.jsonl", "data.train", ("rows.jsonl",)),
        ("dataset: [a, b]", "data.train", ("./data/a.json", "./data/b.json")),
        ("val_size: 100", "data.val_split", None),
        ("train_on_prompt: true", "data.train_on", "all"),
        ("mask_history: true", "data.train_on", "last"),
        ("stage: pt\ntrain_on_prompt: true", "data.train_on", None),
        ("warmup_steps: 0\nwarmup_ratio: 0.2", "training.warmup_ratio", 0.2),
        ("pure_bf16: true", "training.precision", "bf16"),
        ("lr_scheduler_type: polynomial", "training.scheduler", None),
        ("lr_scheduler_type: null", "training.scheduler", "linear"),
        ("logging_steps: 0.1", "training.logging_steps", None),
    ],
)
def test_one_key_at_a_time(accounted: Accounted, values: Values, line: str, key: str, value: Any) -> None:
    name = line.partition(":")[0]
    text = "".join(kept for kept in LEAST.splitlines(True) if not kept.startswith(f"{name}:"))
    done = accounted(f"{text}{line}\n", ok=key != "task")
    assert values(done).get(key) == value


@pytest.mark.parametrize("line", ["enable_thinking: true", "finetuning_type: full"])
def test_what_cannot_be_done_is_told_and_its_opposite_is_not(accounted: Accounted, line: str) -> None:
    key = line.partition(":")[0]
    assert key in [left.key for left in accounted(f"{LEAST}{line}\n").left]
    opposite = f"{key}: {'lora' if key == 'finetuning_type' else 'false'}\n"
    assert key in [carried.key for carried in accounted(LEAST + opposite).carried]


def test_an_unknown_stage_ends_the_migration() -> None:
    with pytest.raises(ConfigError) as refused:
        migrate(LEAST.replace("sft", "telepathy"), "theirs.yaml")
    assert refused.value.problems[0].code == "migrate-task"


def test_a_list_that_holds_no_names_is_left(accounted: Accounted) -> None:
    done = accounted(LEAST.replace("dataset: a", "dataset: [1, 2]"), ok=False)
    assert "dataset" in [left.key for left in done.left]
