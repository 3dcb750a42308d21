from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from soup_xb.core.adapter.pieces import prune, smallest_entries
from soup_xb.core.run.loop import RestartWatch

RATIOS = st.floats(0.01, 0.99)
# Few different values, so that ties are the rule.
FACTORS = arrays(
    np.float32,
    array_shapes(min_dims=2, max_dims=2, max_side=12),
    elements=st.sampled_from([0, 1, -1, 2, -3]),
)


@given(FACTORS, RATIOS)
def test_exactly_the_smallest_go_and_the_lowest_index_first(values: Any, ratio: float) -> None:
    mask = smallest_entries(values, ratio)
    count = math.floor(values.size * ratio + 1e-9)
    by_hand = sorted(range(values.size), key=lambda index: (abs(values.flat[index]), index))[:count]
    assert np.flatnonzero(mask).tolist() == sorted(by_hand)


@pytest.mark.parametrize(
    ("size", "ratio", "count"), [(100, 0.29, 29), (100, 0.9, 90), (7, 0.9, 6), (3, 0.1, 0)]
)
def test_the_count_is_that_of_arithmetic_on_paper(size: int, ratio: float, count: int) -> None:
    values = np.arange(1.0, size + 1).reshape(1, size)
    kept, pruned = prune(values, ratio)
    assert pruned == count == (kept == 0).sum()


@given(FACTORS, RATIOS, st.integers(0, 99))
def test_with_a_start_the_smallest_changes_go_back_to_it(values: Any, ratio: float, seed: int) -> None:
    start = np.random.default_rng(seed).standard_normal(values.shape).astype(np.float32)
    kept, pruned = prune(start + values, ratio, start)
    mask = smallest_entries(start + values - start, ratio)
    assert pruned == mask.sum()
    np.testing.assert_array_equal(kept, np.where(mask, start, start + values))


def test_a_tied_tensor_loses_no_more_than_its_share() -> None:
    kept, pruned = prune(np.ones((4, 5), np.float32), 0.5)
    assert pruned == 10
    assert kept.tolist() == [[0] * 5, [0] * 5, [1] * 5, [1] * 5]


def test_a_loss_that_stays_high_after_a_restart_is_told_with_its_numbers() -> None:
    watch = RestartWatch((30,))
    told = [watch.after(step, 2.0 if step <= 30 else 2.2) for step in range(1, 80)]
    assert [index + 1 for index, problem in enumerate(told) if problem] == [50]
    assert told[49] is not None
    assert "mean loss 2.2000 in the 20 steps after the restart at step 30, 2.0000" in told[49].message
    assert "10% higher" in told[49].message


@pytest.mark.parametrize("after", [1.0, 2.09])
def test_a_loss_that_recovers_is_not_told(after: float) -> None:
    watch = RestartWatch((30,))
    assert not any(watch.after(step, 2.0 if step <= 30 else after) for step in range(1, 80))


@pytest.mark.parametrize("done", [11, 25, 30, 49])
def test_a_run_that_goes_on_near_a_restart_compares_with_the_losses_before(done: int) -> None:
    def loss(step: int) -> float:
        return 2.0 if step <= 30 else 2.2

    watch = RestartWatch((30,), [loss(step) for step in range(1, done + 1)])
    told = [step for step in range(done + 1, 80) if watch.after(step, loss(step))]
    assert told == [50]


def test_a_restart_whose_losses_before_are_lost_is_not_judged() -> None:
    watch = RestartWatch((30,))
    assert not any(watch.after(step, 2.0 if step <= 30 else 9.0) for step in range(25, 80))
