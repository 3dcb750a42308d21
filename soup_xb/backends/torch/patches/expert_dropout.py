"""Experts and dropout: PEFT refuses to wrap a 3-D weight with a dropout, so that its wrapper is given none.

The wrapper adds B A to the weight, and no input of A's is there that could be dropped. It raises while it wraps: to
take the dropout off later would be too late, and to take it off the config would take it off every other module.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora.layer import ParamWrapper

from soup_xb.core.adapter.plan import AdapterPlan
from soup_xb.core.errors import Problem


@contextmanager
def expert_dropout(plan: AdapterPlan, model_type: str) -> Iterator[list[Problem]]:
    """Inside, PEFT's wrapper of 3-D weights gets a config without dropout; on every exit it is PEFT's own again.

    The list holds the line that tells of it once the block has ended. Nothing happens, and nothing is told, without
    expert weights or without a dropout.
    """
    notices: list[Problem] = []
    if plan.dropout == 0 or not any(adapter.experts for adapter in plan.modules):
        yield notices
        return
    wrap, stripped = ParamWrapper.__init__, []

    def wrap_without_dropout(
        self: Any, base_layer: Any, adapter_name: str, parameter_name: str, config: Any, **settings: Any
    ) -> None:
        own = copy.copy(config)
        own.lora_dropout = 0.0
        wrap(self, base_layer, adapter_name, parameter_name, config=own, **settings)
        stripped.append(parameter_name)

    ParamWrapper.__init__ = wrap_without_dropout
    try:
        yield notices
    finally:
        ParamWrapper.__init__ = wrap
    kept = len(plan.modules) - len(stripped)
    notices.append(
        Problem(
            "expert-dropout",
            f"{model_type}: dropout {plan.dropout:g} is off on {len(stripped)} expert weights, which PEFT wraps "
            f"without one, and stays on {kept} other modules",
        )
    )
