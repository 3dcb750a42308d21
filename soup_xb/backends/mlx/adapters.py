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
from attrs import frozen
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear
from safetensors.numpy import save_file

from soup_xb.core.adapter.peft_file import check_factors
from soup_xb.core.adapter.pieces import Piece, difference
from soup_xb.core.adapter.plan import AdapterPlan
from soup_xb.core.adapter.starts import Start, random_factor
from soup_xb.core.base.modules import AdapterModule
from soup_xb.core.base.proven import Part
from soup_xb.core.errors import CheckpointError, ModelError, Problem
from soup_xb.core.run.checkpoint import check_pairs, grouped, read_tensors

Factors = Mapping[str, Mapping[str, np.ndarray[Any, Any]]]
Arrays = dict[str, mx.array]


class Adapters:
    """The adapters of one model, by PEFT's module names.

    `values` are the trained arrays as `module.factor`, in mlx-lm's shapes, in the plan's order. `layers` are the LoRA
    layers of each module: several where mlx-lm has its rows in modules of their own, which share one A.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: AdapterPlan,
        places: Mapping[str, tuple[Part, ...]],
        starts: Mapping[str, Start],
    ) -> None:
        """Wrap the planned modules and begin at `starts`. `places` maps PEFT's to mlx-lm's names."""
        self.plan = plan
        self.model = model
        self.places = {adapter.name: places[adapter.name] for adapter in plan.modules}
        self.layers: dict[str, tuple[Any, ...]] = {}
        self.values: Arrays = {}
        self._linears = {
            name: tuple(submodule(model, part.place) for part in parts) for name, parts in self.places.items()
        }
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
        for index, (name, layers) in enumerate(self.layers.items()):
            magnitude = values.get(f"{name}.lora_magnitude_vector")
            for layer, share in zip(layers, self.shares(name), strict=True):
                layer.lora_a, layer.lora_b = share.of(values[f"{name}.lora_A"], values[f"{name}.lora_B"])
                if magnitude is not None:
                    layer.m = share.rows(magnitude)
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
        shapes = {name: factor_to_numpy(array).shape for name, array in self.values.items()}
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
        self.detach_layers()
        try:
            yield
        finally:
            for name, layers in self.layers.items():
                for part, layer in zip(self.places[name], layers, strict=True):
                    replace_module(self.model, part.place, layer)

    def detach_layers(self) -> None:
        """Put the base's own modules back; the layers stay known."""
        for name, layers in self.layers.items():
            for part, layer in zip(self.places[name], layers, strict=True):
                replace_module(self.model, part.place, layer.linear)

    def detach(self) -> None:
        """Take the layers off for good."""
        self.detach_layers()
        self.layers = {}

    def shares(self, name: str) -> tuple[Share, ...]:
        """Which rows of a module each of its layers has."""
        return shares_of(self.places[name], self._linears[name])

    def without_dropout(self, model_type: str) -> tuple[Problem, ...]:
        """What to know of a dropout that some layers do not have, as PEFT's of 3-D weights have none."""
        bare = [
            name for name, layers in self.layers.items() if not isinstance(layers[0], LoRALinear | DoRALinear)
        ]
        if self.plan.dropout == 0 or not bare:
            return ()
        text = (
            f"{model_type}: dropout {self.plan.dropout:g} is off on {len(bare)} weights of experts and of latent "
            f"attention, first `{bare[0]}`, and stays on {len(self.layers) - len(bare)} other modules"
        )
        return (Problem("expert-dropout", text),)

    def _factor_names(self) -> tuple[str, ...]:
        return ("lora_A", "lora_B", "lora_magnitude_vector") if self.plan.use_dora else ("lora_A", "lora_B")

    def _wrap(self, adapter: AdapterModule) -> None:
        linears, start = self._linears[adapter.name], self.starts.get(adapter.name)
        a = factor_from_numpy(start.a if start else random_factor(adapter, self.plan.seed))
        b = factor_from_numpy(start.b if start else np.zeros(adapter.b_shape, np.float32))
        self.values |= {f"{adapter.name}.lora_A": a, f"{adapter.name}.lora_B": b}
        layers, magnitudes = [], []
        for linear, share in zip(linears, self.shares(adapter.name), strict=True):
            # A compiled step takes constants that are known, and that are no arguments of it.
            begins = None
            if start is not None:
                begins = share.of(factor_from_numpy(start.a), factor_from_numpy(start.b))
                mx.eval(begins)
            layer = self._layer(adapter, linear, share, begins)
            layer.dropout = KeyedDropout(self.plan.dropout)
            layer.lora_a, layer.lora_b = share.of(a, b)
            replace_module(self.model, share.part.place, layer)
            linear.freeze()
            layers.append(layer)
            magnitudes += [layer.m] if self.plan.use_dora else []
        if magnitudes:
            self.values[f"{adapter.name}.lora_magnitude_vector"] = mx.concatenate(magnitudes)
        self.layers[adapter.name] = tuple(layers)

    def _layer(
        self, adapter: AdapterModule, linear: Any, share: Share, start: tuple[mx.array, mx.array] | None
    ) -> Any:
        if share.part.heads and self.plan.use_dora:
            raise ModelError(
                "dora-on-heads",
                f"`{adapter.name}` is a matrix for each head in mlx-lm, which has no DoRA",
                where="training.lora.use_dora",
                help="name modules that leave it out, remove `use_dora`, or run with --backend torch.",
            )
        if share.part.heads:
            return HeadsLora(linear, adapter.scale, share.part.heads, start)
        if adapter.experts:
            return ExpertLora(linear, adapter.scale, start)
        sizes = (adapter.in_features, share.count, adapter.rank)
        if start is not None:
            return StartedLinear(linear, sizes, adapter.scale, start)
        layer: Any
        if self.plan.use_dora:
            layer = DoRALinear(*sizes, 0.0, adapter.scale)
            layer.set_linear(linear)
        else:
            layer = LoRALinear(*sizes, 0.0, adapter.scale)
            layer.linear = linear
        return layer


@frozen(eq=False)
class Share:
    """Which of a module's rows one of its places in mlx-lm holds: `count` from `first` on, or every `step`-th.

    `scales` multiply the rows there, (count,), where mlx-lm keeps them scaled; None for 1.
    """

    part: Part
    first: int
    count: int
    step: int = 1
    scales: mx.array | None = None

    def of(self, a: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
        """A and B of the layer there, out of the module's: (…, in, rank) and (…, rank, rows)."""
        if self.part.heads:
            return a, self._of_heads(b)
        if self.part.turned and a.ndim == 3:
            # PEFT takes the outputs for the inputs.
            return b.swapaxes(-1, -2), self._cut(a.swapaxes(-1, -2))
        return a, self._cut(b)

    def back(self, weights: mx.array) -> mx.array:
        """The rows of the module's own weight that are at the place, (…, count, in): heads one after the other."""
        if self.part.heads == "keys":
            weights = weights.swapaxes(-1, -2)
        return weights if self.scales is None else weights / self.scales[:, None]

    def rows(self, values: mx.array) -> mx.array:
        """Of values of each row (rows,) those of the place."""
        return self._cut(values)

    def _cut(self, b: mx.array) -> mx.array:
        whole = self.count == b.shape[-1]
        cut = b if whole else b[..., self.first : self.first + self.count * self.step : self.step]
        return cut if self.scales is None else cut * self.scales

    def _of_heads(self, b: mx.array) -> mx.array:
        """(rank, heads * (keys + values)) -> (heads, rank, count)."""
        heads = self.count // self.step
        each = b.reshape(b.shape[0], heads, -1).swapaxes(0, 1)
        return each[..., : self.step] if self.part.heads == "keys" else each[..., -self.step :]


def shares_of(parts: tuple[Part, ...], linears: tuple[Any, ...]) -> tuple[Share, ...]:
    """The rows that each of a module's places holds; `linears` are the modules there."""
    shares, first = [], 0
    for part, linear in zip(parts, linears, strict=True):
        shape = linear.weight.shape
        scales = getattr(linear, "_row_scales", None)
        if part.heads:
            # Of `count` rows in all each head has `step`.
            width = multi_linear_sides(linear)[1 if part.heads == "keys" else 0]
            shares.append(Share(part, 0, shape[0] * width, width))
            continue
        count = shape[-2]
        step = part.of if part.interleaved else 1
        shares.append(Share(part, part.index if part.interleaved else first, count, step, scales))
        first += count
    return tuple(shares)


def multi_linear_sides(linear: Any) -> tuple[int, int]:
    """(out, in) of each head's matrix, of a quantized one too."""
    _, out, width = linear.weight.shape
    return out, width * 32 // linear.bits if "scales" in linear else width


class HeadsLora(nn.Module):
    """LoRA on one half of a latent attention's `kv_b_proj`, which mlx-lm keeps as a matrix for each head.

    `embed_q` are the rows of the keys, turned: (heads, latent, keys). `unembed_out` those of the values:
    (heads, values, latent). A is (latent, rank), `lora_b` (heads, rank, keys or values).
    """

    def __init__(self, linear: Any, scale: float, half: str, start: tuple[mx.array, mx.array] | None) -> None:
        """Wrap `linear`; the factors are set later."""
        super().__init__()
        self.linear, self.scale, self.half = linear, scale, half
        self._start = start

    def __call__(self, x: mx.array, transpose: bool = True) -> mx.array:
        """(…, heads or 1, length, in) -> (…, heads, length, out)."""
        a, b = _beside(self.lora_a, self.lora_b, self._start)
        turned = self.half == "keys" and transpose
        added = (x @ b.swapaxes(-1, -2)) @ a.T if turned else (x @ a) @ b
        return self.linear(x, transpose=transpose) + (self.scale * added).astype(x.dtype)


class ExpertLora(nn.Module):
    """LoRA on a stack of experts: A (experts, in, rank), B (experts, rank, out)."""

    def __init__(self, linear: Any, scale: float, start: tuple[mx.array, mx.array] | None) -> None:
        """Wrap `linear`; the factors are set later."""
        super().__init__()
        self.linear, self.scale = linear, scale
        self._start = start

    def added_weight(self) -> mx.array:
        """What the layer adds to a weight (experts, in, out)."""
        a, b = _beside(self.lora_a, self.lora_b, self._start)
        return self.scale * (a @ b)

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """What mlx-lm's SwitchLinear gives, and what the experts of `indices` add."""
        a, b = _beside(self.lora_a, self.lora_b, self._start)
        down = mx.gather_mm(x, a, rhs_indices=indices, sorted_indices=sorted_indices)
        added = mx.gather_mm(down, b, rhs_indices=indices, sorted_indices=sorted_indices)
        y = self.linear(x, indices, sorted_indices=sorted_indices)
        return y + (self.scale * added).astype(x.dtype)


def _beside(a: mx.array, b: mx.array, start: tuple[mx.array, mx.array] | None) -> tuple[mx.array, mx.array]:
    """A and B; beside a start [A, A - A0] and [B - B0; B0], whose product is B A - B0 A0."""
    if start is None:
        return a, b
    return mx.concatenate([a, a - start[0]], axis=-1), mx.concatenate([b - start[1], start[1]], axis=-2)


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

    def __init__(
        self, linear: Any, sizes: tuple[int, int, int], scale: float, start: tuple[mx.array, mx.array]
    ) -> None:
        """Wrap `linear` of `sizes` (in, out, rank); the factors, (in, rank) and (rank, out), are set later."""
        super().__init__(*sizes, 0.0, scale)
        self.linear = linear
        # Underscores keep them out of the parameters: they are constants, as the base's weights are.
        self._start_a, self._start_b = start

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


def factor_to_numpy(array: mx.array) -> np.ndarray[Any, Any]:
    """A factor (or a moment of it) as float32 in PEFT's shape: A (…, rank, in), B (…, out, rank)."""
    plain = np.array(array.astype(mx.float32), copy=True)
    return np.ascontiguousarray(plain.swapaxes(-1, -2) if plain.ndim > 1 else plain)


def factor_from_numpy(array: np.ndarray[Any, Any]) -> mx.array:
    """A factor in PEFT's shape as mlx-lm keeps it."""
    plain = np.asarray(array, dtype=np.float32)
    return mx.array(np.ascontiguousarray(plain.swapaxes(-1, -2) if plain.ndim > 1 else plain))


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
