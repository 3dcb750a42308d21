"""The tensors of a checkpoint's file, read the same way for every backend."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from soup_xb.core.errors import CheckpointError

Array = np.ndarray[Any, Any]


def read_tensors(file: Path) -> dict[str, Array]:
    """Name -> float32 array of a safetensors file.

    Raises CheckpointError for one that is missing or damaged, and for tensors that no run wrote: of another type,
    or with values that are not finite.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors: dict[str, Array] = load_file(file)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError("checkpoint-damaged", f"cannot be read: {error}", where=str(file)) from error
    for name, array in tensors.items():
        if array.dtype != np.float32 or not np.isfinite(array).all():
            message = f"`{name}` is not a tensor of finite float32 numbers"
            raise CheckpointError("checkpoint-damaged", message, where=str(file))
    return tensors


def check_pairs(arrays: Mapping[str, Array], file: Path) -> None:
    """Raise CheckpointError where a pair beside `lora_A` and `lora_B` (`start_A`, `piece0_B`) is not their module's.

    Both are matrices, or stacks of them, with the module's sides and one rank of their own.
    """
    prefixes = {part[:-1] for part in arrays if part.endswith(("_A", "_B"))} - {"lora_"}
    width, height = arrays["lora_A"].shape[-1], arrays["lora_B"].shape[-2]
    stack = arrays["lora_A"].shape[:-2]
    for prefix in sorted(prefixes):
        a, b = arrays.get(f"{prefix}A"), arrays.get(f"{prefix}B")
        rank = b.shape[-1] if b is not None and b.ndim > 1 else 0
        sides = ((*stack, rank, width), (*stack, height, rank))
        if a is None or b is None or (a.shape, b.shape) != sides:
            message = f"`{prefix}A` and `{prefix}B` do not belong to their module"
            raise CheckpointError("foreign-checkpoint", message, where=str(file))


def grouped(tensors: dict[str, Array], separator: str) -> dict[str, dict[str, Array]]:
    """`name<separator>part` -> name -> part -> array, split at the last separator."""
    groups: dict[str, dict[str, Array]] = {}
    for key, array in tensors.items():
        name, _, part = key.rpartition(separator)
        groups.setdefault(name, {})[part] = array
    return groups
