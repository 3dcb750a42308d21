"""Live layers compared with saved factors, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from attrs import evolve

from soup_xb.core.adapter.probe import ROWS, LayerDelta, deviation, probe_inputs
from soup_xb.core.base.modules import AdapterModule

UNIT = 2.0**-24
RANDOM = np.random.default_rng(0)
PLAIN = AdapterModule("layers.0.q_proj", 6, 40, 3, 12, 4.0)
EXPERTS = evolve(PLAIN, experts=3)
DORA = evolve(PLAIN, dora=True)


def factors(adapter: AdapterModule) -> dict[str, np.ndarray]:
    arrays = {
        "lora_A": RANDOM.normal(size=adapter.a_shape).astype(np.float32),
        "lora_B": RANDOM.normal(size=adapter.b_shape).astype(np.float32),
    }
    return arrays | {"lora_magnitude_vector": np.ones(6, np.float32)} if adapter.dora else arrays


def added(adapter: AdapterModule, arrays: dict[str, np.ndarray]) -> np.ndarray:
    weight = adapter.scale * arrays["lora_B"] @ arrays["lora_A"]
    result: np.ndarray = probe_inputs(adapter.name, adapter.in_features) @ np.swapaxes(weight, -1, -2)
    return result


def test_the_inputs_are_the_same_in_every_format_and_differ_by_module() -> None:
    inputs = probe_inputs("q_proj", 40)
    assert inputs.shape == (ROWS, 40) and inputs.dtype == np.float32
    np.testing.assert_array_equal(inputs, inputs.astype(np.float16))
    # bf16 keeps the upper half of a float32.
    assert not (inputs.view(np.uint32) & 0xFFFF).any()
    np.testing.assert_array_equal(inputs, probe_inputs("q_proj", 40))
    assert not np.array_equal(inputs, probe_inputs("v_proj", 40))
    assert np.linalg.matrix_rank(inputs) == ROWS


@pytest.mark.parametrize("adapter", [PLAIN, EXPERTS], ids=["linear", "experts"])
def test_a_layer_that_adds_what_the_factors_say_is_proven(adapter: AdapterModule) -> None:
    arrays = factors(adapter)
    found = deviation(adapter, arrays, LayerDelta(added(adapter, arrays), UNIT))
    assert found.is_proven and found.relative < 1e-6
    assert (found.pairs, found.inert) == (max(1, adapter.experts), 0)


@pytest.mark.parametrize("adapter", [PLAIN, EXPERTS], ids=["linear", "experts"])
def test_a_hundredth_too_much_is_seen_and_measured(adapter: AdapterModule) -> None:
    arrays = factors(adapter)
    live = added(adapter, arrays)
    live[-1] *= 1.01
    found = deviation(adapter, arrays, LayerDelta(live, UNIT))
    assert not found.is_proven and 1e-3 < found.relative < 2e-2


def test_one_expert_of_many_that_is_off_is_not_lost_among_the_others() -> None:
    adapter = evolve(PLAIN, experts=200)
    arrays = factors(adapter)
    live = added(adapter, arrays)
    live[77] *= 1.01
    assert deviation(adapter, arrays, LayerDelta(live, UNIT)).relative == pytest.approx(0.01, rel=0.5)


def test_a_live_value_that_is_not_finite_is_not_proven() -> None:
    for value in (np.nan, np.inf):
        for adapter in (PLAIN, EXPERTS):
            arrays = factors(adapter)
            live = added(adapter, arrays)
            live.flat[3] = value
            assert not deviation(adapter, arrays, LayerDelta(live, UNIT)).is_proven


def test_terms_that_cancel_do_not_make_rounding_look_like_an_error() -> None:
    arrays = factors(PLAIN)
    arrays = {
        "lora_A": np.concatenate([arrays["lora_A"], arrays["lora_A"]]),
        "lora_B": np.concatenate([arrays["lora_B"], -arrays["lora_B"]], axis=1),
    }
    adapter = evolve(PLAIN, rank=6)
    rounding = np.full((ROWS, 6), 1e-6, np.float32)
    assert deviation(adapter, arrays, LayerDelta(rounding, UNIT)).is_proven


def test_a_coarse_format_is_given_its_own_rounding_and_no_more() -> None:
    arrays = factors(PLAIN)
    for off, roundoff, proven in ((1.002, UNIT, False), (1.002, 2.0**-9, True), (1.1, 2.0**-9, False)):
        assert deviation(PLAIN, arrays, LayerDelta(added(PLAIN, arrays) * off, roundoff)).is_proven is proven


@pytest.mark.parametrize("zeroed", ["lora_A", "lora_B"])
def test_pairs_that_add_nothing_are_counted(zeroed: str) -> None:
    arrays = factors(EXPERTS)
    arrays[zeroed][1] = 0
    found = deviation(EXPERTS, arrays, LayerDelta(added(EXPERTS, arrays), UNIT))
    assert found.is_proven and (found.pairs, found.inert) == (3, 1)
    arrays[zeroed][:] = 0
    assert deviation(EXPERTS, arrays, LayerDelta(added(EXPERTS, arrays), UNIT)).inert == 3


@pytest.mark.parametrize("moved", [0.0, 1e-3])
def test_dora_is_compared_by_its_own_formula(moved: float) -> None:
    arrays, weight = factors(DORA), RANDOM.normal(size=(6, 40))
    arrays["lora_B"] *= np.float32(moved)
    adapted = weight + DORA.scale * arrays["lora_B"] @ arrays["lora_A"]
    norms = np.linalg.norm(adapted, axis=1)
    magnitude = norms * (1 + moved)
    arrays["lora_magnitude_vector"] = magnitude.astype(np.float32)
    inputs = probe_inputs(DORA.name, 40).astype(np.float64)
    after = inputs @ (magnitude[:, None] / norms[:, None] * adapted).T
    live = LayerDelta(after - inputs @ weight.T, UNIT, inputs @ weight.T, UNIT, norms)
    found = deviation(DORA, arrays, live)
    assert found.is_proven and found.inert == (moved == 0.0)
    plain = evolve(DORA, dora=False)
    assert not deviation(plain, arrays, live).is_proven
    assert not deviation(DORA, arrays, evolve(live, norms=None)).is_proven
    wrong = {**arrays, "lora_magnitude_vector": arrays["lora_magnitude_vector"] * np.float32(1.01)}
    assert not deviation(DORA, wrong, live).is_proven
