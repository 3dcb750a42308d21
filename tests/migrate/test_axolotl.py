"""axolotl's files: examples in its documented form, and what its keys mean here."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from soup_xb.core.config.load import parse_config
from soup_xb.core.errors import ConfigError
from soup_xb.migrate import Migration, migrate

Accounted = Callable[..., Migration]
Values = Callable[[Migration], dict[str, Any]]

QLORA = """\
base_model: NousResearch/Llama-3.2-1B
model_type: LlamaForCausalLM
tokenizer_type: AutoTokenizer
load_in_8bit: false
load_in_4bit: true
strict: false
datasets:
  - path: ./data/support.jsonl
    type: chat_template
    field_messages: conversations
    message_property_mappings:
      role: from
      content: value
  - path: tatsu-lab/alpaca
    type: alpaca
    split: train
dataset_prepared_path: last_run_prepared
val_set_size: 0.05
output_dir: ./outputs/qlora-out
adapter: qlora
lora_model_dir:
sequence_len: 4096
sample_packing: true
eval_sample_packing: false
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
wandb_project: support
wandb_entity:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: paged_adamw_32bit
lr_scheduler: cosine
learning_rate: '2e-4'
train_on_inputs: no
group_by_length: off
bf16: auto
tf32: false
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: false
resume_from_checkpoint:
logging_steps: 1
flash_attention: true
warmup_steps: 10
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
special_tokens:
  pad_token: "<|end_of_text|>"
"""

RELORA = """\
base_model: mistralai/Mistral-7B-v0.1
datasets:
  - {path: rows.json, ds_type: json, type: completion, field: text}
val_set_size: 0
output_dir: ./relora-out
adapter: lora
sequence_len: 2048
lora_r: 8
lora_alpha: 16
lora_target_modules: [q_proj, v_proj]
relora_steps: 150
relora_warmup_steps: 10
relora_prune_ratio: 0.9
relora_cpu_offload: false
micro_batch_size: 4
num_epochs: 1
learning_rate: 0.0002
bf16: true
warmup_ratio: 0.1
"""

ANCHORS = """\
defaults: &defaults
  learning_rate: 1e-4
  optimizer: adamw_bnb_8bit
  lora_r: &rank 16
<<: *defaults
base_model: Qwen/Qwen3-1.7B
datasets:
  - path: json
    data_files: [a.jsonl, b.jsonl]
    type: chat_template
    roles_to_train: [assistant]
test_datasets:
  - path: held_out.jsonl
    type: chat_template
adapter: lora
peft_init_lora_weights: pissa_niter_16
peft_use_rslora: true
lora_alpha: *rank
lora_target_linear: true
lora_target_modules: [lm_head]
micro_batch_size: 2
batch_size: 16
max_steps: 200
eval_steps: 50
save_steps: 50
save_total_limit: 2
deepspeed: zero2.json
rl:
"""


def test_a_qlora_file_keeps_its_numbers(accounted: Accounted, values: Values) -> None:
    done = accounted(QLORA)
    assert done.tool == "axolotl"
    assert values(done) == {
        "base": "NousResearch/Llama-3.2-1B",
        "data": values(done)["data"],
        "data.train": ("./data/support.jsonl", "tatsu-lab/alpaca"),
        "data.format": "auto",
        "data.val_split": 0.05,
        "data.max_length": 4096,
        "data.packing": True,
        "training": values(done)["training"],
        "training.epochs": 4,
        "training.lr": 2e-4,
        "training.batch_size": 2,
        "training.gradient_accumulation_steps": 4,
        "training.scheduler": "cosine",
        "training.warmup_steps": 10,
        "training.weight_decay": 0.0,
        "training.optimizer": "adamw",
        "training.quantization": "4bit",
        "training.gradient_checkpointing": True,
        "training.logging_steps": 1,
        "training.lora": values(done)["training.lora"],
        "training.lora.r": 32,
        "training.lora.alpha": 16,
        "training.lora.dropout": 0.05,
        "training.lora.target_modules": "auto",
        "output": "./outputs/qlora-out",
    }


def test_what_means_something_else_here_is_told(accounted: Accounted) -> None:
    done = accounted(QLORA)
    notes = {carried.key: carried.note for carried in done.carried}
    reasons = {left.key: left.reason for left in done.left}
    assert "all processes" in notes["micro_batch_size"]
    assert "cut here" in notes["sequence_len"]
    assert "different ways" in reasons["datasets[0].type"]
    assert "in steps" in reasons["evals_per_epoch"]
    assert "metrics.jsonl" in reasons["wandb_project"]
    assert reasons["wandb_entity"] == reasons["lora_model_dir"] == "has no value"
    assert "no tokens are added" in reasons["special_tokens.pad_token"]
    assert "speed or memory" in reasons["flash_attention"]
    assert all("does not know" not in reason for reason in reasons.values())


def test_relora_there_is_the_merge_of_the_paper_here(accounted: Accounted, values: Values) -> None:
    done = accounted(RELORA)
    found = values(done)
    assert (found["training.relora_steps"], found["training.relora_mode"]) == (150, "merge")
    assert (found["training.relora_rewarm_steps"], found["training.relora_warmup_ratio"]) == (10, 0.0)
    assert "training.relora_prune_ratio" not in found
    assert (found["data.format"], found["training.precision"]) == ("text", "bf16")
    assert found["training.lora.target_modules"] == ("q_proj", "v_proj")
    reasons = {left.key: left.reason for left in done.left}
    assert "of which axolotl prunes a part" in reasons["relora_prune_ratio"]


def test_relora_on_a_quantized_base_is_left_whole(accounted: Accounted, values: Values) -> None:
    done = accounted(RELORA + "load_in_4bit: true\n")
    assert not [key for key in values(done) if "relora" in key]
    left = {left.key: left.reason for left in done.left}
    assert {"relora_steps", "relora_warmup_steps", "relora_prune_ratio", "relora_cpu_offload"} <= left.keys()
    assert "round the adapter away" in left["relora_steps"]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("relora: true\njagged_restart_steps: 99\njagged_restart_warmup_steps: 9\n", (99, 9)),
        ("relora: yes\njagged_restart_steps: 99\njagged_restart_warmup_steps: 500\n", (99, None)),
        ("relora: false\nrelora_steps: 99\n", (None, None)),
        ("jagged_restart_steps: 99\n", (None, None)),
    ],
)
def test_the_newer_spelling_of_relora_is_read_too(
    accounted: Accounted, values: Values, lines: str, expected: tuple[int | None, int | None]
) -> None:
    text = "\n".join(line for line in RELORA.splitlines() if "relora_" not in line) + "\n"
    found = values(accounted(text + lines))
    assert (found.get("training.relora_steps"), found.get("training.relora_rewarm_steps")) == expected


def test_anchors_and_merge_keys_are_read(accounted: Accounted, values: Values) -> None:
    done = accounted(ANCHORS)
    found = values(done)
    assert (found["training.lr"], found["training.lora.r"], found["training.lora.alpha"]) == (1e-4, 16, 16)
    assert found["data.train"] == ("a.jsonl", "b.jsonl")
    assert found["data.eval"] == ("held_out.jsonl",)
    assert (found["training.gradient_accumulation_steps"], found["training.batch_size"]) == (8, 2)
    assert found["training.lora.init_strategy"] == "pissa"
    assert found["training.lora.use_rslora"] is True
    assert (found["training.max_steps"], found["training.eval_steps"]) == (200, 50)
    assert "training.epochs" not in found
    reasons = {left.key: left.reason for left in done.left}
    assert "lm_head" in reasons["lora_target_modules"]
    assert "torchrun" in reasons["deepspeed"]


LEAST = "base_model: tiny\ndatasets:\n  - path: rows.jsonl\n    type: alpaca\nadapter: lora\nlearning_rate: 1e-4\n"


def test_what_axolotl_does_by_default_is_written_out(accounted: Accounted, values: Values) -> None:
    found = values(accounted(LEAST))
    assert found["training.weight_decay"] == 0.0
    assert found["training.warmup_ratio"] == 0.03
    assert (found["training.batch_size"], found["training.epochs"]) == (1, 1)
    assert (found["data.max_length"], found["output"]) == (512, "./model-out")


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("num_epochs: 2.5", "training.epochs", 3),
        ("bf16: false", "training.precision", "fp32"),
        ("bf16: full", "training.precision", "bf16"),
        ("fp16: true", "training.precision", None),
        ("optimizer: lion_pytorch", "training.optimizer", None),
        ("lr_scheduler: constant_with_warmup", "training.scheduler", "constant"),
        ("lr_scheduler: one_cycle", "training.scheduler", None),
        ("val_set_size: 200", "data.val_split", None),
        ("val_set_size: 0", "data.val_split", None),
        ("max_steps: -1", "training.max_steps", None),
        ("eval_steps: 20", "training.eval_steps", None),
        ("save_total_limit: 2", "training.save_total_limit", None),
        ("save_steps: 0.1", "training.save_steps", None),
        ("lora_r: 0", "training.lora.r", None),
        ("lora_r: true", "training.lora.r", None),
        ("learning_rate: .inf", "training.lr", None),
        ("num_epochs: .inf", "training.epochs", 1),
        ("gradient_checkpointing: offload", "training.gradient_checkpointing", True),
        ("peft_init_lora_weights: eva", "training.lora.init_strategy", None),
        ("lora_target_modules: all-linear", "training.lora.target_modules", "auto"),
        ("chat_template_jinja: '{{ messages }}'", "data.chat_template", "{{ messages }}"),
        ("warmup_steps: 5\nwarmup_ratio: 0.5", "training.warmup_steps", 5),
        ("adapter: llama-adapter", "training.lora.target_modules", "auto"),
        ("sequence_len: 1", "data.max_length", 512),
        ("train_on_inputs: true", "data.train_on", "all"),
        ("train_on_inputs: false", "data.train_on", None),
    ],
)
def test_one_key_at_a_time(accounted: Accounted, values: Values, line: str, key: str, value: Any) -> None:
    name = line.partition(":")[0]
    text = "".join(kept for kept in LEAST.splitlines(True) if not kept.startswith(f"{name}:"))
    assert values(accounted(f"{text}{line}\n")).get(key) == value


def test_a_preference_task_is_carried_and_the_check_says_what_it_says(accounted: Accounted) -> None:
    done = accounted(LEAST + "rl: grpo\n", ok=False)
    assert "task: grpo" in done.text


def test_a_task_that_is_none_of_ours_ends_the_migration() -> None:
    with pytest.raises(ConfigError) as refused:
        migrate(LEAST + "rl: telepathy\n", "theirs.yaml")
    assert refused.value.problems[0].code == "migrate-task"
    assert refused.value.problems[0].where == "theirs.yaml:7: rl"


@pytest.mark.parametrize(
    ("dataset", "reason"),
    [
        ("{path: s3://bucket/rows.jsonl}", "remote disk"),
        ("{path: rows.jsonl, type: {system_prompt: hi, field_instruction: q}}", "rewrite the rows"),
        ("{path: rows.jsonl, type: input_output}", "rewrite the rows"),
        ("{path: rows.jsonl, type: chat_template, field_messages: [a]}", "must be text"),
        ("{path: rows.jsonl, type: chat_template, roles_to_train: [user]}", "assistant turns alone"),
        ("{path: rows.jsonl, type: chat_template, chat_template: chatml}", "one template"),
        (
            "{path: a.jsonl, type: completion, field: body}, {path: b.jsonl, type: completion, field: story}",
            "reads `text` from `body`",
        ),
        ("{path: org/name, data_files: [x.jsonl]}", "download them"),
        ("{path: [1, 2]}", "no list of paths"),
    ],
)
def test_a_dataset_that_cannot_be_read_here_is_told(accounted: Accounted, dataset: str, reason: str) -> None:
    text = f"base_model: tiny\ndatasets: [{dataset}]\nadapter: lora\n"
    assert any(reason in left.reason for left in accounted(text, ok=False).left)


@pytest.mark.parametrize(
    ("dataset", "columns"),
    [
        ("{path: rows.jsonl, type: completion, field: body}", {"text": "body"}),
        ("{path: rows.jsonl, type: completion, field: text}", {}),
        ("{path: rows.jsonl, type: chat_template, field_messages: talk, field_system: who}",
         {"messages": "talk", "system": "who"}),
        ("{path: rows.jsonl, type: {field_instruction: question, field_output: answer}}",
         {"instruction": "question", "output": "answer"}),
    ],
)  # fmt: skip
def test_the_names_of_columns_are_carried_over(
    accounted: Accounted, dataset: str, columns: dict[str, str]
) -> None:
    done = accounted(f"base_model: tiny\ndatasets: [{dataset}]\nadapter: lora\n", ok=False)
    assert parse_config(done.text, "soup.yaml").config.data.columns == columns


@pytest.mark.parametrize(
    ("lines", "task"),
    [
        ("pretraining_dataset: rows.jsonl", "task: pretrain\n"),
        ("pretraining_dataset: [{path: rows.jsonl, type: pretrain}]", "task: pretrain\n"),
        ("pretraining_dataset:\ndatasets: [{path: rows.jsonl}]", ""),
    ],
)
def test_documents_to_read_are_pretraining(accounted: Accounted, lines: str, task: str) -> None:
    done = accounted(f"base_model: tiny\nadapter: lora\nmax_steps: 5\n{lines}\n")
    assert ("task: pretrain\n" in done.text) == bool(task)
    assert "train: rows.jsonl" in done.text


def test_as_many_datasets_as_a_config_may_hold_are_read_in_seconds(accounted: Accounted) -> None:
    start = time.process_time()
    accounted("base_model: tiny\nadapter: lora\ndatasets:\n" + "  - path: rows.jsonl\n" * 1600)
    assert time.process_time() - start < 5
