"""What an adapter adds to its layers: measured beside the base, and folded into the weights of a whole model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from soup_xb.backends.mlx.adapters import Adapters
from soup_xb.backends.mlx.load import Opened, read_arrays
from soup_xb.backends.mlx.quantization import dequantized_weight
from soup_xb.backends.mlx.starts import module_weight
from soup_xb.core.adapter.pieces import beyond_format
from soup_xb.core.adapter.probe import LayerDelta, probe_inputs
from soup_xb.core.base.folder import weight_files, write_index
from soup_xb.core.base.model_config import ConfigChanges
from soup_xb.core.base.modules import AdapterModule
from soup_xb.core.errors import ModelError

_ROUNDOFF = 2.0**-24

Array = np.ndarray[Any, Any]


def live_addition(adapters: Adapters, adapter: AdapterModule, factors: Mapping[str, Array]) -> LayerDelta:
    """See Session.addition."""
    inputs = mx.array(probe_inputs(adapter.name, adapter.in_features))
    # Metal may round the factors of a float32 product to fewer bits.
    with mx.stream(mx.cpu):
        if adapters.plan.use_dora:
            return _dora_addition(adapters, adapter, factors, inputs)
        return LayerDelta(np.array(_added(adapters, adapter, inputs)), _ROUNDOFF)


def _added(adapters: Adapters, adapter: AdapterModule, inputs: mx.array) -> mx.array:
    """What the module's layers add to zeros: (rows, out), of experts (experts, rows, out)."""
    layers, shares = adapters.layers[adapter.name], adapters.shares(adapter.name)
    if shares[0].part.turned and adapter.experts:
        pieces = mx.concatenate([layer.added_weight() for layer in layers], axis=-1)
        return inputs @ pieces.swapaxes(-1, -2)
    added = []
    for layer, share in zip(layers, shares, strict=True):
        with _on_base(layer, _Silent()):
            if adapter.experts:
                every = mx.broadcast_to(mx.arange(adapter.experts), (len(inputs), adapter.experts))
                outputs = layer(inputs[:, None, None], every)[:, :, 0].swapaxes(0, 1)
            elif share.part.heads:
                outputs = layer(inputs, transpose=share.part.heads == "values").swapaxes(0, 1)
            else:
                outputs = layer(inputs)
        added.append(outputs if share.scales is None else outputs / share.scales)
    if shares[0].part.heads:
        return mx.concatenate(added, axis=-1).reshape(len(inputs), -1)
    if shares[0].part.interleaved:
        return mx.stack(added, axis=-1).reshape(*added[0].shape[:-1], -1)
    return mx.concatenate(added, axis=-1)


class _Silent(nn.Module):
    """A base layer that gives zeros: what is left of an adapted layer's output is the adapter's, in full precision."""

    def __call__(self, *_inputs: Any, **_named: Any) -> mx.array:
        return mx.zeros((), mx.float32)


@contextmanager
def _on_base(layer: Any, base: nn.Module) -> Iterator[None]:
    own, layer.linear = layer.linear, base
    try:
        yield
    finally:
        layer.linear = own


def _dora_addition(
    adapters: Adapters, adapter: AdapterModule, factors: Mapping[str, Array], inputs: mx.array
) -> LayerDelta:
    """DoRA scales what the base gives, here a float32 copy of this one base layer, whatever its format."""
    added = []
    for layer in adapters.layers[adapter.name]:
        copy = nn.Linear(1, 1, bias="bias" in layer.linear)
        copy.weight = dequantized_weight(layer.linear)
        if "bias" in copy:
            copy.bias = layer.linear.bias.astype(mx.float32)
        with _on_base(layer, copy):
            added.append(layer(inputs) - copy(inputs))
    weight = module_weight(adapters.model, adapters.places[adapter.name], adapters.layers[adapter.name])
    a, b = (mx.array(factors[name]) for name in ("lora_A", "lora_B"))
    norms = mx.linalg.norm(weight + adapter.scale * (b @ a), axis=1)
    return LayerDelta(
        np.array(mx.concatenate(added, axis=-1)),
        _ROUNDOFF,
        base=np.array(inputs @ weight.T),
        base_roundoff=_ROUNDOFF,
        norms=np.array(norms),
    )


def write_merged(opened: Opened, adapters: Adapters, folder: Path) -> ConfigChanges:
    """Write the full model, weight + scale * B A, in the files, names and dtypes of the base.

    Gives what its config changes. Raises ModelError for a quantized base, whose rounded weights the sum does not fit
    into, and for a sum that the dtype cannot hold.
    """
    layers = [layer for each in adapters.layers.values() for layer in each]
    if opened.folder.quantization or any("scales" in layer.linear for layer in layers):
        raise ModelError(
            "merge-quantized",
            "the base is quantized, and a merged weight does not fit into its format",
            help="merge onto the plain base: run again with `--set training.quantization=none`.",
        )
    folder.mkdir(parents=True, exist_ok=True)
    left, files = set(adapters.layers), weight_files(opened.folder.path)
    places: dict[str, str] = {}
    size = 0
    for file in files:
        weights = read_arrays(file)
        places |= dict.fromkeys(weights, file.name)
        size += sum(array.nbytes for array in weights.values())
        for name in sorted(left):
            merged = _merged_tensors(adapters, name, weights)
            if merged:
                weights |= merged
                left.discard(name)
        mx.save_safetensors(str(folder / file.name), weights, metadata={"format": "pt"})
    if left:
        raise ModelError(
            "merge-misses-weight",
            f"the base's files hold {len(left)} adapted weights under other names, first `{min(left)}`",
            where=str(opened.folder.path),
            help="merge with --backend torch.",
        )
    if len(files) > 1:
        write_index(folder, places, size)
    return ConfigChanges(rope_parameters=opened.reading.stretched)


def _merged_tensors(adapters: Adapters, name: str, weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The tensors of a file that hold a module's weight, with what its adapter adds; empty where there are none.

    Files have transformers' layout and names, old or new; experts lie there as a stack, or one by one.
    """
    adapter = next(module for module in adapters.plan.modules if module.name == name)
    piece = adapters.piece(name)
    added = adapter.scale * mx.array(piece.b) @ mx.array(piece.a)
    # A base of vectors has the decoder's own names; its files may have those of the whole model.
    places = [
        f"{name}.weight",
        *(f"{part.place}.weight" for part in adapters.places[name][:1]),
        f"model.{name}.weight",
    ]
    if not adapter.experts:
        stored = next((key for key in places if key in weights), None)
        if stored is None:
            return {}
        turned = adapters.places[name][0].turned
        return {stored: _merged(adapters, name, weights[stored], added.T if turned else added)}
    if name in weights:
        same = weights[name].shape == added.shape and not adapters.places[name][0].interleaved
        return {name: _merged(adapters, name, weights[name], added if same else added.swapaxes(-1, -2))}
    stem, _, leaf = name.rpartition(".")
    kinds = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
    found = {}
    for expert in range(adapter.experts):
        for kind, rows in zip(kinds, mx.split(added[expert], len(kinds)), strict=True):
            key = f"{stem}.{expert}.{kind}.weight"
            if key in weights:
                found[key] = _merged(adapters, name, weights[key], rows)
    return found if len(found) == adapter.experts * len(kinds) else {}


def _merged(adapters: Adapters, name: str, stored: mx.array, added: mx.array) -> mx.array:
    if stored.shape != added.shape:
        raise RuntimeError(f"`{name}` is {stored.shape} in the file and {added.shape} in the adapter")
    merged = stored.astype(mx.float32) + added
    if adapters.plan.use_dora:
        turned = adapters.places[name][0].turned
        rows = merged.T if turned else merged
        magnitude = adapters.values[f"{name}.lora_magnitude_vector"]
        rows = (magnitude / mx.linalg.norm(rows, axis=1))[:, None] * rows
        merged = rows.T if turned else rows
    merged = merged.astype(stored.dtype)
    if not mx.isfinite(merged).all().item():
        raise beyond_format(name, str(stored.dtype).removeprefix("mlx.core."))
    return merged
