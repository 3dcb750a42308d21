"""Settings of preference losses, under the name that each tool gives them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from soup_xb.core.config.checks import DEPENDENCES, PREFERENCES
from soup_xb.core.config.schema import KEYS
from soup_xb.migrate.account import Account
from soup_xb.migrate.values import number

_BETA, _GAMMA, _NOISE = "training.beta", "training.simpo_gamma", "training.label_smoothing"
_WEIGHTS = ("training.desirable_weight", "training.undesirable_weight")
_THERE = "the default there"

AXOLOTL_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "trl.beta": _BETA,
        "rl_beta": _BETA,
        "orpo_alpha": _BETA,
        "simpo_gamma": _GAMMA,
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
    beta = "ipo_tau" if task == "ipo" else f"{task}_beta"
    return {f"training.{beta}": _BETA, "training.simpo_gamma": _GAMMA}


def read_preferences(account: Account, names: Mapping[str, str]) -> None:
    """Take the settings of preference losses that count for the task; `names` gives ours for each of theirs.

    A setting of another task's loss is left. The defaults of simpo differ between the tools.
    """
    task = account.values.get("task", KEYS["task"].default)
    if task not in PREFERENCES:
        return
    for name, ours in names.items():
        if ours in account.values:
            account.leave(name, f"`{ours}` is set already")
        tasks = next(one.values for one in DEPENDENCES if one.key == ours)
        if task not in tasks:
            account.leave(name, f"it belongs to the loss of {' or '.join(tasks)}")
        account.carry(name, ours, number)
    if task == "simpo":
        account.add(_BETA, 0.1, _THERE)
        account.add(_GAMMA, 0.5, _THERE)
