"""ReLoRA restarts of the adapters on a model: the prune form, and the paper's merge."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from soup_xb.backends.torch.adapters import Adapters
from soup_xb.core.adapter.pieces import prune
from soup_xb.core.adapter.plan import AdapterPlan
from soup_xb.core.adapter.starts import random_factor
from soup_xb.core.errors import ModelError
from soup_xb.core.run.session import RestartResult, RestartSettings


def restart_adapters(adapters: Adapters, settings: RestartSettings) -> RestartResult:
    """Prune the factors, or merge them into the base and begin new ones; the optimizer is the caller's.

    Every process holds the same factors, so that every process prunes the same entries.
    """
    if settings.mode == "merge":
        return _merge(adapters, settings.step)
    return _prune(adapters, settings.ratio)


def factor_names(adapters: Adapters) -> list[str]:
    """The trained tensors that a restart touches: A and B of each module, not DoRA's magnitudes."""
    return [
        f"{adapter.name}.{factor}" for adapter in adapters.plan.modules for factor in ("lora_A", "lora_B")
    ]


def check_mergeable(model: Any, plan: AdapterPlan) -> None:
    """Raise ModelError for a base whose weights cannot take an adapter in, before anything is trained."""
    if not plan.merges:
        return
    if getattr(model, "is_quantized", False):
        raise _unmergeable(
            "the base is quantized, and a merged weight does not fit into its format",
            "name the plain base, or use `relora_mode: prune`.",
        )
    planned = {adapter.name for adapter in plan.modules}
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        # An expert weight is planned by its own name, a linear layer's by the layer's.
        module = name if name in planned else name.rpartition(".")[0]
        other = owners.setdefault(id(parameter), module)
        if other != module and {other, module} & planned:
            raise _unmergeable(
                f"`{other}` and `{module}` share one weight, so that merging into one would change both",
                "leave the module out of `target_modules`, or use `relora_mode: prune`.",
            )


def _unmergeable(message: str, help: str) -> ModelError:
    return ModelError("merge-not-possible", message, where="training.relora_mode", help=help)


def _prune(adapters: Adapters, ratio: float) -> RestartResult:
    entries = pruned = 0
    parameters = adapters.parameters()
    for adapter in adapters.plan.modules:
        start = adapters.starts.get(adapter.name)
        for factor, first in (("lora_A", start.a if start else None), ("lora_B", start.b if start else None)):
            parameter = parameters[f"{adapter.name}.{factor}"]
            values, count = prune(parameter.detach().cpu().numpy(), ratio, first)
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(values))
            entries, pruned = entries + parameter.numel(), pruned + count
    return RestartResult(entries, pruned)


def _merge(adapters: Adapters, step: int) -> RestartResult:
    for adapter in adapters.plan.modules:
        adapters.fold(adapter.name, adapters.live_piece(adapter.name))
        zeros = np.zeros(adapter.b_shape, np.float32)
        adapters.begin(adapter.name, random_factor(adapter, adapters.plan.seed, step), zeros, None)
    factors = sum(adapter.parameters for adapter in adapters.plan.modules)
    return RestartResult(factors, 0)
