"""What the factors start from, the same on every backend: random values, or the base's weights (PiSSA and OLoRA).

The steps are written once, over the few operations of `Algebra`, so that backends differ in rounding alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
from attrs import frozen

from soup_xb.core.base.modules import AdapterModule
from soup_xb.core.random_numbers import uniform

Array = np.ndarray[Any, Any]

# One block wider than common ranks costs little, and close singular values need several columns to be told apart.
_SMALLEST_BLOCK = 16
# Real weights lose less than 1e-4 of their top energy at this depth; the few that lose more go on, in strides so
# long that rounding does not decide between two depths.
_DEPTH, _STRIDE = 12, 4
_LOST_ENERGY = 1e-4
_SMALLEST_VALUE = 1e-6
_TINY = float(np.finfo(np.float32).tiny)


class Algebra(Protocol):
    """Float32 matrices of a backend; `@`, `.T` and slices are its own."""

    def array(self, values: Array) -> Any:
        """A NumPy array as the backend's matrix."""

    def numpy(self, matrix: Any) -> Array:
        """The matrix as a float32 NumPy array."""

    def orthonormal(self, matrix: Any) -> Any:
        """Q of the thin QR of a tall matrix."""

    def eigh(self, matrix: Any) -> tuple[Any, Any]:
        """Eigenvalues, ascending, and eigenvectors (columns) of a symmetric matrix."""

    def columns(self, blocks: list[Any]) -> Any:
        """Matrices side by side."""


@frozen(eq=False)
class Start:
    """Where a module's factors start, float32: `a` (rank, in_features), `b` (out_features, rank); experts' stacked."""

    a: Array
    b: Array


def weight_start(strategy: str, weight: Any, adapter: AdapterModule, algebra: Algebra) -> Start:
    """The start of one module from its weight (out_features, in_features), float32 whatever the base's format.

    The factors depend on the weight alone, not on a seed. The largest entry of each left vector is positive.
    """
    return (_pissa if strategy == "pissa" else _olora)(weight, adapter, algebra)


def stacked_start(strategy: str, weights: Iterable[Any], adapter: AdapterModule, algebra: Algebra) -> Start:
    """The start of a stack of experts, each from its own weight (out_features, in_features)."""
    starts = [weight_start(strategy, weight, adapter, algebra) for weight in weights]
    return Start(np.stack([start.a for start in starts]), np.stack([start.b for start in starts]))


def top_directions(matrix: Any, rank: int, algebra: Algebra) -> Any:
    """Orthonormal columns (n, rank) of the largest singular values, in rising order, of a wide (n, m) matrix.

    A block Krylov basis with full reorthogonalisation (Musco and Musco, arXiv:1504.05477) where it is far smaller
    than n and its own estimate says that less than 1e-4 of the energy (the sum of squared singular values) of the
    exact directions is lost; otherwise the eigenvectors of the exact Gram matrix.
    """
    found = _krylov_directions(matrix, rank, algebra)
    return found if found is not None else _last(algebra.eigh(matrix @ matrix.T)[1], rank)


def _pissa(weight: Any, adapter: AdapterModule, algebra: Algebra) -> Start:
    """B A = U S V^T / scale of the top triplets (arXiv:2404.02948), the values' roots split between both."""
    tall = adapter.out_features > adapter.in_features
    matrix = weight.T if tall else weight
    inner = top_directions(matrix, adapter.rank, algebra)
    outer = algebra.numpy(matrix.T @ inner)[:, ::-1]
    inner = algebra.numpy(inner)[:, ::-1]
    values = np.linalg.norm(outer.astype(np.float64), axis=0)
    # A weight of lower rank has values of zero, which nothing may be divided by.
    values = np.maximum(values, max(_SMALLEST_VALUE * float(values.max()), _TINY))
    left, right = (outer / values, inner) if tall else (inner, outer / values)
    roots = np.sqrt(values / adapter.scale) * _signs(left)
    return Start(_float32((right * roots).T), _float32(left * roots))


def _olora(weight: Any, adapter: AdapterModule, algebra: Algebra) -> Start:
    """B A = Q Q^T W, Q of the first `rank` columns (arXiv:2406.01775): the full QR's first columns are the same."""
    left = algebra.orthonormal(weight[:, : adapter.rank])
    right = algebra.numpy(weight.T @ left)
    left = algebra.numpy(left)
    signs = _signs(left)
    return Start(_float32((right * signs).T), _float32(left * signs))


def _signs(left: Array) -> Array:
    largest = np.abs(left).argmax(axis=0)
    return np.where(left[largest, np.arange(left.shape[1])] < 0, -1.0, 1.0)


def _float32(values: Array) -> Array:
    return np.ascontiguousarray(values, dtype=np.float32)


def _krylov_directions(matrix: Any, rank: int, algebra: Algebra) -> Any | None:
    """The directions out of a Krylov basis; None where that would be no cheaper, or does not converge in time."""
    side, width = int(matrix.shape[0]), max(_SMALLEST_BLOCK, rank)
    if not _fits(side, width, _DEPTH):
        return None
    basis: list[Any] = [algebra.orthonormal(algebra.array(_random_block(side, width)))]
    images: list[Any] = [matrix.T @ basis[0]]
    energies: list[float] = []
    while _fits(side, width, len(basis) + 1):
        block = _next_block(algebra.columns(basis), matrix @ images[-1], algebra)
        basis.append(block)
        images.append(matrix.T @ block)
        if not _is_looked_at(len(basis)):
            continue
        image = algebra.columns(images)
        values, vectors = algebra.eigh(image.T @ image)
        energies.append(float(algebra.numpy(values)[-rank:].sum(dtype=np.float64)))
        if _is_decided(len(basis)) and _lost_share(energies[-3:]) < _LOST_ENERGY:
            return algebra.columns(basis) @ _last(vectors, rank)
    return None


def _fits(side: int, width: int, depth: int) -> bool:
    """Whether a basis of that depth is small enough to be cheaper than all eigenvectors."""
    return 2 * width * depth <= side


def _is_looked_at(depth: int) -> bool:
    return depth >= _DEPTH - 2 and (depth - _DEPTH) % _STRIDE in (0, _STRIDE - 1, _STRIDE - 2)


def _is_decided(depth: int) -> bool:
    return depth >= _DEPTH and (depth - _DEPTH) % _STRIDE == 0


def _lost_share(energies: list[float]) -> float:
    """What is still missing, from three energies in a row: their growth, continued as a geometric series."""
    before, last = energies[1] - energies[0], energies[2] - energies[1]
    if last <= 0:
        return 0.0
    ratio = min(last / before, 0.99) if before > 0 else 0.99
    return last * max(ratio / (1 - ratio), 0.25) / energies[2]


def _next_block(basis: Any, block: Any, algebra: Algebra) -> Any:
    # Once is not enough in float32: what the first pass leaves behind is of the size of its own rounding.
    for _ in range(2):
        block = block - basis @ (basis.T @ block)
    return algebra.orthonormal(block)


def _last(columns: Any, count: int) -> Any:
    return columns[:, int(columns.shape[1]) - count :]


def _random_block(side: int, width: int) -> Array:
    values: Array = uniform(side * width, "start-block", side, width) - 0.5
    return values.astype(np.float32).reshape(side, width)


def random_factor(adapter: AdapterModule, seed: int, restart: int = 0) -> np.ndarray[Any, Any]:
    """The start of A, float32 in `adapter.a_shape`; B starts at zero, so that the output is the base's.

    `restart` is the step of the merge after which the factor begins, 0 for the first one.

    Uniform in +-1/sqrt(in_features), which is the Kaiming rule (arXiv:1502.01852) with a = sqrt(5) that LoRA's
    reference code and PEFT use. The values depend on seed and module name, not on the order of modules.
    """
    key = ("lora_A", seed, adapter.name, *([restart] if restart else []))
    values = uniform(math.prod(adapter.a_shape), *key)
    bound = 1.0 / math.sqrt(adapter.in_features)
    return ((2.0 * values - 1.0) * bound).astype(np.float32).reshape(adapter.a_shape)
