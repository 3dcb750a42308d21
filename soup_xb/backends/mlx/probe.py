"""What a live layer adds to its base, measured one layer at a time on the inputs of core.adapter.probe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from soup_xb.backends.mlx.adapters import Adapters
from soup_xb.backends.mlx.quantization import dequantized_weight
from soup_xb.core.adapter.probe import LayerDelta, probe_inputs
from soup_xb.core.base.modules import AdapterModule

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
