"""axolotl's YAML: one flat file, datasets as a list of mappings."""

from __future__ import annotations

from soup_xb.migrate.account import Account
from soup_xb.migrate.axolotl_data import read_data
from soup_xb.migrate.preferences import AXOLOTL_NAMES, read_preferences
from soup_xb.migrate.streaming import read_streaming
from soup_xb.migrate.values import (
    OPTIMIZERS,
    OTHER_OPTIMIZER,
    OTHER_SCHEDULE,
    SCHEDULES,
    above_zero,
    always,
    boolean,
    checkpointing,
    is_on,
    lora_start,
    names,
    number,
    one_of,
    optimizer_note,
    passes,
    passes_note,
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
