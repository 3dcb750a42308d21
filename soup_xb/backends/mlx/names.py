"""PEFT's names and shapes and mlx-lm's, side by side.

A factor is named `module.lora_A`; mlx-lm keeps it in the layer as `lora_a`, transposed: A (in, rank), B (rank, out).
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

ATTRIBUTES = {"lora_A": "lora_a", "lora_B": "lora_b", "lora_magnitude_vector": "m"}


def mlx_name(name: str, prefixes: tuple[tuple[str, str], ...]) -> str:
    """A module's name in mlx-lm; `prefixes` are pairs of transformers' and mlx-lm's beginnings.

    >>> mlx_name("model.language_model.norm", (("model.language_model.", "language_model.model."),))
    'language_model.model.norm'
    """
    for theirs, ours in prefixes:
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    return name


def peft_name(name: str, prefixes: tuple[tuple[str, str], ...]) -> str:
    """A module's name in transformers and PEFT."""
    return mlx_name(name, tuple((ours, theirs) for theirs, ours in prefixes))


def factor_to_numpy(array: mx.array) -> np.ndarray[Any, Any]:
    """A factor (or a moment of it) as float32 in PEFT's shape: A (rank, in), B (out, rank)."""
    plain = np.array(array.astype(mx.float32), copy=True)
    return np.ascontiguousarray(plain.T)


def factor_from_numpy(array: np.ndarray[Any, Any]) -> mx.array:
    """A factor in PEFT's shape as mlx-lm keeps it."""
    return mx.array(np.ascontiguousarray(np.asarray(array, dtype=np.float32).T))
