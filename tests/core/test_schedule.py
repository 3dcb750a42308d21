from __future__ import annotations

import doctest
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soup_xb.core import text
from soup_xb.core.adapter import peft_file
from soup_xb.core.base import modules, patterns
from soup_xb.core.run import plan, schedule
from soup_xb.core.run.schedule import LearningRates, floor_share, restart_steps, steps_every, warmup_steps


@pytest.mark.parametrize("module", [schedule, modules, patterns, text, peft_file, plan])
def test_the_examples_in_docstrings_are_true(module: object) -> None:
    result = doctest.testmod(module, raise_on_error=True)  # type: ignore[arg-type]
    assert result.failed == 0


@given(st.integers(0, 100_000), st.integers(0, 100))
def test_a_share_in_percent_is_floored_as_on_paper(size: int, percent: int) -> None:
    assert floor_share(size, percent / 100) == int(Fraction(size * percent, 100))


@given(
    peak=st.floats(1e-6, 1.0),
    scheduler=st.sampled_from(["linear", "cosine", "constant"]),
    total=st.integers(1, 300),
    ratio=st.floats(0.0, 0.9),
)
def test_rates_rise_to_the_peak_and_never_fall_to_zero(
    peak: float, scheduler: str, total: int, ratio: float
) -> None:
    warmup = warmup_steps(total, ratio)
    rates = [LearningRates(peak, scheduler, warmup, total).at(step) for step in range(1, total + 1)]
    assert max(rates) == pytest.approx(peak)
    assert min(rates) > 0
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


def test_the_cosine_is_at_half_the_peak_half_way() -> None:
    assert LearningRates(1.0, "cosine", 0, 10).at(6) == pytest.approx(0.5)


@given(every=st.integers(1, 50), total=st.integers(1, 400), ratio=st.floats(0.0, 0.99))
def test_restarts_are_multiples_after_the_warmup_and_never_the_last_step(
    every: int, total: int, ratio: float
) -> None:
    steps = restart_steps(total, every, ratio)
    expected = [s for s in range(1, total) if s % every == 0 and s >= floor_share(total, ratio)]
    assert list(steps) == expected


def test_the_last_step_is_always_among_the_saved_ones() -> None:
    assert steps_every(5, 12) == (5, 10, 12)
    assert steps_every(20, 12) == (12,)
    assert steps_every(6, 12) == (6, 12)
