"""The tensors of a checkpoint's file, read the same way for every backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from soup_xb.core.errors import CheckpointError

Array = np.ndarray[Any, Any]


def read_tensors(file: Path) -> dict[str, Array]:
    """Name -> array of a safetensors file. Raises CheckpointError for one that is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors: dict[str, Array] = load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError("damaged-checkpoint", f"cannot be read: {error}", where=str(file)) from error
    return tensors


def grouped(tensors: dict[str, Array], separator: str) -> dict[str, dict[str, Array]]:
    """`name<separator>part` -> name -> part -> array, split at the last separator."""
    groups: dict[str, dict[str, Array]] = {}
    for key, array in tensors.items():
        name, _, part = key.rpartition(separator)
        groups.setdefault(name, {})[part] = array
    return groups
