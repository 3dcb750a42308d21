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
    layer = adapters.layers[adapter.name]
    inputs = mx.array(probe_inputs(adapter.name, adapter.in_features))
    # Metal may round the factors of a float32 product to fewer bits.
    with mx.stream(mx.cpu):
        if adapters.plan.use_dora:
            return _dora_addition(layer, adapter, factors, inputs)
        with _on_base(layer, _Silent(adapter.out_features)):
            return LayerDelta(np.array(layer(inputs)), _ROUNDOFF)


class _Silent(nn.Module):
    """A base layer that gives zeros: what is left of an adapted layer's output is the adapter's, in full precision."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features

    def __call__(self, inputs: mx.array) -> mx.array:
        return mx.zeros((*inputs.shape[:-1], self.out_features), mx.float32)


@contextmanager
def _on_base(layer: Any, base: nn.Module) -> Iterator[None]:
    own, layer.linear = layer.linear, base
    try:
        yield
    finally:
        layer.linear = own


def _dora_addition(
    layer: Any, adapter: AdapterModule, factors: Mapping[str, Array], inputs: mx.array
) -> LayerDelta:
    """DoRA scales what the base gives, here a float32 copy of this one base layer, whatever its format."""
    weight = dequantized_weight(layer.linear)
    copy = nn.Linear(1, 1, bias="bias" in layer.linear)
    copy.weight = weight
    if "bias" in copy:
        copy.bias = layer.linear.bias.astype(mx.float32)
    with _on_base(layer, copy):
        added = layer(inputs) - copy(inputs)
    a, b = (mx.array(factors[name]) for name in ("lora_A", "lora_B"))
    norms = mx.linalg.norm(weight + adapter.scale * (b @ a), axis=1)
    return LayerDelta(
        np.array(added),
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
    layers = adapters.layers.values()
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
            # A base of vectors has the decoder's own names; its files may have those of the whole model.
            stored = next((key for key in _stored(adapters, name) if key in weights), None)
            if stored is not None:
                weights[stored] = _merged(adapters, name, weights[stored])
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


def _stored(adapters: Adapters, name: str) -> tuple[str, str]:
    return f"{name}.weight", f"{adapters.places[name]}.weight"


def _merged(adapters: Adapters, name: str, stored: mx.array) -> mx.array:
    layer = adapters.layers[name]
    weight = stored.astype(mx.float32)
    piece = adapters.piece(name)
    merged = weight + (layer.scale * mx.array(piece.b)) @ mx.array(piece.a)
    if adapters.plan.use_dora:
        merged = (layer.m / mx.linalg.norm(merged, axis=1))[:, None] * merged
    merged = merged.astype(stored.dtype)
    if not mx.isfinite(merged).all().item():
        raise beyond_format(name, str(stored.dtype).removeprefix("mlx.core."))
    return merged
