"""LoRA layers on an mlx-lm model: mlx-lm's layers, core's decisions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear

from soup_xb.backends.mlx.names import ATTRIBUTES, factor_from_numpy, factor_to_numpy
from soup_xb.backends.mlx.tree import replace_module, submodule
from soup_xb.core.adapter_file import check_factors
from soup_xb.core.factors import random_factor
from soup_xb.core.modules import AdapterModule
from soup_xb.core.session import AdapterPlan

Factors = Mapping[str, Mapping[str, np.ndarray[Any, Any]]]
Arrays = dict[str, mx.array]


class KeyedDropout(nn.Module):
    """Dropout whose mask is a function of a key, so that recomputing a block for its gradient repeats it."""

    def __init__(self, rate: float) -> None:
        """Off until it has a key."""
        super().__init__()
        self.rate = rate
        self.set_key(None)

    def set_key(self, key: mx.array | None) -> None:
        """Switch dropout on with a key, off with None."""
        # MLX counts an array among a module's parameters unless its name begins with an underscore.
        self._key = key

    def __call__(self, x: mx.array) -> mx.array:
        """Zero entries at the rate and scale the others up, if there is a key."""
        if self._key is None or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        return mx.random.bernoulli(keep, x.shape, key=self._key) * (1.0 / keep) * x


class Adapters:
    """The adapters of one model, by PEFT's module names.

    `values` are the trained arrays as `module.factor`, in mlx-lm's shapes, in the plan's order.
    """

    def __init__(self, model: nn.Module, plan: AdapterPlan, places: Mapping[str, str]) -> None:
        """Wrap the planned modules; A starts with core's values, B at zero. `places` maps PEFT's to mlx-lm's names."""
        self.plan = plan
        self.model = model
        self.places = {adapter.name: places[adapter.name] for adapter in plan.modules}
        self.layers: dict[str, Any] = {}
        self.values: Arrays = {}
        for adapter in plan.modules:
            self._wrap(adapter)
        mx.eval(self.values)

    def set(self, values: Arrays) -> None:
        """Make these the factors."""
        self.values = dict(values)
        self.place(self.values)

    def place(self, values: Mapping[str, mx.array], key: mx.array | None = None) -> None:
        """Put arrays (also those of a trace) into the layers; with a key dropout is on."""
        keys = None if key is None or self.plan.dropout == 0.0 else mx.random.split(key, len(self.layers))
        for index, (name, layer) in enumerate(self.layers.items()):
            for factor in self._factor_names():
                setattr(layer, ATTRIBUTES[factor], values[f"{name}.{factor}"])
            layer.dropout.set_key(None if keys is None else keys[index])

    def factors(self) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
        """Copies of the factors, float32, in PEFT's shapes: A (rank, in), B (out, rank)."""
        return {
            name: {
                factor: factor_to_numpy(self.values[f"{name}.{factor}"]) for factor in self._factor_names()
            }
            for name in self.layers
        }

    def load(self, factors: Factors) -> None:
        """Set the factors. Raises ModelError when names or shapes do not fit."""
        given = {
            f"{name}.{factor}": array for name, arrays in factors.items() for factor, array in arrays.items()
        }
        shapes = {name: tuple(reversed(array.shape)) for name, array in self.values.items()}
        check_factors(shapes, given)
        values = {name: factor_from_numpy(given[name]) for name in self.values}
        mx.eval(values)
        self.set(values)

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """Inside, the model is the base."""
        for name, layer in self.layers.items():
            replace_module(self.model, self.places[name], layer.linear)
        try:
            yield
        finally:
            for name, layer in self.layers.items():
                replace_module(self.model, self.places[name], layer)

    def detach(self) -> None:
        """Take the layers off for good."""
        for name, layer in self.layers.items():
            replace_module(self.model, self.places[name], layer.linear)
        self.layers = {}

    def _factor_names(self) -> tuple[str, ...]:
        return ("lora_A", "lora_B", "lora_magnitude_vector") if self.plan.use_dora else ("lora_A", "lora_B")

    def _wrap(self, adapter: AdapterModule) -> None:
        linear = submodule(self.model, self.places[adapter.name])
        if self.plan.use_dora:
            layer = DoRALinear(adapter.in_features, adapter.out_features, adapter.rank, 0.0, adapter.scale)
            layer.set_linear(linear)
        else:
            layer = LoRALinear(adapter.in_features, adapter.out_features, adapter.rank, 0.0, adapter.scale)
            layer.linear = linear
        layer.dropout = KeyedDropout(self.plan.dropout)
        layer.lora_a = factor_from_numpy(random_factor(adapter, self.plan.seed))
        layer.lora_b = mx.zeros((adapter.rank, adapter.out_features), mx.float32)
        self.layers[adapter.name] = layer
        for factor in self._factor_names():
            self.values[f"{adapter.name}.{factor}"] = getattr(layer, ATTRIBUTES[factor])
        replace_module(self.model, self.places[adapter.name], layer)
        linear.freeze()
