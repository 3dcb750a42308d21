"""Contradictions between keys, keys without effect unless another one is set, and warnings."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from attrs import frozen

from soup_xb.core.config.rules import LORA_RULES, SHARDING_RULES
from soup_xb.core.config.run_rules import REWARD_RULES, RUN_RULES, STREAMING_RULES, reads_pattern
from soup_xb.core.config.schema import KEYS, Config, LoadedConfig, value_of
from soup_xb.core.errors import Problem
from soup_xb.core.tasks import tasks_with


@frozen
class Dependence:
    """`key` counts only where the value of `on` is one of `values` (or, with `absent`, none of them)."""

    key: str
    on: str
    values: tuple[Any, ...]
    absent: bool = False
    help: str = ""

    def met(self, config: Config) -> bool:
        """Whether the key counts in this config."""
        return (value_of(config, self.on) in self.values) != self.absent

    def problem(self, loaded: LoadedConfig) -> Problem | None:
        """What to say about a key that is written and does not count."""
        if self.key not in loaded.written or self.met(loaded.config):
            return None
        return Problem(
            "key-without-effect", f"has no effect {self._state()}", loaded.where(self.key), self.help
        )

    def _state(self) -> str:
        if self.values == (None,):
            return f"without `{self.on}`" if self.absent else f"beside `{self.on}`"
        if self.values == (False,):
            return f"beside `{self.on}`"
        values = " or ".join(f"`{value}`" for value in self.values)
        return f"unless `{self.on}` is {values}"


def _beside(on: str, *keys: str, help: str) -> tuple[Dependence, ...]:
    return tuple(Dependence(key, on, (None,), absent=True, help=help) for key in keys)


def _only(on: str, value: str, *keys: str, help: str) -> tuple[Dependence, ...]:
    return tuple(Dependence(key, on, (value,), help=help) for key in keys)


DEPENDENCES = (
    Dependence(
        "training.rope_scaling.factor",
        "training.rope_scaling.type",
        ("linear", "dynamic", "yarn"),
        help="write `training.rope_scaling.type` too, or remove this key.",
    ),
    *_only(
        "training.rope_scaling.type",
        "yarn",
        "training.rope_scaling.original_max_position_embeddings",
        help="remove this key: only yarn asks for that length.",
    ),
    *_beside(
        "training.relora_steps",
        "training.relora_warmup_ratio",
        "training.relora_prune_ratio",
        "training.relora_reset_optimizer",
        "training.relora_mode",
        "training.relora_rewarm_steps",
        help="write `training.relora_steps` too, or remove this key.",
    ),
    *_only(
        "training.sharding",
        "fsdp",
        "training.cpu_offload",
        help="write `sharding: fsdp` too, or remove this key.",
    ),
    *_only(
        "training.relora_mode",
        "prune",
        "training.relora_prune_ratio",
        help="a merge prunes nothing: remove this key, or write `relora_mode: prune`.",
    ),
    *_only(
        "training.relora_mode",
        "merge",
        "training.relora_rewarm_steps",
        help="a prune keeps the schedule: remove this key, or write `relora_mode: merge`.",
    ),
    *_only(
        "training.optimizer",
        "adamw",
        "training.adam_beta1",
        "training.adam_beta2",
        "training.adam_epsilon",
        help="remove this key, or write `optimizer: adamw`.",
    ),
    *_beside(
        "training.save_steps",
        "training.save_total_limit",
        help="write `training.save_steps` too, or remove this key.",
    ),
    # Keys of tasks: see core.tasks.
    *(
        Dependence(key, "task", tasks, help="remove this key: the task does not read it.")
        for key in KEYS
        if (tasks := tasks_with(key))
    ),
    Dependence(
        "training.warmup_ratio",
        "training.warmup_steps",
        (None,),
        help="keep one of the two; both say the same.",
    ),
)
# What does not count here is told as a warning: `max_steps` and `use_vera` are often set for a trial of a whole file.
OVERRULED = (
    Dependence(
        "training.epochs",
        "training.max_steps",
        (None,),
        help="`max_steps` alone decides; remove one of the two.",
    ),
    Dependence(
        "training.lora.alpha",
        "training.lora.use_vera",
        (False,),
        help="VeRA has no alpha: its trained vectors scale. Remove one of the two.",
    ),
)


def counts(config: Config, key: str) -> bool:
    """Whether a key means something beside the other values of this config."""
    if key == "training.answer_pattern" and not reads_pattern(config):
        return False
    return all(dependence.met(config) for dependence in DEPENDENCES + OVERRULED if dependence.key == key)


RULES = (
    *LORA_RULES,
    *RUN_RULES,
    *REWARD_RULES,
    *SHARDING_RULES,
    *STREAMING_RULES,
)


def contradictions(loaded: LoadedConfig, faulty: Collection[str] = ()) -> list[Problem]:
    """Every pair of keys that cannot both hold; `faulty` keys were refused already and are left out."""
    found = [
        dependence.problem(loaded)
        for dependence in DEPENDENCES
        if dependence.key not in faulty and dependence.on not in faulty
    ]
    # A key that is off for two reasons is told once.
    told = {problem.where: problem for problem in reversed(found) if problem is not None}
    return [*told.values(), *_run(loaded, faulty, warning=False)]


def warnings(loaded: LoadedConfig) -> list[Problem]:
    """What is allowed and may still be a mistake."""
    found = [dependence.problem(loaded) for dependence in OVERRULED]
    return [problem for problem in found if problem is not None] + _run(loaded, (), warning=True)


def _run(loaded: LoadedConfig, faulty: Collection[str], warning: bool) -> list[Problem]:
    return [
        problem
        for rule in RULES
        if rule.warning == warning and not set(rule.keys) & set(faulty)
        for problem in rule.check(loaded)
    ]
