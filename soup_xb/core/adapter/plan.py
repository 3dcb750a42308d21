"""Which adapters a run attaches to its base, and the same in the words of PEFT's `adapter_config.json`."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from attrs import frozen

from soup_xb.core.base.modules import AdapterModule
from soup_xb.core.base.patterns import matching_names
from soup_xb.core.errors import ConfigError


@frozen
class AdapterPlan:
    """The adapters to attach, decided module by module. `merges`: restarts will fold them into the base.

    `task_type` is PEFT's word for what the adapted model does.
    """

    modules: tuple[AdapterModule, ...]
    dropout: float
    init_strategy: str
    use_rslora: bool
    seed: int
    merges: bool = False
    # What PEFT wraps the base in; None is its plain wrapper, which passes every argument on.
    task_type: str | None = "CAUSAL_LM"

    @property
    def use_dora(self) -> bool:
        """Whether the adapters train the magnitudes of their weights' rows too."""
        return any(module.dora for module in self.modules)

    @property
    def use_vera(self) -> bool:
        """Whether the adapters are VeRA's vectors on shared projections."""
        return any(module.vera for module in self.modules)


# Several thousand patterns over as many names take a few seconds; what takes longer was made to.
SECONDS_FOR_ALL = 20.0


def adapter_settings(plan: AdapterPlan, base: str, names: Sequence[str]) -> dict[str, Any]:
    """The content of `adapter_config.json`; `names` are the base's linear modules."""
    # PEFT warns that a pattern for experts matches nothing, though it follows it: the common rank is theirs.
    leading = [adapter for adapter in plan.modules if adapter.experts] or plan.modules
    rank = _most_common(adapter.rank for adapter in leading)
    alpha = _most_common(adapter.alpha for adapter in leading)
    linears = [adapter.name for adapter in plan.modules if not _is_parameter(adapter)]
    parameters = [target_name(adapter) for adapter in plan.modules if _is_parameter(adapter)]
    return {
        "peft_type": "LORA",
        "task_type": plan.task_type,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        # PEFT refuses to load an adapter on parameters with dropout, which matters to nobody but a trainer.
        "lora_dropout": 0.0 if parameters else plan.dropout,
        "target_modules": short_names(linears, names),
        **({"target_parameters": parameters} if parameters else {}),
        "rank_pattern": {
            re.escape(target_name(adapter)): adapter.rank for adapter in plan.modules if adapter.rank != rank
        },
        "alpha_pattern": {
            re.escape(target_name(adapter)): adapter.alpha
            for adapter in plan.modules
            if adapter.alpha != alpha
        },
        "use_rslora": plan.use_rslora,
        "use_dora": plan.use_dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }


def target_name(adapter: AdapterModule) -> str:
    """What PEFT calls the thing that the adapter sits on: a module, or a parameter by its full name."""
    return f"{adapter.name}.weight" if adapter.by_weight else adapter.name


def short_names(adapted: Sequence[str], names: Sequence[str]) -> list[str]:
    """Last name components where they reach the adapted modules and no other of `names`, else whole names."""
    lasts = sorted({name.rpartition(".")[2] for name in adapted})
    reached = {name for name in names if name.rpartition(".")[2] in lasts}
    return lasts if reached == set(adapted) else sorted(adapted)


def pattern_values(patterns: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The value of the first pattern that matches, for the names that one matches.

    Raises ConfigError for a pattern that is none, and where all of them together take too long.
    """
    values: dict[str, Any] = {}
    deadline = time.monotonic() + SECONDS_FOR_ALL
    for pattern, value in patterns.items():
        if time.monotonic() > deadline:
            raise ConfigError(
                "runaway-pattern", f"{len(patterns)} patterns take more than {SECONDS_FOR_ALL:g} s"
            )
        for name in matching_names(pattern, names):
            values.setdefault(name, value)
    return values


def _is_parameter(adapter: AdapterModule) -> bool:
    return bool(adapter.experts) or adapter.by_weight


def _most_common(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]
