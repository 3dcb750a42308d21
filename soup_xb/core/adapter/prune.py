"""Which entries of a factor a ReLoRA prune takes away."""

from __future__ import annotations

from typing import Any

import numpy as np

from soup_xb.core.run.schedule import floor_share

Array = np.ndarray[Any, Any]


def smallest_entries(values: Array, ratio: float) -> Array:
    """A bool mask, in the shape of `values`, of exactly floor(size * ratio) entries of smallest magnitude.

    Among equals the lowest index, in row-major order, goes first.

    >>> smallest_entries(np.array([[1.0, -1.0], [0.5, -1.0]]), 0.5)
    array([[ True, False],
           [ True, False]])
    """
    sizes = np.abs(values).reshape(-1)
    count = floor_share(sizes.size, ratio)
    mask = np.zeros(sizes.size, dtype=np.bool_)
    if count:
        limit = np.partition(sizes, count - 1)[count - 1]
        mask = sizes < limit
        mask[np.flatnonzero(sizes == limit)[: count - int(mask.sum())]] = True
    return mask.reshape(values.shape)


def prune(values: Array, ratio: float, start: Array | None = None) -> tuple[Array, int]:
    """The factor with its smallest entries at zero, and their number.

    Under pissa and olora `start` is the factor's initial value, which holds base weight: what is small there is
    the entry's distance from it, and a pruned entry goes back to it.
    """
    mask = smallest_entries(values if start is None else values - start, ratio)
    back = np.zeros((), values.dtype) if start is None else start
    return np.where(mask, back, values), int(mask.sum())
