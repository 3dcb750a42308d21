"""The adapter as a plain LoRA on the untouched base, whatever start and restarts it had, and what a prune takes away.

A piece is a pair of factors that adds scale * B A. What training added to a pissa or olora start is a piece of
twice the rank; each merge of a ReLoRA run leaves a piece behind; all of them side by side are one plain LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from attrs import evolve, frozen

from soup_xb.core.adapter.plan import AdapterPlan
from soup_xb.core.adapter.starts import Start
from soup_xb.core.errors import ModelError
from soup_xb.core.run.schedule import floor_share

Array = np.ndarray[Any, Any]


@frozen(eq=False)
class Piece:
    """Factors that add scale * b a: `a` (rank, in_features), `b` (out_features, rank); of experts, a stack of such."""

    a: Array
    b: Array


def difference(a: Array, b: Array, start: Start | None) -> Piece:
    """B A - B0 A0 as one piece of twice the rank, exactly; without a start, the factors as they are.

    Written as (B - B0) A + B0 (A - A0): both products are small, so that rounding the factors to 16 bits, as some
    servers do, costs little of the difference. In B A - B0 A0 two large products would have to cancel.
    """
    if start is None:
        return Piece(a, b)
    return Piece(np.concatenate([a, a - start.a], axis=-2), np.concatenate([b - start.b, start.b], axis=-1))


def joined(pieces: Sequence[Piece]) -> Piece:
    """One piece that adds what all of them add; its rank is the sum of theirs."""
    return Piece(
        np.concatenate([piece.a for piece in pieces], axis=-2),
        np.concatenate([piece.b for piece in pieces], axis=-1),
    )


def saved_plan(plan: AdapterPlan, factors: Mapping[str, Mapping[str, Array]]) -> AdapterPlan:
    """The plan with the ranks that plain factors have, and alphas that keep each module's scale.

    They differ after pissa, olora and merges. rsLoRA's rule would give the higher rank another scale, so that such
    an adapter is written with the plain one.
    """
    ranks = {name: int(arrays["lora_A"].shape[-2]) for name, arrays in factors.items()}
    if all(adapter.rank == ranks[adapter.name] for adapter in plan.modules):
        return plan
    modules = (
        evolve(adapter, rank=ranks[adapter.name], alpha=_whole(adapter.scale * ranks[adapter.name]))
        for adapter in plan.modules
    )
    return evolve(plan, modules=tuple(modules), use_rslora=False)


def _whole(value: float) -> float:
    return int(value) if value == int(value) else value


def beyond_format(module: str, dtype: str) -> ModelError:
    """The error of a merged weight that its number format cannot hold.

    >>> beyond_format("model.layers.0.mlp.up_proj", "float16").problems[0].code
    'merge-not-finite'
    """
    return ModelError(
        "merge-not-finite",
        f"the merged weight of `{module}` has entries that {dtype} cannot hold",
        help="the adapter adds more than this number format holds: use it beside the base, or train at a lower rate.",
    )


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
