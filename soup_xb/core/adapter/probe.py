"""How far what a live layer adds to its base is from what saved factors say, on a few fixed inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from attrs import frozen

from soup_xb.core.base.modules import AdapterModule
from soup_xb.core.random_numbers import uniform

ROWS = 2
# Multiples of 1/64 up to 1 have the same value in float32, bf16 and float16.
_GRID = 64
# How many roundings' worth a sum may be off, and the least share of it: the order of a sum of float32 terms, which is
# each library's own, moves one of 1,500 terms by 1e-6 of its size and longer ones by more.
_ROUNDINGS = 8
_LEAST = 1e-4

Array = np.ndarray[Any, Any]


@frozen(eq=False)
class LayerDelta:
    """What a live layer adds to its true base for `probe_inputs`: `added` (rows, out_features), of experts a stack.

    `roundoff` is the unit roundoff of the format in which the adapter's own product is made. Where the base takes part
    (DoRA, and merges, which are folded into it), `base` is its true output without a bias and `base_roundoff` the unit
    roundoff of what went through it. `norms` (out_features,) are those of the rows of W + scale B A, for DoRA.
    """

    added: Array
    roundoff: float
    base: Array | None = None
    base_roundoff: float = 0.0
    norms: Array | None = None


@frozen
class Deviation:
    """One adapted module, of experts the one that is furthest off: norms over the outputs of the inputs.

    `error` is that of live minus saved, `allowed` what rounding may make of it, `terms` the root of the sum of squared
    terms, which terms that cancel do not make small. `inert` of the `pairs` of factors (one, or one an expert) add
    nothing at all.
    """

    name: str
    error: float
    allowed: float
    terms: float
    pairs: int
    inert: int

    @property
    def is_proven(self) -> bool:
        """Whether rounding explains all of the error; one that is not a number is not explained."""
        return self.error <= self.allowed

    @property
    def relative(self) -> float:
        """The error as a share of the terms."""
        if self.terms > 0:
            return self.error / self.terms
        return 0.0 if self.error == 0 else math.inf


def probe_inputs(name: str, in_features: int) -> Array:
    """The inputs of the module of that name, float32 (ROWS, in_features), the same on every backend and machine."""
    values = uniform(ROWS * in_features, "proof", name)
    return (np.round((2.0 * values - 1.0) * _GRID) / _GRID).astype(np.float32).reshape(ROWS, in_features)


def deviation(adapter: AdapterModule, factors: Mapping[str, Array], live: LayerDelta) -> Deviation:
    """Compare a live layer with a saved module, in float64.

    A plain LoRA adds scale * B A x, DoRA (arXiv:2402.09353) (gain - 1) W x + gain * scale * B A x with the gain
    magnitude / norm of the row of W + scale * B A.
    """
    inputs = probe_inputs(adapter.name, adapter.in_features).astype(np.float64)
    a, b = (factors[name].astype(np.float64) for name in ("lora_A", "lora_B"))
    saved = adapter.scale * _through(inputs, a, b)
    squares = adapter.scale**2 * _through(inputs**2, a**2, b**2)
    base = np.zeros_like(saved) if live.base is None else live.base.astype(np.float64)
    if adapter.dora and live.norms is not None:
        gain = factors["lora_magnitude_vector"].astype(np.float64) / live.norms
        saved = (gain - 1.0) * base + gain * saved
        squares = ((gain - 1.0) * base) ** 2 + gain**2 * squares
    errors, terms = _norms(live.added.astype(np.float64) - saved), np.sqrt(_sums(squares))
    if adapter.dora != (live.norms is not None):
        errors = np.full_like(terms, np.inf)
    through_base = _ROUNDINGS * live.base_roundoff * _norms(base)
    allowed = max(_LEAST, _ROUNDINGS * live.roundoff) * terms + through_base
    # A magnitude that was never moved is the norm of its row but for rounding.
    quiet = through_base if adapter.dora else 0.0 * terms
    worst = int(np.argmax(np.nan_to_num(errors, nan=np.inf) - allowed))
    return Deviation(
        adapter.name,
        error=float(errors[worst]),
        allowed=float(allowed[worst]),
        terms=float(terms[worst]),
        pairs=len(terms),
        inert=int((_norms(saved) <= quiet).sum()),
    )


def share_off(
    one: tuple[AdapterModule, Mapping[str, Array]], other: tuple[AdapterModule, Mapping[str, Array]]
) -> float:
    """How far two forms of one module's factors are apart, as a share of what the first adds, in float64."""
    added, squares = [], []
    for module, factors in (one, other):
        inputs = probe_inputs(module.name, module.in_features).astype(np.float64)
        a, b = (factors[name].astype(np.float64) for name in ("lora_A", "lora_B"))
        added.append(module.scale * _through(inputs, a, b))
        squares.append(module.scale**2 * _through(inputs**2, a**2, b**2))
    terms = math.sqrt(squares[0].sum())
    return float(np.sqrt(((added[0] - added[1]) ** 2).sum())) / terms if terms else 0.0


def _through(inputs: Array, a: Array, b: Array) -> Array:
    """(rows, in) through A (rank, in) and B (out, rank), or through a stack of such pairs."""
    product: Array = inputs @ np.swapaxes(a, -1, -2) @ np.swapaxes(b, -1, -2)
    return product


def _sums(outputs: Array) -> Array:
    """The sum over (rows, out), one for each of a stack."""
    sums: Array = outputs.sum(axis=(-2, -1)).reshape(-1)
    return sums


def _norms(outputs: Array) -> Array:
    norms: Array = np.sqrt(_sums(outputs**2))
    return norms
