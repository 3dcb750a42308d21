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

from soup_xb.backends.mlx.layers import KeyedDropout, StartedLinear
from soup_xb.backends.mlx.names import ATTRIBUTES, factor_from_numpy, factor_to_numpy
from soup_xb.backends.mlx.tree import replace_module, submodule
from soup_xb.core.adapter.peft_file import check_factors
from soup_xb.core.adapter.pieces import Piece, difference
from soup_xb.core.adapter.plan import AdapterPlan
from soup_xb.core.adapter.starts import Start, random_factor
from soup_xb.core.base.modules import AdapterModule

Factors = Mapping[str, Mapping[str, np.ndarray[Any, Any]]]
Arrays = dict[str, mx.array]


class Adapters:
    """The adapters of one model, by PEFT's module names.

    `values` are the trained arrays as `module.factor`, in mlx-lm's shapes, in the plan's order.
    """

    def __init__(
        self, model: nn.Module, plan: AdapterPlan, places: Mapping[str, str], starts: Mapping[str, Start]
    ) -> None:
        """Wrap the planned modules and begin at `starts`. `places` maps PEFT's to mlx-lm's names."""
        self.plan = plan
        self.model = model
        self.places = {adapter.name: places[adapter.name] for adapter in plan.modules}
        self.layers: dict[str, Any] = {}
        self.values: Arrays = {}
        self._linears = {name: submodule(model, place) for name, place in self.places.items()}
        self.begin(starts)

    def begin(self, starts: Mapping[str, Start]) -> None:
        """Make new layers: a module in `starts` begins there, any other with core's random A and a B of zero."""
        self.starts = dict(starts)
        for adapter in self.plan.modules:
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
        """The adapter as a plain LoRA on the untouched base, float32, in PEFT's shapes: A (rank, in), B (out, rank)."""
        plain = self.trained()
        for name in self.starts:
            piece = self.piece(name)
            plain[name] |= {"lora_A": piece.a, "lora_B": piece.b}
        return plain

    def piece(self, name: str) -> Piece:
        """What the factors of a module add to its weight."""
        a, b = (factor_to_numpy(self.values[f"{name}.{factor}"]) for factor in ("lora_A", "lora_B"))
        return difference(a, b, self.starts.get(name))

    def trained(self) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
        """Copies of the trained arrays, float32, in PEFT's shapes."""
        return {
            name: {
                factor: factor_to_numpy(self.values[f"{name}.{factor}"]) for factor in self._factor_names()
            }
            for name in self.layers
        }

    def check(self, factors: Factors) -> None:
        """Raise ModelError when names or shapes of factors do not fit."""
        shapes = {name: tuple(reversed(array.shape)) for name, array in self.values.items()}
        check_factors(shapes, _flat(factors))

    def load(self, factors: Factors) -> None:
        """Set the trained arrays. Raises ModelError when names or shapes do not fit."""
        self.check(factors)
        given = _flat(factors)
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
        linear, start = self._linears[adapter.name], self.starts.get(adapter.name)
        layer = self._layer(adapter, linear)
        layer.dropout = KeyedDropout(self.plan.dropout)
        layer.lora_a = factor_from_numpy(start.a if start else random_factor(adapter, self.plan.seed))
        layer.lora_b = factor_from_numpy(
            start.b if start else np.zeros((adapter.out_features, adapter.rank), np.float32)
        )
        self.layers[adapter.name] = layer
        for factor in self._factor_names():
            self.values[f"{adapter.name}.{factor}"] = getattr(layer, ATTRIBUTES[factor])
        replace_module(self.model, self.places[adapter.name], layer)
        linear.freeze()

    def _layer(self, adapter: AdapterModule, linear: Any) -> Any:
        if start := self.starts.get(adapter.name):
            return StartedLinear(linear, adapter, start)
        sizes = (adapter.in_features, adapter.out_features, adapter.rank)
        if self.plan.use_dora:
            layer = DoRALinear(*sizes, 0.0, adapter.scale)
            layer.set_linear(linear)
        else:
            layer = LoRALinear(*sizes, 0.0, adapter.scale)
            layer.linear = linear
        return layer


def _flat(factors: Factors) -> dict[str, np.ndarray[Any, Any]]:
    return {f"{name}.{factor}": array for name, arrays in factors.items() for factor, array in arrays.items()}
