"""LLaMA-Factory's YAML: the arguments of its trainer in one flat file."""

from __future__ import annotations

from typing import Any

from soup_xb.core.config.run_rules import is_local_path
from soup_xb.migrate.account import Account
from soup_xb.migrate.values import (
    LLAMA_FACTORY_NAMES,
    OPTIMIZERS,
    OTHER_OPTIMIZER,
    OTHER_SCHEDULE,
    SCHEDULES,
    above_zero,
    always,
    boolean,
    carry_train_on,
    is_on,
    names,
    number,
    one_of,
    optimizer_note,
    passes,
    passes_note,
    read_preferences,
    read_streaming,
    share,
    steps,
    task_of,
    when_on,
    whole,
    without_critic,
)

_STAGES = {"sft": "sft", "pt": "pretrain", "rm": "reward", "kto": "kto"}
_LOSSES = {"sigmoid": "dpo", "ipo": "ipo", "orpo": "orpo", "simpo": "simpo"}
_PER_DEVICE = (
    "there it counts rows of one device, here of all processes together: multiply it by their number"
)
_NAMED = "a name in dataset_info.json there, a file here: check the path, and its `formatting` and `columns`"
_DEFAULT = "LLaMA-Factory's default"


def read_llama_factory(account: Account) -> None:
    """Take every key of a LLaMA-Factory file."""
    account.carry("model_name_or_path", "base")
    account.carry("output_dir", "output")
    _task(account)
    _data(account)
    _adapter(account)
    _targets(account)
    _batches_and_schedule(account)
    read_streaming(account)
    _optimizer(account)
    _precision(account)
    _cadence(account)


def _task(account: Account) -> None:
    if account.peek("stage") == "dpo":
        losses = one_of(_LOSSES, "there is no such loss here; dpo is used")
        account.carry("pref_loss", "task", losses)
        account.carry("stage", "task", always(account.values.get("task", "dpo")))
    without_critic(account, "stage")
    account.carry("stage", "task", task_of(_STAGES))
    read_preferences(account, LLAMA_FACTORY_NAMES)
    account.same("do_train", "`soupx train` trains")
    kind = account.peek("finetuning_type")
    if kind == "lora":
        account.same("finetuning_type", "a LoRA adapter is trained")
    account.leave("finetuning_type", "the base stays frozen and a LoRA adapter is trained")


def _data(account: Account) -> None:
    folder = account.peek("dataset_dir")
    online = folder == "ONLINE"
    folder = folder if isinstance(folder, str) else "data"

    def files(value: Any) -> list[str]:
        return [name if online else _file(folder, name) for name in names(value)]

    account.collect("dataset", "data.train", files, "" if online else _NAMED)
    account.collect("eval_dataset", "data.eval", files, "" if online else _NAMED)
    account.same("dataset_dir", "it is part of the paths")
    account.carry("cutoff_len", "data.max_length", whole)
    if account.peek("val_size") == 0 or "data.eval" in account.values:
        account.same("val_size", "no rows of the training files are held out")
    account.carry("val_size", "data.val_split", share)
    account.carry("packing", "data.packing", boolean)
    account.leave(
        "template", "the base's own chat template is used; `data.chat_template` takes Jinja text or a file"
    )
    account.leave("tool_format", "the base's own chat template writes tools")
    carry_train_on(account, "train_on_prompt", "all")
    carry_train_on(account, "mask_history", "last")
    if not is_on(account.peek("enable_thinking")):
        account.same("enable_thinking", "off, as here")
    account.leave("enable_thinking", "thoughts are trained on as they stand in the rows")
    account.same("ignore_pad_token_for_loss", "padding never counts")


def _file(folder: str, name: str) -> str:
    return name if is_local_path(name) else f"./{folder.removeprefix('./').rstrip('/')}/{name}.json"


def _adapter(account: Account) -> None:
    adapters = account.peek("adapter_name_or_path")
    if isinstance(adapters, str) and "," in adapters:
        account.leave(
            "adapter_name_or_path", "a run starts from one adapter; merge the others into the base first"
        )
    account.carry("adapter_name_or_path", "adapter")
    account.same("create_new_adapter", "without `adapter` a run makes a new one")
    account.carry("lora_rank", "training.lora.r", whole)
    account.add("training.lora.r", 8, _DEFAULT)
    account.carry("lora_alpha", "training.lora.alpha", whole)
    account.add(
        "training.lora.alpha",
        2 * account.values["training.lora.r"],
        "twice the rank, LLaMA-Factory's default",
    )
    account.carry("lora_dropout", "training.lora.dropout", number)
    account.carry("use_rslora", "training.lora.use_rslora", boolean)
    account.carry("use_dora", "training.lora.use_dora", boolean)
    account.carry("pissa_init", "training.lora.init_strategy", when_on("pissa"))
    account.leave("pissa_iter", "the start is exact here, without an iteration")
    account.same("pissa_convert", "every adapter is saved as plain LoRA on the untouched base")
    method = str(account.peek("quantization_method") or "bnb").lower()
    bits = one_of({"4": "4bit", "8": "8bit"}, "4 and 8 bits are there")
    if method in ("bnb", "bitsandbytes"):
        account.same("quantization_method", "4 and 8 bits are bitsandbytes' on torch, MLX's own there")
        account.carry("quantization_bit", "training.quantization", bits)
    account.leave("quantization_method", "the formats here are bitsandbytes' on torch and MLX's own there")
    account.leave("quantization_bit", "the formats here are bitsandbytes' on torch and MLX's own there")


def _targets(account: Account) -> None:
    def convert(value: Any) -> str | list[str]:
        found = names(value)
        return "auto" if found == ["all"] else found

    account.carry("lora_target", "training.lora.target_modules", convert)


def _batches_and_schedule(account: Account) -> None:
    account.carry("per_device_train_batch_size", "training.batch_size", whole, _PER_DEVICE)
    account.add("training.batch_size", 8, _DEFAULT)
    account.carry("gradient_accumulation_steps", "training.gradient_accumulation_steps", whole)
    account.carry("max_steps", "training.max_steps", above_zero)
    if "training.max_steps" in account.values:
        account.leave("num_train_epochs", "`max_steps` decides")
    note = passes_note(account.peek("num_train_epochs"))
    account.carry("num_train_epochs", "training.epochs", passes, note)
    account.carry("learning_rate", "training.lr", number)
    account.add("training.lr", 5e-5, _DEFAULT)
    if account.peek("lr_scheduler_type") is None:
        account.add("training.scheduler", "linear", _DEFAULT)
    account.carry("lr_scheduler_type", "training.scheduler", one_of(SCHEDULES, OTHER_SCHEDULE))
    if account.peek("warmup_steps") == 0:
        account.same("warmup_steps", "there is no warm-up without `warmup_ratio`")
    account.carry("warmup_steps", "training.warmup_steps", whole)
    if "training.warmup_steps" in account.values:
        account.leave("warmup_ratio", "`warmup_steps` says the same")
    account.carry("warmup_ratio", "training.warmup_ratio", number)


def _optimizer(account: Account) -> None:
    note = optimizer_note(account.peek("optim"))
    account.carry("optim", "training.optimizer", one_of(OPTIMIZERS, OTHER_OPTIMIZER), note)
    account.carry("weight_decay", "training.weight_decay", number)
    account.add("training.weight_decay", 0.0, _DEFAULT)
    account.carry("max_grad_norm", "training.max_grad_norm", number)
    account.carry("seed", "training.seed", whole)
    account.carry("moe_aux_loss_coef", "training.router_aux_loss_coef", number)
    for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        if account.values.get("training.optimizer") == "sgd":
            account.leave(name, "it belongs to adamw")
        account.carry(name, f"training.{name}", number)


def _precision(account: Account) -> None:
    switches = {"bf16": "bf16", "pure_bf16": "bf16", "fp16": "fp16"}
    for name, precision in switches.items():
        if is_on(account.peek(name)):
            account.carry(name, "training.precision", when_on(precision))
        account.same(name, "off, as here")
    off = "disable_gradient_checkpointing"
    account.carry(off, "training.gradient_checkpointing", lambda value: not boolean(value))
    account.carry("gradient_checkpointing", "training.gradient_checkpointing", boolean)
    account.add("training.gradient_checkpointing", True, _DEFAULT)


def _cadence(account: Account) -> None:
    account.carry("logging_steps", "training.logging_steps", steps)
    account.carry("save_steps", "training.save_steps", steps)
    if "training.save_steps" not in account.values:
        account.leave("save_total_limit", "it needs `training.save_steps`")
    account.carry("save_total_limit", "training.save_total_limit", above_zero)
    if not {"data.eval", "data.val_split"} & account.values.keys():
        account.leave("eval_steps", "no rows are held out")
    account.carry("eval_steps", "training.eval_steps", steps)
