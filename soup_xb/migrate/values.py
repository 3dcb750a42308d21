"""Values as other tools write them, and settings that several tools share: preference losses, PPO, streaming."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from soup_xb.core.config.keys import shown
from soup_xb.core.config.run_rules import is_local_path
from soup_xb.core.config.schema import KEYS
from soup_xb.core.tasks import TASKS, tasks_with
from soup_xb.migrate.account import Account, Convert, NoSuchTaskError, NotCarriedError

_WORDS = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}


def boolean(value: Any) -> bool:
    """True or false; for other tools' readers `yes`, `no`, `on` and `off` are booleans too.

    >>> boolean("no"), boolean(True)
    (False, True)
    """
    if isinstance(value, str) and value.lower() in _WORDS:
        return _WORDS[value.lower()]
    if isinstance(value, bool):
        return value
    raise NotCarriedError(f"is neither true nor false: {shown(value)}")


def is_on(value: Any) -> bool:
    """Whether a value stands for true; anything else than a boolean counts as false."""
    return value is True or (isinstance(value, str) and _WORDS.get(value.lower(), False))


def number(value: Any) -> float:
    """A finite number, which other tools also take as text (`"2e-4"`)."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise NotCarriedError(f"is no number: {shown(value)}")
    return found


def whole(value: Any) -> int:
    """A whole number, `3.0` included.

    >>> whole("3.0"), whole(8)
    (3, 8)
    """
    found = number(value)
    if found != int(found):
        raise NotCarriedError(f"is no whole number: {shown(value)}")
    return int(found)


def above_zero(value: Any) -> int:
    """A whole number that is not a way to say `off`: other tools write 0 or -1 for that."""
    found = whole(value)
    if found < 1:
        raise NotCarriedError(f"{found} stands for off, as without the key")
    return found


def passes(value: Any) -> int:
    """Passes over the rows; a part of one counts as a whole one here."""
    return max(1, math.ceil(number(value)))


def passes_note(value: Any) -> str:
    """What to say of passes that are not whole."""
    part = isinstance(value, float) and math.isfinite(value) and value != int(value)
    return "a part of a pass counts as a whole one; `training.max_steps` ends sooner" if part else ""


def share(value: Any) -> float:
    """A share of the rows, below one; other tools take a number of rows as well."""
    found = number(value)
    if found >= 1:
        raise NotCarriedError(
            f"{found:g} is a number of rows; `data.val_split` is a share of them, such as 0.1"
        )
    return found


def steps(value: Any) -> int:
    """A cadence in steps; other tools take a share of the run as well."""
    found = number(value)
    if 0 < found < 1:
        raise NotCarriedError(f"{found:g} is a share of the run; write a number of steps")
    return above_zero(value)


def names(value: Any) -> list[str]:
    """Module names, as a list or with commas between them."""
    found = value.split(",") if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise NotCarriedError(f"is no list of names: {shown(value)}")
    return [name.strip() for name in found if name.strip()]


def one_of(table: Mapping[str, Any], otherwise: str) -> Convert:
    """A converter that looks a word up; a word that is not there is left, for the reason `otherwise`."""

    def convert(value: Any) -> Any:
        word = str(value).lower()
        if word not in table:
            raise NotCarriedError(f"{shown(value)}: {otherwise}")
        return table[word]

    return convert


def task_of(table: Mapping[str, str]) -> Convert:
    """A converter of task names; one that is not there ends the migration."""

    def convert(value: Any) -> str:
        if str(value).lower() not in table:
            raise NoSuchTaskError(f"{shown(value)} has no counterpart here")
        return table[str(value).lower()]

    return convert


def always(value: Any) -> Convert:
    """A converter that gives the same value whatever is written, for a key that was looked at before."""
    return lambda _: value


def when_on(value: Any) -> Convert:
    """A converter of a switch that, when on, means `value`."""

    def convert(raw: Any) -> Any:
        if not boolean(raw):
            raise NotCarriedError("it is off, as without the key")
        return value

    return convert


def carry_train_on(account: Account, key: str, value: str) -> None:
    """Take a switch that, when on, asks for other tokens than all answers: `value` is ours for `data.train_on`."""
    task = TASKS[account.values.get("task", KEYS["task"].default)]
    if not is_on(account.peek(key)):
        account.same(key, "off, as here")
    elif "data.train_on" in task.all_keys:
        account.carry(key, "data.train_on", when_on(value))
    else:
        account.leave(key, f"`task: {task.name}` has no such choice of tokens")


def checkpointing(value: Any) -> bool:
    """Whether activations are recomputed; a word names a way of doing it."""
    return True if value in ("offload", "unsloth", "full", "auto", "medium", "selective") else boolean(value)


def lora_start(value: Any) -> str:
    """Where the factors start, from what PEFT calls `init_lora_weights`."""
    word = str(value).lower()
    if word in ("true", "default"):
        return "random"
    # PEFT's `pissa_niter_N` comes near; the start here is exact within rounding.
    if word in ("pissa", "olora") or word.startswith("pissa_niter_"):
        return word.partition("_")[0]
    raise NotCarriedError(OTHER_START)


OPTIMIZERS = {
    **dict.fromkeys(("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused"), "adamw"),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "adamw_torch_8bit", "paged_adamw_8bit"), "adamw"),
    **dict.fromkeys(("paged_adamw", "paged_adamw_32bit"), "adamw"),
    "sgd": "sgd",
}
OTHER_OPTIMIZER = "adamw is used; the optimizers here are adamw and sgd"
FULL_STATE = "its state is held in full precision here: more memory, and no accuracy lost"
SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
}
OTHER_START = "the starts here are random, pissa and olora"
OTHER_SCHEDULE = "the schedules here are linear, cosine and constant; cosine is used"


def optimizer_note(value: Any) -> str:
    """What to say of an optimizer that saves memory elsewhere."""
    return FULL_STATE if isinstance(value, str) and ("8bit" in value or "paged" in value) else ""


_NO_CRITIC = (
    "no critic is trained here; `task: rlhf` optimises against a reward model too, by groups of answers: name the "
    "output of a `task: reward` run as `training.reward_model`"
)


def without_critic(account: Account, key: str) -> None:
    """Leave a task of PPO with the reason, and take the one that comes next to it."""
    if str(account.peek(key)).lower() == "ppo":
        account.leave(key, _NO_CRITIC)
        account.add("task", "rlhf", "the nearest to ppo")


_BETA, _GAMMA, _NOISE = "training.beta", "training.simpo_gamma", "training.label_smoothing"
_WEIGHTS = ("training.desirable_weight", "training.undesirable_weight")
_SOUP_BETAS = {"ipo": "ipo_tau"}
_THERE = "the default there"

AXOLOTL_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "trl.beta": _BETA,
        "rl_beta": _BETA,
        "orpo_alpha": _BETA,
        "simpo_gamma": _GAMMA,
        "cpo_alpha": "training.cpo_alpha",
        "dpo_label_smoothing": _NOISE,
        "kto_desirable_weight": _WEIGHTS[0],
        "kto_undesirable_weight": _WEIGHTS[1],
    }
)
LLAMA_FACTORY_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "pref_beta": _BETA,
        "simpo_gamma": _GAMMA,
        "dpo_label_smoothing": _NOISE,
        "kto_chosen_weight": _WEIGHTS[0],
        "kto_rejected_weight": _WEIGHTS[1],
    }
)


def soup_names(task: str) -> Mapping[str, str]:
    """Soup names the scale of the rewards after its task (`dpo_beta`), and ipo's tau."""
    beta = _SOUP_BETAS.get(task, f"{task}_beta")
    return {
        f"training.{beta}": _BETA,
        "training.simpo_gamma": _GAMMA,
        "training.cpo_alpha": "training.cpo_alpha",
    }


def read_preferences(account: Account, names: Mapping[str, str]) -> None:
    """Take the settings of preference losses that count for the task; `names` gives ours for each of theirs.

    A setting of another task's loss is left. The defaults of simpo differ between the tools.
    """
    task = TASKS[account.values.get("task", KEYS["task"].default)]
    if _BETA not in task.all_keys or task.samples:
        return
    for name, ours in names.items():
        if ours in account.values:
            account.leave(name, f"`{ours}` is set already")
        if ours not in task.all_keys:
            account.leave(name, f"it belongs to the loss of {' or '.join(tasks_with(ours))}")
        account.carry(name, ours, number)
    if _GAMMA in task.all_keys:
        account.add(_BETA, 0.1, _THERE)
        account.add(_GAMMA, 0.5, _THERE)


_ORDER = (
    "the files come in an order of `training.seed`, and the rows that the steps need are kept and shuffled"
)


def read_streaming(account: Account, key: str = "streaming") -> None:
    """Take the key; data and steps have been taken before."""
    if account.peek(key) is not None and not is_on(account.peek(key)):
        account.same(key, "rows are read whole, as without the key")
    reason = _hindrance(account)
    if reason:
        account.leave(key, reason)
    account.carry(key, "data.streaming", boolean, _ORDER)


def _hindrance(account: Account) -> str:
    """Why the data of this file is not streamed, empty where it is."""
    train, held_out = (_listed(account.values.get(key, [])) for key in ("data.train", "data.eval"))
    if "training.max_steps" not in account.values:
        return "streaming needs `training.max_steps`, which says how many rows to read"
    if any(is_local_path(path) for path in train):
        return "local files are read where they are and tokenized into the cache"
    if len(train) != 1:
        return "rows are streamed from one dataset; no key says how many each of several gives"
    if not all(is_local_path(path) for path in held_out):
        return "rows to evaluate on are not streamed, and those on the hub would be downloaded whole"
    return ""


def _listed(paths: str | list[str]) -> list[str]:
    return [paths] if isinstance(paths, str) else paths
