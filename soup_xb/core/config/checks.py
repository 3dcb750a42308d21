"""Contradictions between keys, and what is allowed but deserves a warning."""

from __future__ import annotations

from collections.abc import Collection

from soup_xb.core.config import run_rules
from soup_xb.core.config.dependences import DEPENDENCES, OVERRULED
from soup_xb.core.config.loaded import LoadedConfig
from soup_xb.core.errors import Problem
from soup_xb.core.rules import lora_rules, reward_rules, sharding_rules, streaming_rules

RULES = (
    *lora_rules.RULES,
    *run_rules.RULES,
    *reward_rules.RULES,
    *sharding_rules.RULES,
    *streaming_rules.RULES,
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
