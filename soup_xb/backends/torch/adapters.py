"""LoRA layers on a transformers model: PEFT's layers, core's decisions."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from transformers.pytorch_utils import Conv1D

from soup_xb.core.adapter_file import check_factors
from soup_xb.core.errors import ModelError
from soup_xb.core.factors import random_factor
from soup_xb.core.modules import AdapterModule
from soup_xb.core.session import AdapterPlan

ADAPTER = "default"
Factors = Mapping[str, Mapping[str, np.ndarray[Any, Any]]]


class Adapters:
    """The adapters of one model, by module name."""

    def __init__(self, model: Any, plan: AdapterPlan) -> None:
        """Wrap the planned modules; A starts with core's values, B at zero. Only factors require a gradient."""
        self.plan = plan
        _inject(model, plan)
        self.layers: dict[str, Any] = {
            name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)
        }
        self._check_reach(model)
        for adapter in plan.modules:
            self._start(adapter)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The trained tensors as `module.factor` -> parameter, in the plan's order."""
        return {
            f"{adapter.name}.{factor}": parameter
            for adapter in self.plan.modules
            for factor, parameter in _factors(self.layers[adapter.name]).items()
        }

    def factors(self) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
        """Copies of the factors, float32, in PEFT's shapes: A (rank, in), B (out, rank)."""
        return {
            adapter.name: {
                factor: parameter.detach().float().cpu().numpy().copy()
                for factor, parameter in _factors(self.layers[adapter.name]).items()
            }
            for adapter in self.plan.modules
        }

    def load(self, factors: Factors) -> None:
        """Set the factors. Raises ModelError when names or shapes do not fit."""
        mine = self.parameters()
        given = {
            f"{name}.{factor}": array for name, arrays in factors.items() for factor, array in arrays.items()
        }
        check_factors({name: tuple(tensor.shape) for name, tensor in mine.items()}, given)
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(torch.from_numpy(np.ascontiguousarray(given[name])))

    def train(self, training: bool) -> None:
        """Switch the adapters' dropout on or off; the base stays in evaluation mode."""
        for layer in self.layers.values():
            layer.lora_dropout.train(training)

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """Inside, the model is the base."""
        for layer in self.layers.values():
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.enable_adapters(True)
            for parameter in self.parameters().values():
                parameter.requires_grad_(True)

    def delta(self, name: str) -> torch.Tensor:
        """Scale * B A of one module, in the shape of its weight."""
        return self.layers[name].get_delta_weight(ADAPTER)

    def _check_reach(self, model: Any) -> None:
        planned = {adapter.name for adapter in self.plan.modules}
        if planned != set(self.layers):
            odd = sorted(planned.symmetric_difference(self.layers))
            raise ModelError(
                "adapters-astray",
                f"PEFT put adapters elsewhere than planned on `{model.config.model_type}`, first at `{odd[0]}`",
                where="training.lora.target_modules",
                help="name the modules with a pattern that leaves these out, and report this model.",
            )

    def _start(self, adapter: AdapterModule) -> None:
        layer = self.layers[adapter.name]
        layer.scaling[ADAPTER] = adapter.scale
        layer.lora_A[ADAPTER].weight.data = torch.from_numpy(random_factor(adapter, self.plan.seed)).to(
            layer.lora_A[ADAPTER].weight.device
        )
        layer.lora_B[ADAPTER].weight.data = layer.lora_B[ADAPTER].weight.data.float().zero_()
        for parameter in _factors(layer).values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def _inject(model: Any, plan: AdapterPlan) -> None:
    ranks = {adapter.name: adapter.rank for adapter in plan.modules}
    config = LoraConfig(
        r=plan.modules[0].rank,
        lora_alpha=plan.modules[0].alpha,
        lora_dropout=plan.dropout,
        target_modules=list(ranks),
        rank_pattern={re.escape(name): rank for name, rank in ranks.items() if rank != plan.modules[0].rank},
        use_rslora=plan.use_rslora,
        use_dora=plan.use_dora,
        bias="none",
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in ranks),
        init_lora_weights=True,
    )
    with warnings.catch_warnings():
        # PEFT switches fan_in_fan_out by itself where a model mixes both kinds of layer, and warns of it.
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)


def _factors(layer: Any) -> dict[str, torch.nn.Parameter]:
    factors = {"lora_A": layer.lora_A[ADAPTER].weight, "lora_B": layer.lora_B[ADAPTER].weight}
    if ADAPTER in layer.lora_magnitude_vector:
        factors["lora_magnitude_vector"] = layer.lora_magnitude_vector[ADAPTER].weight
    return factors
