"""LoRA layers on an mlx-lm model, and in a checkpoint: mlx-lm's layers, core's decisions.

A factor is named `module.lora_A`; mlx-lm keeps it in the layer as `lora_a`, transposed: A (in, rank), B (rank, out).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear
from safetensors.numpy import save_file

from soup_xb.core.adapter.peft_file import check_factors
from soup_xb.core.adapter.pieces import Piece, difference
from soup_xb.core.adapter.plan import AdapterPlan
from soup_xb.core.adapter.starts import Start, random_factor
from soup_xb.core.base.modules import AdapterModule
from soup_xb.core.errors import CheckpointError
from soup_xb.core.run.checkpoint import check_pairs, grouped, read_tensors

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


class KeyedDropout(nn.Module):
    """Dropout whose mask is a function of a key, so that recomputing a block for its gradient repeats it."""

    def __init__(self, rate: float) -> None:
        """Off until it has a key."""
        super().__init__()
        self.rate = rate
        self.set_key(None)

    @property
    def is_on(self) -> bool:
        """Whether it drops anything."""
        return self._key is not None and self.rate > 0.0

    def set_key(self, key: mx.array | None) -> None:
        """Switch dropout on with a key, off with None."""
        # MLX counts an array among a module's parameters unless its name begins with an underscore.
        self._key = key

    def __call__(self, x: mx.array) -> mx.array:
        """Zero entries at the rate and scale the others up, if there is a key."""
        if not self.is_on:
            return x
        keep = 1.0 - self.rate
        return mx.random.bernoulli(keep, x.shape, key=self._key) * (1.0 / keep) * x


class StartedLinear(LoRALinear):
    """mlx-lm's LoRA layer for factors that start with base weight in them.

    PiSSA and OLoRA freeze W - scale B0 A0 and train B A beside it. Here W itself stays, in whatever format, and the
    layer adds scale ((B - B0) A + B0 (A - A0)): the same function and the same gradients, exactly zero at the start.
    """

    def __init__(self, linear: Any, adapter: AdapterModule, start: Start) -> None:
        """Wrap `linear`; the factors, `lora_a` (in, rank) and `lora_b` (rank, out), are set later."""
        super().__init__(adapter.in_features, adapter.out_features, adapter.rank, 0.0, adapter.scale)
        self.linear = linear
        # Underscores keep them out of the parameters: they are constants, as the base's weights are.
        self._start_a, self._start_b = factor_from_numpy(start.a), factor_from_numpy(start.b)

    def __call__(self, x: mx.array) -> mx.array:
        """(…, in_features) -> (…, out_features).

        Dropout is in front of B A alone; B0 A0 sees all of the input, as the residual would.
        """
        if self.dropout.is_on:
            down = self.dropout(x) @ self.lora_a
            down = mx.concatenate([down, down - x @ self._start_a], axis=-1)
        else:
            down = x @ mx.concatenate([self.lora_a, self.lora_a - self._start_a], axis=1)
        up = mx.concatenate([self.lora_b - self._start_b, self._start_b])
        return self.linear(x) + (self.scale * (down @ up)).astype(x.dtype)


ATTRIBUTES = {"lora_A": "lora_a", "lora_B": "lora_b", "lora_magnitude_vector": "m"}


def factor_to_numpy(array: mx.array) -> np.ndarray[Any, Any]:
    """A factor (or a moment of it) as float32 in PEFT's shape: A (rank, in), B (out, rank)."""
    plain = np.array(array.astype(mx.float32), copy=True)
    return np.ascontiguousarray(plain.T)


def factor_from_numpy(array: np.ndarray[Any, Any]) -> mx.array:
    """A factor in PEFT's shape as mlx-lm keeps it."""
    return mx.array(np.ascontiguousarray(np.asarray(array, dtype=np.float32).T))


def walk(module: Any, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module with its dotted name, in the order in which the model declares them."""
    if isinstance(module, nn.Module):
        if name:
            yield name, module
        children: Any = module.children().items()
    elif isinstance(module, dict):
        children = module.items()
    elif isinstance(module, list | tuple):
        children = enumerate(module)
    else:
        return
    for key, child in children:
        yield from walk(child, f"{name}.{key}" if name else str(key))


def submodule(model: nn.Module, name: str) -> Any:
    """The module of that name."""
    module: Any = model
    for part in name.split("."):
        module = module[int(part)] if isinstance(module, list | tuple) else module[part]
    return module


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the module of that name."""
    parent, _, last = name.rpartition(".")
    owner = submodule(model, parent) if parent else model
    if isinstance(owner, list):
        owner[int(last)] = new
    else:
        setattr(owner, last, new)


FACTORS_FILE = "factors.safetensors"


def save_adapters(adapters: Adapters, folder: Path) -> None:
    """Write `module.factor` tensors: `lora_A`, `start_A` (pissa, olora), and B likewise."""
    flat: dict[str, np.ndarray[Any, Any]] = {}
    for name, arrays in adapters.trained().items():
        flat |= {f"{name}.{factor}": array for factor, array in arrays.items()}
        if start := adapters.starts.get(name):
            flat |= {f"{name}.start_A": start.a, f"{name}.start_B": start.b}
    save_file(flat, folder / FACTORS_FILE)


def load_adapters(adapters: Adapters, folder: Path) -> None:
    """Bring attached adapters to the state that was saved; starts are read, not computed again.

    Raises CheckpointError for a file that lacks a start, or holds merges that are part of the base since, and
    ModelError for factors that do not fit.
    """
    modules = grouped(read_tensors(folder / FACTORS_FILE), ".")
    trained = {
        name: {factor: array for factor, array in arrays.items() if factor.startswith("lora_")}
        for name, arrays in modules.items()
    }
    adapters.check(trained)
    for name, arrays in modules.items():
        check_pairs(arrays, folder / FACTORS_FILE)
        if "piece0_A" in arrays:
            raise _foreign(folder, f"`{name}` holds merges of restarts", "go on with --backend torch.")
        if name in adapters.starts and "start_A" not in arrays:
            raise _foreign(folder, f"`{name}` has no start")
    starts = {
        name: Start(arrays["start_A"], arrays["start_B"])
        for name, arrays in modules.items()
        if "start_A" in arrays
    }
    if starts:
        adapters.begin(starts)
    adapters.load(trained)


def _foreign(folder: Path, message: str, help: str = "") -> CheckpointError:
    return CheckpointError("foreign-checkpoint", message, where=str(folder / FACTORS_FILE), help=help)
