"""The processes of a run: joining those that mlx.launch started, and sums over all of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from attrs import frozen

from soup_xb.core.errors import ConfigError


@frozen
class Processes:
    """The place of this process among all; one alone outside mlx.launch."""

    process: int = 0
    processes: int = 1

    @property
    def many(self) -> bool:
        """Whether there is anyone to talk to."""
        return self.processes > 1

    def sum(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Each array's sum over all processes; one message for all of them."""
        if not self.many or not arrays:
            return dict(arrays)
        flat = mx.concatenate([array.astype(mx.float32).reshape(-1) for array in arrays.values()])
        flat = mx.distributed.all_sum(flat)
        summed, start = {}, 0
        for name, array in arrays.items():
            summed[name] = flat[start : start + array.size].reshape(array.shape)
            start += array.size
        return summed

    def sum_of_all(self, array: mx.array) -> mx.array:
        """The array's sum over all processes, for the trace of a step: the gradients of all come back summed too."""
        if not self.many:
            return array

        def summed(array: mx.array) -> mx.array:
            whole: mx.array = mx.distributed.all_sum(array)
            return whole

        shared: Any = mx.custom_function(summed)
        shared.vjp(lambda _primals, cotangent, _output: summed(cotangent))
        result: mx.array = shared(array)
        return result

    def sum_exactly(self, number: float) -> float:
        """A float64's sum over all processes, to about 48 bits: its float32 part and the rest travel apart."""
        if not self.many:
            return number
        high = np.float32(number)
        parts = np.array([[high, number - float(high)]], dtype=np.float32)
        return float(np.array(mx.distributed.all_gather(mx.array(parts))).astype(np.float64).sum())

    def largest(self, value: int) -> int:
        """The largest value over all processes."""
        if not self.many:
            return value
        return int(np.array(mx.distributed.all_max(mx.array([value], mx.int32)))[0])


def join_processes() -> Processes:
    """Join the processes that mlx.launch started. Raises ConfigError where they do not find each other."""
    if "MLX_RANK" not in os.environ:
        return Processes()
    try:
        group = mx.distributed.init(strict=True)
    except RuntimeError as error:
        raise ConfigError(
            "launch-failed",
            f"the processes do not find each other: {error}",
            where="environment",
            help="launch with `mlx.launch -n N -m soup_xb train FILE`.",
        ) from error
    return Processes(group.rank(), group.size())
