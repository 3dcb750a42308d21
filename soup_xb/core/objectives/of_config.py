"""What a config's task optimizes, with the numbers that the file gives it."""

from __future__ import annotations

from typing import Any

from attrs import fields

from soup_xb.core.config.schema import JUDGED, PAIRED, SAMPLED, Config
from soup_xb.core.objectives.settings import OBJECTIVES

# Keys that carry their task's name.
_KEYS = {"gamma": "simpo_gamma", "scale": "embedding_scale"}


def objective_of(config: Config) -> Any:
    """The objective of a task that compares or rewards texts (see `settings`), None where tokens are learned.

    A key that the file leaves open has the objective's own default.
    """
    if config.task not in (*PAIRED, *JUDGED, "reward", *SAMPLED, "embedding"):
        return None
    kind = OBJECTIVES[config.task]
    names = [attribute.name for attribute in fields(kind)]
    asked = {name: getattr(config.training, _KEYS.get(name, name), None) for name in names}
    return kind(**{name: value for name, value in asked.items() if value is not None})
