from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from soup_xb.core.random_numbers import permutation, uniform
from soup_xb.core.rows.batches import collate, epoch_batches, eval_batches, process_share
from soup_xb.core.rows.examples import Source, TokenRow

LENGTHS = st.lists(st.integers(1, 200), min_size=1, max_size=300).map(np.array)


def row(*tokens: int, trained: tuple[int, ...] = ()) -> TokenRow:
    marks = np.isin(np.arange(len(tokens)), trained)
    return TokenRow(np.array(tokens), marks, Source("rows.jsonl", 1))


@given(LENGTHS, st.integers(1, 16), st.integers(0, 2**32), st.integers(0, 5))
@settings(deadline=None)
def test_an_epoch_holds_every_row_once(lengths: np.ndarray, size: int, seed: int, epoch: int) -> None:
    batches = epoch_batches(lengths, size, seed, epoch)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // size)
    assert max(map(len, batches)) <= size


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    lengths = np.arange(1, 101)

    def order(seed: int, epoch: int) -> list[list[int]]:
        return [batch.tolist() for batch in epoch_batches(lengths, 4, seed, epoch)]

    assert order(7, 0) == order(7, 0)
    assert order(7, 0) != order(7, 1)
    assert order(7, 0) != order(8, 0)


def test_padding_stays_small_on_rows_of_very_different_length() -> None:
    lengths = (10 + 240 * uniform(1000, "lengths")).astype(int)
    batches = epoch_batches(lengths, 4, seed=1, epoch=0)
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert lengths.sum() / padded > 0.97


def test_consecutive_batches_do_not_come_in_order_of_length() -> None:
    lengths = np.arange(1, 1001)
    means = np.array([lengths[batch].mean() for batch in epoch_batches(lengths, 4, seed=1, epoch=0)])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.2


@given(LENGTHS, st.integers(1, 4), st.integers(1, 4))
@settings(deadline=None)
def test_processes_share_every_micro_batch_without_overlap(
    lengths: np.ndarray, per_process: int, processes: int
) -> None:
    for batch in epoch_batches(lengths, per_process * processes, seed=3, epoch=0):
        shares = [process_share(batch, process, processes) for process in range(processes)]
        assert sorted(np.concatenate(shares).tolist()) == sorted(batch.tolist())
        assert max(map(len, shares)) <= per_process


def test_evaluation_begins_with_the_longest_rows() -> None:
    batches = eval_batches(np.array([3, 9, 5, 7, 1]), 2)
    assert [batch.tolist() for batch in batches] == [[1, 3], [2, 0], [4]]


def test_targets_stand_one_place_after_the_position_that_predicts_them() -> None:
    batch = collate([row(11, 12, 13, 14, trained=(2, 3)), row(21, 22, trained=(1,))], pad_id=0)
    assert batch.tokens.tolist() == [[11, 12, 13, 14], [21, 22, 0, 0]]
    assert batch.positions.tolist() == [1, 2, 4]
    assert batch.targets.tolist() == [13, 14, 22]
    assert batch.target_tokens == 3
    assert batch.real_tokens == 6


def test_a_trained_first_token_is_no_target() -> None:
    first = row(11, 12, trained=(0, 1))
    assert first.target_tokens == 1
    assert collate([first], pad_id=0).targets.tolist() == [12]


def test_a_process_without_rows_still_has_something_to_run() -> None:
    batch = collate([], pad_id=9)
    assert batch.tokens.tolist() == [[9]]
    assert (batch.target_tokens, batch.real_tokens) == (0, 0)


def test_random_numbers_are_the_golden_ones() -> None:
    # python -c "from soup_xb.core.random_numbers import *; print(uniform(3, 'a', 1), permutation(8, 'rows', 42, 0))"
    np.testing.assert_allclose(uniform(3, "a", 1), [0.0691896680, 0.6790990047, 0.2828746730], atol=1e-9)
    assert permutation(8, "rows", 42, 0).tolist() == PERMUTATION


PERMUTATION = [5, 4, 1, 6, 2, 0, 7, 3]
