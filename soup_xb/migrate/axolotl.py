"""axolotl's YAML: one flat file, with `datasets` as a list of sources, each with its path and prompt style."""

from __future__ import annotations

import re
from typing import Any

from soup_xb.core.config.run_rules import is_local_path
from soup_xb.core.tasks import TASKS
from soup_xb.migrate.account import Account, NotCarriedError
from soup_xb.migrate.values import (
    AXOLOTL_NAMES,
    OPTIMIZERS,
    OTHER_OPTIMIZER,
    OTHER_SCHEDULE,
    SCHEDULES,
    above_zero,
    always,
    boolean,
    carry_train_on,
    checkpointing,
    is_on,
    lora_start,
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
)

_TASKS = {name: name for name in ("dpo", "ipo", "kto", "orpo", "simpo", "grpo")}
_PER_GPU = "there it counts rows of one GPU, here of all processes together: multiply it by their number"


def read_axolotl(account: Account) -> None:
    """Take every key of an axolotl file."""
    account.carry("base_model", "base")
    account.carry("output_dir", "output")
    account.add("output", "./model-out", "axolotl's default")
    _task(account)
    _adapter(account)
    _targets(account)
    read_data(account)
    _batches(account)
    _schedule(account)
    read_streaming(account)
    _optimizer(account)
    _precision(account)
    _cadence(account)
    _relora(account)


def _task(account: Account) -> None:
    if is_on(account.peek("reward_model")):
        account.carry("reward_model", "task", when_on("reward"))
    account.same("reward_model", "off, as here")
    account.carry("rl", "task", task_of(_TASKS))
    read_preferences(account, AXOLOTL_NAMES)


def _adapter(account: Account) -> None:
    adapter = account.peek("adapter")
    if adapter in ("lora", "qlora"):
        account.same("adapter", "an adapter is always trained; qlora is `training.quantization: 4bit`")
    elif adapter is None:
        account.leave(
            "adapter", "without an adapter axolotl trains every weight; here a LoRA adapter is trained"
        )
    else:
        account.leave("adapter", "the adapters here are LoRA, rsLoRA, DoRA and VeRA; LoRA is trained")
    for key, bits in (("load_in_4bit", "4bit"), ("load_in_8bit", "8bit")):
        if is_on(account.peek(key)):
            account.carry(key, "training.quantization", when_on(bits))
        account.same(key, "off: the base keeps the precision of the run")
    if adapter == "qlora":
        account.add("training.quantization", "4bit", "what `adapter: qlora` means")
    account.carry("lora_model_dir", "adapter")
    account.carry("lora_r", "training.lora.r", whole)
    account.carry("lora_alpha", "training.lora.alpha", whole)
    account.carry("lora_dropout", "training.lora.dropout", number)
    account.carry("peft_use_dora", "training.lora.use_dora", boolean)
    account.carry("peft_use_rslora", "training.lora.use_rslora", boolean)
    account.carry("peft_init_lora_weights", "training.lora.init_strategy", lora_start)


def _targets(account: Account) -> None:
    key = "training.lora.target_modules"
    extra = account.peek("lora_target_modules")
    if is_on(account.peek("lora_target_linear")):
        account.carry("lora_target_linear", key, when_on("auto"))
        beyond = [name for name in ("lm_head", "embed_tokens") if isinstance(extra, list) and name in extra]
        reason = f"{' and '.join(beyond)}: `auto` never reaches that; list all modules instead"
        account.leave("lora_target_modules", reason if beyond else "`auto` has every linear layer already")
        return
    account.same("lora_target_linear", "off, as here")
    if isinstance(extra, str):
        account.carry("lora_target_modules", key, lambda value: "auto" if value == "all-linear" else value)
    account.carry("lora_target_modules", key, names)
    account.add(
        key, "auto", "axolotl leaves the choice to PEFT, often q_proj and v_proj; here every linear layer"
    )


def _batches(account: Account) -> None:
    micro, total = account.peek("micro_batch_size"), account.peek("batch_size")
    account.carry("micro_batch_size", "training.batch_size", whole, _PER_GPU)
    account.carry("gradient_accumulation_steps", "training.gradient_accumulation_steps", whole)
    if isinstance(micro, int) and isinstance(total, int) and micro > 0 and total % micro == 0:
        key = "training.gradient_accumulation_steps"
        account.carry("batch_size", key, lambda value: value // micro, "rows of a step, in micro-batches")
    account.leave("batch_size", "it counts the rows of a step, and is no multiple of `micro_batch_size`")
    account.add("training.batch_size", 1, "axolotl's default")


def _schedule(account: Account) -> None:
    account.carry("max_steps", "training.max_steps", above_zero)
    if "training.max_steps" in account.values:
        account.leave("num_epochs", "`max_steps` decides")
    note = passes_note(account.peek("num_epochs"))
    account.carry("num_epochs", "training.epochs", passes, note)
    if "training.max_steps" not in account.values:
        account.add("training.epochs", 1, "axolotl's default")
    account.carry("learning_rate", "training.lr", number)
    account.carry("lr_scheduler", "training.scheduler", one_of(SCHEDULES, OTHER_SCHEDULE))
    account.carry("warmup_steps", "training.warmup_steps", whole)
    if "training.warmup_steps" in account.values:
        account.leave("warmup_ratio", "`warmup_steps` says the same")
    account.carry("warmup_ratio", "training.warmup_ratio", number)
    if not {"training.warmup_steps", "training.warmup_ratio"} & account.values.keys():
        account.add("training.warmup_ratio", 0.03, "axolotl's default, there 100 steps at most")


def _optimizer(account: Account) -> None:
    note = optimizer_note(account.peek("optimizer"))
    account.carry("optimizer", "training.optimizer", one_of(OPTIMIZERS, OTHER_OPTIMIZER), note)
    account.carry("weight_decay", "training.weight_decay", number)
    account.add("training.weight_decay", 0.0, "axolotl's default")
    account.carry("max_grad_norm", "training.max_grad_norm", number)
    account.carry("seed", "training.seed", whole)
    for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        if account.values.get("training.optimizer") == "sgd":
            account.leave(name, "it belongs to adamw")
        account.carry(name, f"training.{name}", number)


def _precision(account: Account) -> None:
    key = "training.precision"
    switches = {"bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16", "float32": "fp32"}
    if account.peek("bf16") == "auto":
        account.same("bf16", "`precision: auto` is bf16 on CUDA and Metal, fp32 on a CPU")
    on = [name for name in switches if is_on(account.peek(name)) or account.peek(name) == "full"]
    for name in on:
        account.carry(name, key, always(switches[name]))
    if account.peek("bf16") is not None and not on:
        account.carry("bf16", key, always("fp32"), "neither bf16 nor fp16 is on")
    for name in switches:
        account.same(name, "off, as here")
    account.carry("gradient_checkpointing", "training.gradient_checkpointing", checkpointing)


def _cadence(account: Account) -> None:
    account.carry("logging_steps", "training.logging_steps", above_zero)
    account.carry("save_steps", "training.save_steps", steps)
    if "training.save_steps" not in account.values:
        account.leave("save_total_limit", "it needs `training.save_steps`")
    account.carry("save_total_limit", "training.save_total_limit", above_zero)
    if not {"data.eval", "data.val_split"} & account.values.keys():
        account.leave("eval_steps", "no rows are held out")
    account.carry("eval_steps", "training.eval_steps", steps)


def _relora(account: Account) -> None:
    keys = account.matching(r"(relora|jagged_restart).*")
    every = "jagged_restart_steps" if account.peek("jagged_restart_steps") else "relora_steps"
    switch = account.peek("relora")
    if not (is_on(switch) or (switch is None and account.peek("relora_steps"))):
        for key in keys:
            account.leave(key, "ReLoRA is off, and the learning rate restarts with it alone")
        return
    if account.values.get("training.quantization", "none") != "none":
        for key in keys:
            account.leave(
                key, "a merge would round the adapter away in a quantized base; write `quantization: none`"
            )
        return
    account.same("relora", "`training.relora_steps` switches it on")
    if account.carry(every, "training.relora_steps", above_zero, "a restart merges the adapter, as there"):
        account.add(
            "training.relora_mode", "merge", "axolotl merges the adapter into the base and starts a new one"
        )
        account.add("training.relora_warmup_ratio", 0.0, "axolotl restarts from the first multiple on")
        for key in ("relora_warmup_steps", "jagged_restart_warmup_steps"):
            account.carry(key, "training.relora_rewarm_steps", above_zero)
        if account.values.get("training.relora_rewarm_steps", 0) >= account.values["training.relora_steps"]:
            account.withdraw("training.relora_rewarm_steps", "the learning rate would never reach its height")
    for key in keys:
        reset = "a merge here starts the optimizer's state afresh, of which axolotl prunes a part"
        account.leave(key, reset if "prune" in key else "a merge here has no such setting")


_BUILDERS = ("json", "csv", "parquet", "text")
_TYPES = {"alpaca": "alpaca", "completion": "text", "sharegpt": "sharegpt"}
_ALPACA = "axolotl puts Alpaca's preamble around the row; here the base's chat template is used"
_REWRITE = "such prompts are not built here; rewrite the rows as messages or as prompt and completion"
_REWRITE_PAIRS = (
    "such prompts are not built here; rewrite the rows with `prompt`, `chosen`, `rejected`, for kto `completion` "
    "and `label`"
)
_MIXED = "the files are written in different ways; each is told apart by its columns"
_ANSWERS = "assistant turns alone are trained on, with their end token"
_SAME_TURNS = ({"role": "role", "content": "content"}, {"role": "from", "content": "value"})


def read_data(account: Account) -> None:
    """Take the keys about rows."""
    account.carry("sequence_len", "data.max_length", whole, "a longer row is cut here; axolotl drops it")
    account.add("data.max_length", 512, "axolotl's default")
    pretraining = any(account.peek(key) for key in account.matching(r"pretraining_dataset.*"))
    account.collect("pretraining_dataset", "data.train", _paths)
    _datasets(account, "pretraining_dataset", "data.train")
    _datasets(account, "datasets", "data.train")
    _datasets(account, "test_datasets", "data.eval")
    if pretraining:
        account.add("task", "pretrain", "what `pretraining_dataset` means")
    if "data.eval" in account.values:
        account.leave("val_set_size", "`test_datasets` are the held-out rows")
    if account.peek("val_set_size") == 0:
        account.same("val_set_size", "no rows are held out")
    account.carry("val_set_size", "data.val_split", share)
    account.carry("sample_packing", "data.packing", is_on)
    account.carry("chat_template_jinja", "data.chat_template")
    if account.peek("chat_template") == "jinja":
        account.same("chat_template", "`data.chat_template` is Jinja text or a file")
    if str(account.peek("chat_template")).startswith("tokenizer_default"):
        account.same("chat_template", "the base's own template is used")
    account.leave(
        "chat_template", "the base's own template is used; `data.chat_template` takes Jinja text or a file"
    )
    carry_train_on(account, "train_on_inputs", "all")


def _datasets(account: Account, name: str, to: str) -> None:
    sources: dict[str, list[str]] = {}
    for key in account.matching(rf"{name}\[\d+\]\..*"):
        sources.setdefault(key[: key.index("].") + 2], []).append(key)
    for prefix, keys in sources.items():
        _dataset(account, prefix, to, keys)


def _dataset(account: Account, prefix: str, to: str, keys: list[str]) -> None:
    path, files = account.peek(f"{prefix}path"), account.peek(f"{prefix}data_files")
    if isinstance(path, str) and path.lower() in _BUILDERS and files:
        account.same(f"{prefix}path", "the ending of a file says how it is written")
        path = None
        account.collect(f"{prefix}data_files", to, _paths if to == "data.train" else _files)
    else:
        account.collect(f"{prefix}path", to, _paths if to == "data.train" else _files)
    account.leave(
        f"{prefix}data_files", "the files of a hub dataset cannot be chosen; download them and name them"
    )
    account.same(f"{prefix}ds_type", "the ending of a file says how it is written")
    style = account.peek(f"{prefix}type")
    _style(account, prefix)
    hub = isinstance(path, str) and not is_local_path(path) and to == "data.train"
    for key, ours in (("split", "data.split"), ("name", "data.subset")):
        if hub and account.peek(f"{prefix}{key}") != "train":
            account.carry(f"{prefix}{key}", ours)
        account.same(f"{prefix}{key}", "the split `train` is read, or the whole file")
    _turns(account, prefix, keys)
    _columns(account, prefix, keys, style)
    for key in keys:
        prompt = re.match(r"(field|type|roles|drop|shards|preprocess)", key.removeprefix(prefix))
        account.leave(key, _rewrite(account) if prompt else "nothing here reads such a setting of a dataset")


# What axolotl calls a column -> our name, for the styles that read it.
_FIELDS = {
    "completion": {"field": "text"},
    "chat_template": {
        "field_messages": "messages",
        "field_system": "system",
        "field_tools": "tools",
        "field_chosen": "chosen",
        "field_rejected": "rejected",
    },
    "type": {f"type.field_{name}": name for name in ("instruction", "input", "output", "system")},
}


def _columns(account: Account, prefix: str, keys: list[str], style: Any) -> None:
    """The names of columns, where the style of the prompt is one that is built here too."""
    family = style.partition(":")[0].partition(".")[0] if isinstance(style, str) else "type"
    for name, ours in _FIELDS.get(family, {}).items():
        if f"{prefix}{name}" in keys:
            account.name_column(f"{prefix}{name}", ours)


def _rewrite(account: Account) -> str:
    kind = TASKS[account.values.get("task", "sft")].kind
    return _REWRITE_PAIRS if kind in ("pair", "judged") else _REWRITE


def _paths(value: Any) -> list[str]:
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(path, str) for path in found):
        raise NotCarriedError("is no path and no list of paths")
    if any("://" in path for path in found):
        raise NotCarriedError("rows on a remote disk are not read; download them and name the file")
    return found


def _files(value: Any) -> list[str]:
    found = _paths(value)
    if not all(is_local_path(path) for path in found):
        raise NotCarriedError(
            "held-out rows are read from files; download them and name the file in `data.eval`"
        )
    return found


def _style(account: Account, prefix: str) -> None:
    """`type`: how a row becomes a prompt; ours says how it is written."""
    key, style = f"{prefix}type", account.peek(f"{prefix}type")
    if not isinstance(style, str):
        return
    family = style.partition(":")[0]
    found = _TYPES.get(family)
    if family == "chat_template":
        column = str(account.peek(f"{prefix}field_messages") or "messages")
        found = {"conversations": "sharegpt"}.get(column, "messages")
    if family == "pretrain":
        account.same(key, "`task: pretrain` says it")
    if found is None:
        account.leave(key, _rewrite(account))
        return
    if account.values.get("data.format", found) != found:
        account.withdraw("data.format", _MIXED)
        account.add("data.format", "auto", _MIXED)
        account.leave(key, f"{_MIXED}; {_ALPACA}" if found == "alpaca" else _MIXED)
        return
    account.carry(key, "data.format", always(found), _ALPACA if found == "alpaca" else "")


def _turns(account: Account, prefix: str, keys: list[str]) -> None:
    """How the turns of a conversation are spelled, and which are trained on."""
    if account.peek(f"{prefix}field_messages") in ("messages", "conversations"):
        account.same(f"{prefix}field_messages", "the format says it")
    renamed = [key for key in keys if key.startswith(f"{prefix}message_property_mappings.")]
    mapping = {key.rpartition(".")[2]: account.peek(key) for key in renamed}
    spelled = ("message_field_role", "message_field_content")
    pair = {"role": account.peek(f"{prefix}{spelled[0]}"), "content": account.peek(f"{prefix}{spelled[1]}")}
    for group, meaning in ((renamed, mapping), ([f"{prefix}{name}" for name in spelled], pair)):
        for key in group:
            if meaning in _SAME_TURNS:
                account.same(key, "turns may be spelled role and content, or from and value")
            account.leave(
                key, "turns are spelled role and content, or from and value; rename them in the rows"
            )
    roles = account.peek(f"{prefix}roles_to_train")
    if isinstance(roles, list) and {str(role) for role in roles} <= {"assistant", "gpt"}:
        account.same(f"{prefix}roles_to_train", _ANSWERS)
    if account.peek(f"{prefix}train_on_eos") == "turn":
        account.same(f"{prefix}train_on_eos", _ANSWERS)
    for key in ("roles_to_train", "train_on_eos"):
        account.leave(f"{prefix}{key}", _ANSWERS)
    if str(account.peek(f"{prefix}chat_template")).startswith("tokenizer_default"):
        account.same(f"{prefix}chat_template", "the base's own template is used")
    for key in ("chat_template", "chat_template_jinja"):
        account.leave(
            f"{prefix}{key}", "one template serves all files: `data.chat_template`, Jinja text or a file"
        )
