"""`reference.safetensors`: how probable the base finds every answer, computed once and kept beside the run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen

from soup_xb.core.disk import disk_errors, write_bytes
from soup_xb.core.objectives.objective import row_log_probabilities
from soup_xb.core.rows.batches import sequence_batches
from soup_xb.core.rows.row import Row
from soup_xb.core.run.session import Session

_PARTS = ("train", "evaluation")

Array = np.ndarray[Any, Any]


@frozen(eq=False)
class Reference:
    """Log-probabilities (nats) of the targets of every sequence under the base, float64 (rows, sequences of a row)."""

    train: Array
    evaluation: Array


def base_log_probabilities(
    session: Session, rows: Sequence[Row], sequences: int, batch_size: int, pad_id: int
) -> Array:
    """Log-probabilities of every answer of rows with so many sequences under the true base, the same on every process.

    Float64 (rows, sequences).
    """
    if session.scorer is None:
        raise RuntimeError(f"the {session.backend} session computes no log-probabilities")
    known = np.zeros(len(rows) * sequences)
    for places, batch in sequence_batches(rows, batch_size, pad_id, session.process, session.processes):
        # A process without an answer of a batch runs the model all the same.
        found = row_log_probabilities(session.scorer, batch)
        known[places] = found[: len(places)]
    return session.scorer.sum(known).reshape(len(rows), sequences)


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
