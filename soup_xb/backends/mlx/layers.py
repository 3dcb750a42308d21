"""Layers beside a frozen linear one that mlx-lm does not have: keyed dropout, and LoRA with a start."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear

from soup_xb.backends.mlx.names import factor_from_numpy
from soup_xb.core.adapter.starts import Start
from soup_xb.core.base.modules import AdapterModule


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
