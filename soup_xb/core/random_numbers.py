"""Random numbers as a function of names: the same on every machine, backend and NumPy version."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np


def uniform(count: int, *key: object) -> np.ndarray[Any, Any]:
    """`count` float64 numbers in [0, 1) that depend on `key` alone.

    A counter-based generator (Philox 4x64, Salmon et al. 2011) is keyed by a hash of `key`; its raw words are
    turned into numbers here, because NumPy promises to keep the words and not what its distributions do to them.
    """
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    raw = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(count: int, *key: object) -> np.ndarray[Any, Any]:
    """A shuffle of range(count), int64 (count,), that depends on `key` alone."""
    return np.argsort(uniform(count, *key), kind="stable")


def step_seed(seed: int, *key: object) -> int:
    """A 63-bit seed for an engine's own generator (dropout masks), so that a resumed step repeats it."""
    digest = hashlib.sha256("\0".join(map(str, (seed, *key))).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
