"""Where an MLX run computes and in which precision, each with its reason."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
from attrs import frozen

from soup_xb.backends.mlx.blas import blas_in_use
from soup_xb.core.errors import ResourceError

_DTYPES = {"fp32": mx.float32, "bf16": mx.bfloat16}


@frozen
class Device:
    """A device (`gpu` for Metal, or `cpu`) and a precision, with the sentence that the run prints about them."""

    name: str
    precision: str
    reason: str

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of the base's weights and activations; adapter factors are always float32."""
        return _DTYPES[self.precision]

    @property
    def is_metal(self) -> bool:
        """Whether the run computes on Apple's GPU."""
        return self.name == "gpu"


def choose_device(precision: str) -> Device:
    """MLX's default device; `auto` is bf16 on Metal and float32 on a CPU."""
    metal = mx.default_device() == mx.gpu and mx.metal.is_available()
    place = "Metal" if metal else f"CPU, {blas_in_use().name}"
    asked = precision != "auto"
    if not asked:
        precision = "bf16" if metal else "fp32"
    because = "as the config says" if asked else f"`auto` on {'Metal' if metal else 'a CPU'}"
    return Device("gpu" if metal else "cpu", precision, f"{place}; {precision}, {because}")


def peak_memory_bytes(device: Device) -> int:
    """The most memory held so far: MLX's own on Metal, else this process's resident set."""
    if device.is_metal:
        return int(mx.get_peak_memory())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def memory_guard(doing: str) -> Iterator[None]:
    """Turn a lack of memory into a message with the ways out. Raises ResourceError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_memory(str(error)):
            raise
        raise ResourceError(
            "out-of-memory",
            f"out of memory while {doing}",
            help="lower `training.batch_size` (raise `gradient_accumulation_steps` to keep the step) or "
            "`data.max_length`, set `training.gradient_checkpointing: true`, or `training.quantization: 4bit`.",
        ) from error


def _is_memory(message: str) -> bool:
    return "allocate" in message or "out of memory" in message.lower() or "Insufficient Memory" in message
