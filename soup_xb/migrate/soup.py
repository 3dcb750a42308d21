"""Soup's soup.yaml: the same names as ours, with other defaults and more values."""

from __future__ import annotations

from typing import Any

from soup_xb.core.config.schema import KEYS
from soup_xb.core.tasks import TASKS
from soup_xb.migrate.account import Account
from soup_xb.migrate.values import (
    OPTIMIZERS,
    OTHER_OPTIMIZER,
    OTHER_SCHEDULE,
    OTHER_START,
    SCHEDULES,
    above_zero,
    always,
    boolean,
    checkpointing,
    is_on,
    number,
    one_of,
    optimizer_note,
    read_preferences,
    read_streaming,
    share,
    soup_names,
    task_of,
    when_on,
    whole,
    without_critic,
)

WHOLE = (
    "training.lora.rank_pattern",
    "training.lora.alpha_pattern",
    "lora.rank_pattern",
    "lora.alpha_pattern",
)
_DEFAULT = "Soup's default"
_AUTO = "Soup leaves the choice to PEFT, often q_proj and v_proj; here every linear layer"
_BACKENDS = {"transformers": "torch", "unsloth": "torch", "mlx": "mlx"}
_FORMATS = {
    **{name: name for name in ("auto", "alpaca", "sharegpt")},
    "chatml": "messages",
    "plaintext": "text",
    "dpo": "preference",
}
# What Soup does where its file says nothing, and we would do otherwise.
_DEFAULTS: tuple[tuple[str, Any], ...] = (
    ("training.lora.r", 64),
    ("training.lora.alpha", 16),
    ("training.lora.dropout", 0.05),
    ("training.lr", 2e-5),
    ("training.gradient_accumulation_steps", 4),
    ("training.quantization", "4bit"),
    ("training.save_steps", 100),
)
_PLAIN = ("base", "output", "adapter")
_NUMBERS = ("lr", "weight_decay", "max_grad_norm", "relora_warmup_ratio", "relora_prune_ratio")
_WHOLES = ("epochs", "gradient_accumulation_steps", "logging_steps", "save_steps", "relora_steps")


def read_soup(account: Account) -> None:
    """Take every key of a Soup file."""
    for key in _PLAIN:
        account.carry(key, key)
    account.carry("backend", "backend", one_of(_BACKENDS, "auto is used"))
    _task(account)
    _data(account)
    _lora(account)
    _quantization(account)
    _training(account)
    read_streaming(account, "data.streaming")
    for key, value in _DEFAULTS:
        account.add(key, value, _DEFAULT)
    if not {"training.warmup_steps", "training.warmup_ratio"} & account.values.keys():
        account.add("training.warmup_ratio", 0.03, _DEFAULT)


def _task(account: Account) -> None:
    tasks = {task: task for task in TASKS} | {"reward_model": "reward"}
    if account.peek("task") == "preference":
        account.carry("training.preference_loss", "task", task_of(tasks))
        account.carry("task", "task", always(account.values.get("task", "dpo")))
    without_critic(account, "task")
    account.carry("task", "task", task_of(tasks))
    read_preferences(account, soup_names(account.values.get("task", "sft")))
    modality = account.peek("modality")
    if modality == "text":
        account.same("modality", "rows are text")
    account.leave("modality", "rows are text")


def _data(account: Account) -> None:
    account.carry("data.train", "data.train")
    account.carry("data.max_length", "data.max_length", whole)
    account.carry("data.format", "data.format", one_of(_FORMATS, "`format: auto` looks at the columns"))
    split = account.peek("data.val_split")
    if split == 0:
        account.same("data.val_split", "no rows are held out")
    account.carry("data.val_split", "data.val_split", share)
    if split is None:
        account.add("data.val_split", 0.1, _DEFAULT)
    template = account.peek("data.chat_template")
    if isinstance(template, str) and "{" not in template:
        account.leave(
            "data.chat_template", "Jinja text or a file stands here, not a name; the base's own is used"
        )
    account.carry("data.chat_template", "data.chat_template")
    responses = "data.train_on_responses_only"
    if is_on(account.peek(responses)):
        account.same(responses, "answers alone are trained on")
    if "data.train_on" in TASKS[account.values.get("task", KEYS["task"].default)].all_keys:
        account.carry(responses, "data.train_on", always("all"))
    account.leave(responses, "the task learns its answers alone")


def _lora(account: Account) -> None:
    ours = "training.lora"
    if account.peek("training.lora.target_modules") == "auto" and is_on(account.peek("training.moe_lora")):
        account.leave("training.lora.target_modules", "`moe_lora` reaches the experts too")
    account.carry("training.moe_lora", f"{ours}.target_modules", when_on("auto+experts"))
    starts = {name: name for name in KEYS[f"{ours}.init_strategy"].choices}
    for at in (ours, "lora"):
        for name in ("r", "alpha"):
            account.carry(f"{at}.{name}", f"{ours}.{name}", whole)
        account.carry(f"{at}.dropout", f"{ours}.dropout", number)
        auto = account.peek(f"{at}.target_modules") == "auto"
        account.carry(f"{at}.target_modules", f"{ours}.target_modules", note=_AUTO if auto else "")
        account.carry(f"{at}.init_strategy", f"{ours}.init_strategy", one_of(starts, OTHER_START))
        for name in ("rank_pattern", "alpha_pattern"):
            account.carry(f"{at}.{name}", f"{ours}.{name}")
        for name in ("use_dora", "use_rslora", "use_vera", "use_olora"):
            account.carry(f"{at}.{name}", f"{ours}.{name}", boolean)
    account.add("training.lora.target_modules", "auto", _AUTO)


def _quantization(account: Account) -> None:
    key = "training.quantization"
    for alias, value in (("training.load_in_8bit", "8bit"), ("training.load_in_16bit", "none")):
        if is_on(account.peek(alias)):
            account.leave(key, f"`{alias.rpartition('.')[2]}` decides")
            account.carry(alias, key, always(value))
        account.same(alias, "off, as here")
    formats = {name: name for name in KEYS[key].choices}
    account.carry(key, key, one_of(formats, "4bit is used; the formats here are none, 4bit and 8bit"))


def _training(account: Account) -> None:
    if account.peek("training.batch_size") == "auto":
        account.leave(
            "training.batch_size", "no search for the largest; `soupx plan` shows the memory of one"
        )
    account.carry("training.batch_size", "training.batch_size", whole)
    for name in _WHOLES:
        account.carry(f"training.{name}", f"training.{name}", above_zero)
    for name in _NUMBERS:
        account.carry(f"training.{name}", f"training.{name}", number)
    account.carry("training.relora_reset_optimizer", "training.relora_reset_optimizer", boolean)
    if "training.relora_steps" not in account.values:
        for key in account.matching(r"training\.relora_.*"):
            account.leave(key, "it needs `relora_steps`")
        for key in [key for key in account.values if key.startswith("training.relora_")]:
            account.withdraw(key, "it needs `relora_steps`")
    account.carry("training.warmup_ratio", "training.warmup_ratio", number)
    note = optimizer_note(account.peek("training.optimizer"))
    account.carry("training.optimizer", "training.optimizer", one_of(OPTIMIZERS, OTHER_OPTIMIZER), note)
    account.carry("training.scheduler", "training.scheduler", one_of(SCHEDULES, OTHER_SCHEDULE))
    account.carry("training.gradient_checkpointing", "training.gradient_checkpointing", checkpointing)
    account.carry("training.packing", "data.packing", boolean)
    account.carry("training.seed", "training.seed", whole)
    account.carry("training.moe_aux_loss_coeff", "training.router_aux_loss_coef", number)
