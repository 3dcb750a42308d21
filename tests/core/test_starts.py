from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from soup_xb.core.adapter.pieces import Piece, difference, joined, saved_plan
from soup_xb.core.adapter.plan import AdapterPlan
from soup_xb.core.adapter.starts import Start, top_directions, weight_start
from soup_xb.core.base.modules import AdapterModule

Array = np.ndarray[Any, Any]


class NumpyAlgebra:
    """The operations in NumPy; `exact` counts how often a matrix of a given side was taken apart as a whole."""

    def __init__(self) -> None:
        self.eigh_sides: list[int] = []

    def array(self, values: Array) -> Array:
        return values

    def numpy(self, matrix: Array) -> Array:
        return matrix

    def orthonormal(self, matrix: Array) -> Array:
        return np.linalg.qr(matrix)[0]

    def eigh(self, matrix: Array) -> tuple[Array, Array]:
        self.eigh_sides.append(matrix.shape[0])
        values, vectors = np.linalg.eigh(matrix)
        return values, vectors

    def columns(self, blocks: list[Array]) -> Array:
        return np.concatenate(blocks, axis=1)


def weight_of(out: int, inside: int, decay: float = 0.5, seed: int = 0) -> Array:
    """A weight whose singular values fall as k ** -decay, as slowly as those of real weights."""
    rng = np.random.default_rng(seed)
    side = min(out, inside)
    left = np.linalg.qr(rng.standard_normal((out, side)))[0]
    right = np.linalg.qr(rng.standard_normal((inside, side)))[0]
    values = np.arange(1, side + 1.0) ** -decay
    return ((left * values) @ right.T).astype(np.float32)


def module(out: int, inside: int, rank: int = 4, scale: float = 2.0) -> AdapterModule:
    return AdapterModule("layers.0.q_proj", out, inside, rank, scale * rank, scale)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_pissa_is_the_top_of_the_exact_svd_at_every_scale(shape: tuple[int, int]) -> None:
    weight = weight_of(*shape)
    left, values, right = np.linalg.svd(weight.astype(np.float64))
    top = (left[:, :4] * values[:4]) @ right[:4]
    for scale in (0.5, 2.0, 8.0):
        start = weight_start("pissa", weight, module(*shape, scale=scale), NumpyAlgebra())
        assert (start.a.shape, start.b.shape) == ((4, shape[1]), (shape[0], 4))
        assert {start.a.dtype, start.b.dtype} == {np.dtype(np.float32)}
        np.testing.assert_allclose(scale * start.b @ start.a, top, atol=2e-6)
        # Both factors carry the root of each value, the largest first.
        roots = np.sqrt(values[:4] / scale)
        np.testing.assert_allclose(np.linalg.norm(start.a, axis=1), roots, rtol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(start.b, axis=0), roots, rtol=1e-4)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_olora_is_the_first_columns_of_the_full_qr(shape: tuple[int, int]) -> None:
    weight = weight_of(*shape)
    q, r = np.linalg.qr(weight.astype(np.float64))
    start = weight_start("olora", weight, module(*shape), NumpyAlgebra())
    np.testing.assert_allclose(start.b @ start.a, q[:, :4] @ r[:4], atol=2e-6)
    np.testing.assert_allclose(start.b.T @ start.b, np.eye(4), atol=1e-6)


@pytest.mark.parametrize("strategy", ["pissa", "olora"])
def test_the_largest_entry_of_each_left_vector_is_positive_whatever_the_library_s_signs(
    strategy: str,
) -> None:
    class Flipped(NumpyAlgebra):
        def orthonormal(self, matrix: Array) -> Array:
            return -super().orthonormal(matrix)

        def eigh(self, matrix: Array) -> tuple[Array, Array]:
            values, vectors = super().eigh(matrix)
            return values, -vectors

    weight = weight_of(24, 40)
    one = weight_start(strategy, weight, module(24, 40), NumpyAlgebra())
    two = weight_start(strategy, weight, module(24, 40), Flipped())
    np.testing.assert_allclose(one.a, two.a, atol=1e-6)
    np.testing.assert_allclose(one.b, two.b, atol=1e-6)
    assert (one.b[np.abs(one.b).argmax(axis=0), range(4)] > 0).all()


@pytest.mark.parametrize("decay", [0.1, 0.25, 0.5, 1.0])
def test_the_krylov_basis_loses_less_than_a_thousandth_of_the_energy(decay: float) -> None:
    weight, algebra = weight_of(400, 500, decay), NumpyAlgebra()
    inner = top_directions(weight, 8, algebra)
    np.testing.assert_allclose(inner.T @ inner, np.eye(8), atol=1e-5)
    exact = np.square(np.linalg.svd(weight.astype(np.float64))[1][:8]).sum()
    captured = np.square(weight.T.astype(np.float64) @ inner).sum()
    assert captured > 0.999 * exact
    assert 400 not in algebra.eigh_sides, "the exact way was taken"


def test_a_small_side_is_taken_apart_exactly() -> None:
    algebra = NumpyAlgebra()
    top_directions(weight_of(64, 500), 8, algebra)
    assert algebra.eigh_sides == [64]


def test_a_spectrum_too_flat_for_the_basis_falls_back_to_the_exact_way() -> None:
    rng = np.random.default_rng(0)
    weight, algebra = np.linalg.qr(rng.standard_normal((500, 400)))[0].T, NumpyAlgebra()
    values = 1.0 + 1e-3 * rng.random(400)
    weight = (values[:, None] * weight).astype(np.float32)
    inner = top_directions(weight, 8, algebra)
    captured = np.square(weight.T.astype(np.float64) @ inner).sum()
    assert captured > 0.999 * np.square(np.sort(values)[-8:]).sum()


def test_a_weight_of_low_rank_starts_finite() -> None:
    weight = np.outer(np.arange(1.0, 25.0), np.ones(40)).astype(np.float32)
    for strategy in ("pissa", "olora"):
        start = weight_start(strategy, weight, module(24, 40), NumpyAlgebra())
        assert np.isfinite(start.a).all() and np.isfinite(start.b).all()
    start = weight_start("pissa", weight, module(24, 40), NumpyAlgebra())
    np.testing.assert_allclose(2.0 * start.b @ start.a, weight, rtol=1e-4)
    zero = weight_start("pissa", 0 * weight, module(24, 40), NumpyAlgebra())
    assert np.isfinite(zero.a).all() and np.isfinite(zero.b).all()


@given(st.integers(0, 1000), st.integers(1, 5))
def test_the_plain_form_is_the_exact_difference(seed: int, rank: int) -> None:
    rng = np.random.default_rng(seed)

    def piece() -> Piece:
        return Piece(rng.standard_normal((rank, 7)), rng.standard_normal((6, rank)))

    now, first, merged = piece(), piece(), piece()
    plain = difference(now.a, now.b, Start(first.a, first.b))
    np.testing.assert_allclose(plain.b @ plain.a, now.b @ now.a - first.b @ first.a, atol=1e-10)
    assert plain.a.shape == (2 * rank, 7)
    whole = joined([plain, merged])
    np.testing.assert_allclose(whole.b @ whole.a, plain.b @ plain.a + merged.b @ merged.a, atol=1e-10)
    untouched = difference(first.a, first.b, Start(first.a, first.b))
    assert not (untouched.b @ untouched.a).any()


def test_the_plain_form_survives_sixteen_bits() -> None:
    rng = np.random.default_rng(0)
    first = Start(*(rng.standard_normal(shape).astype(np.float32) for shape in ((4, 64), (64, 4))))
    a, b = (
        array + 1e-3 * rng.standard_normal(array.shape).astype(np.float32) for array in (first.a, first.b)
    )
    exact = b.astype(np.float64) @ a - first.b.astype(np.float64) @ first.a
    plain = difference(a, b, first)
    rounded = plain.b.astype(np.float16).astype(np.float64) @ plain.a.astype(np.float16)
    assert np.linalg.norm(rounded - exact) < 1e-3 * np.linalg.norm(exact)
    two = np.concatenate([b, -first.b], 1).astype(np.float16).astype(np.float64)
    cancelling = two @ np.concatenate([a, first.a]).astype(np.float16)
    assert np.linalg.norm(cancelling - exact) > 0.05 * np.linalg.norm(exact)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_higher_rank_is_saved_with_the_same_scale(rslora: bool) -> None:
    scale = 32 / 3**0.5 if rslora else 32 / 3
    modules = (AdapterModule("q", 8, 8, 3, 32, scale), AdapterModule("v", 8, 8, 4, 8, 2.0))
    plan = AdapterPlan(modules, 0.0, "pissa", rslora, 0)
    factors = {name: {"lora_A": np.zeros((rank, 8))} for name, rank in (("q", 6), ("v", 12))}
    saved = saved_plan(plan, factors)
    assert [adapter.rank for adapter in saved.modules] == [6, 12]
    assert not saved.use_rslora
    for before, after in zip(modules, saved.modules, strict=True):
        assert after.alpha / after.rank == pytest.approx(before.scale, rel=1e-15)
    assert saved.modules[1].alpha == 24 and isinstance(saved.modules[1].alpha, int)
    same = {adapter.name: {"lora_A": np.zeros((adapter.rank, 8))} for adapter in modules}
    assert saved_plan(evolve(plan, init_strategy="random"), same).use_rslora == rslora
