"""VeRA (arXiv:2310.11454): one frozen pair of random projections for all modules, and trained scaling vectors.

A module's weight gets diag(b) B diag(d) A. A is the first columns of the shared projection (rank, widest input), B the
first rows of the other one (largest output, rank), so that modules of different shapes share both, as in PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from soup_xb.core.base.modules import AdapterModule
from soup_xb.core.random_numbers import uniform

# Among factors by module name, the name that holds the projections: they belong to no module.
SHARED = ""
LAMBDA_START = 0.1

Array = np.ndarray[Any, Any]
Factors = Mapping[str, Mapping[str, Array]]


def first_factors(modules: Sequence[AdapterModule], seed: int) -> dict[str, dict[str, Array]]:
    """Where VeRA starts: d at 0.1, b at zero, so that the output is the base's, and the projections under `SHARED`.

    The projections are uniform with the Kaiming bound sqrt(6 / fan_in), as in the paper and PEFT. They depend on seed,
    rank and largest sizes, not on the order of modules.
    """
    rank, widest, largest = _sizes(modules)
    factors = {
        module.name: {
            "vera_lambda_d": np.full(rank, LAMBDA_START, np.float32),
            "vera_lambda_b": np.zeros(module.out_features, np.float32),
        }
        for module in modules
    }
    a = _projection(("vera_A", seed), (rank, widest))
    b = _projection(("vera_B", seed), (largest, rank))
    return {**factors, SHARED: {"vera_A": a, "vera_B": b}}


def shared_entries(modules: Sequence[AdapterModule]) -> int:
    """Entries of both projections, which are kept and not trained; 0 for modules of another kind."""
    if not any(module.vera for module in modules):
        return 0
    rank, widest, largest = _sizes(modules)
    return rank * (widest + largest)


def lora_pair(
    arrays: Mapping[str, Array], shared: Mapping[str, Array], in_features: int
) -> tuple[Array, Array]:
    """One module as a plain LoRA of scale 1, float32: diag(d) A (rank, in_features) and diag(b) B (out_features, rank).

    Exact but for the rounding of one product an entry.
    """
    d, b = arrays["vera_lambda_d"], arrays["vera_lambda_b"]
    return d[:, None] * shared["vera_A"][:, :in_features], b[:, None] * shared["vera_B"][: len(b)]


def _projection(key: tuple[object, ...], shape: tuple[int, int]) -> Array:
    bound = math.sqrt(6.0 / shape[1])
    values = uniform(shape[0] * shape[1], *key)
    return ((2.0 * values - 1.0) * bound).astype(np.float32).reshape(shape)


def _sizes(modules: Iterable[AdapterModule]) -> tuple[int, int, int]:
    """Rank, widest input and largest output."""
    modules = list(modules)
    return (
        modules[0].rank,
        max(module.in_features for module in modules),
        max(module.out_features for module in modules),
    )
