"""`reference.safetensors`: how probable the base finds every answer, computed once and kept beside the run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen

from soup_xb.core.disk import disk_errors, write_bytes

_PARTS = ("train", "evaluation")

Array = np.ndarray[Any, Any]


@frozen(eq=False)
class Reference:
    """Log-probabilities (nats) of the targets of every sequence under the base, float64 (rows, sequences of a row)."""

    train: Array
    evaluation: Array


def reference_key(facts: Mapping[str, Any], base: Path) -> str:
    """What the values depend on, as a hash: data, base, precision, and the base's weight files by size and time."""
    files = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(base.glob("*.safetensors"))
    ]
    text = json.dumps({"facts": dict(facts), "weights": files}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_reference(path: Path, key: str, reference: Reference) -> None:
    """Put the file there in one piece. Raises ResourceError where the disk refuses."""
    from safetensors.numpy import save

    tensors = {name: np.ascontiguousarray(getattr(reference, name)) for name in _PARTS}
    data = save(tensors, metadata={"key": key, "sha256": _digest(tensors)})
    with disk_errors(path, len(data)):
        write_bytes(path, data)


def read_reference(path: Path, key: str, shapes: Mapping[str, tuple[int, ...]]) -> Reference | None:
    """The values of an earlier start of this run; None where there are none, or none that fit and are whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in _PARTS}
    except (OSError, SafetensorError):
        return None
    if metadata.get("key") != key or metadata.get("sha256") != _digest(tensors):
        return None
    fits = all(tensors[name].dtype == np.float64 and tensors[name].shape == shapes[name] for name in _PARTS)
    return Reference(**tensors) if fits else None


def _digest(tensors: Mapping[str, Array]) -> str:
    return hashlib.sha256(b"".join(tensors[name].tobytes() for name in _PARTS)).hexdigest()
