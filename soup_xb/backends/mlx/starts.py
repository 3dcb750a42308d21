"""PiSSA and OLoRA starts of a model's modules, from its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from soup_xb.backends.mlx.adapters import shares_of, submodule
from soup_xb.backends.mlx.processes import Processes
from soup_xb.backends.mlx.quantization import dequantized_weight
from soup_xb.core.adapter.plan import AdapterPlan
from soup_xb.core.adapter.starts import Start, stacked_start, weight_start
from soup_xb.core.base.modules import AdapterModule
from soup_xb.core.base.proven import Part
from soup_xb.core.errors import ModelError


class MlxAlgebra:
    """See soup_xb.core.adapter.starts.Algebra."""

    def array(self, values: np.ndarray[Any, Any]) -> mx.array:
        """A NumPy array as MLX's."""
        return mx.array(values)

    def numpy(self, matrix: mx.array) -> np.ndarray[Any, Any]:
        """A NumPy array of MLX's."""
        return np.array(matrix)

    def orthonormal(self, matrix: mx.array) -> mx.array:
        """Q of the thin QR."""
        return mx.linalg.qr(matrix)[0]

    def eigh(self, matrix: mx.array) -> tuple[mx.array, mx.array]:
        """Ascending eigenvalues and eigenvectors."""
        values, vectors = mx.linalg.eigh(matrix)
        return values, vectors

    def columns(self, blocks: list[mx.array]) -> mx.array:
        """Side by side."""
        return mx.concatenate(blocks, axis=1)


def weight_starts(
    model: Any, plan: AdapterPlan, places: Mapping[str, tuple[Part, ...]], processes: Processes
) -> dict[str, Start]:
    """The start of each planned module by name, empty for the random strategy; equal on every process.

    Each process does its share of the modules; `places` maps their names to mlx-lm's. Raises ModelError, on every
    process, for a weight that is not finite.
    """
    if plan.init_strategy == "random":
        return {}
    starts: dict[str, Start] = {}
    broken = 0
    # QR and eigh run on the CPU alone, and Metal may round the factors of a float32 product to fewer bits.
    with mx.stream(mx.cpu):
        for index in range(processes.process, len(plan.modules), processes.processes):
            adapter = plan.modules[index]
            weight = module_weight(model, places[adapter.name])
            # A sum is finite where every value is.
            if not math.isfinite(float(np.array(mx.sum(weight)))):
                broken = index + 1
                break
            start = stacked_start if adapter.experts else weight_start
            starts[adapter.name] = start(plan.init_strategy, weight, adapter, MlxAlgebra())
    # A process that stopped alone would leave the others waiting for its share.
    broken = processes.largest(broken)
    if broken:
        raise _not_finite(plan.modules[broken - 1])
    return _shared(starts, plan, processes) if processes.many else starts


def module_weight(model: Any, parts: tuple[Part, ...], layers: tuple[Any, ...] | None = None) -> mx.array:
    """The float32 weight (out, in) of a module of transformers, of experts (experts, out, in), as PEFT takes it.

    `layers` are the LoRA layers on it, where there are some.
    """
    linears = tuple(layer.linear for layer in layers or ()) or tuple(
        submodule(model, part.place) for part in parts
    )
    shares = shares_of(parts, linears)
    weights = [share.back(dequantized_weight(linear)) for share, linear in zip(shares, linears, strict=True)]
    if parts[0].heads:
        # Of each head the rows of its keys, then those of its values.
        heads = mx.concatenate(weights, axis=1)
        return heads.reshape(-1, heads.shape[-1])
    if parts[0].turned and weights[0].ndim == 3:
        return mx.concatenate([weight.swapaxes(-1, -2) for weight in weights], axis=-1)
    if parts[0].interleaved:
        rows = mx.stack(weights, axis=-2)
        return rows.reshape(*rows.shape[:-3], -1, rows.shape[-1])
    return weights[0] if len(weights) == 1 else mx.concatenate(weights, axis=-2)


def _not_finite(adapter: AdapterModule) -> ModelError:
    return ModelError(
        "non-finite-base",
        f"the weight of `{adapter.name}` has values that are not finite",
        help="the base is damaged: download it again.",
    )


def _shared(starts: dict[str, Start], plan: AdapterPlan, processes: Processes) -> dict[str, Start]:
    """Everyone's starts: each process adds its own to zeros."""
    arrays: dict[str, mx.array] = {}
    for adapter in plan.modules:
        zeros = Start(
            np.zeros(adapter.a_shape, np.float32),
            np.zeros(adapter.b_shape, np.float32),
        )
        start = starts.get(adapter.name, zeros)
        arrays |= {f"{adapter.name}.a": mx.array(start.a), f"{adapter.name}.b": mx.array(start.b)}
    summed = processes.sum(arrays)
    return {
        adapter.name: Start(*(np.array(summed[f"{adapter.name}.{factor}"]) for factor in "ab"))
        for adapter in plan.modules
    }
