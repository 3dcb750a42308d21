from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soup_xb.core.random_numbers import permutation, uniform
from soup_xb.core.rows.batches import (
    collate,
    collate_rows,
    contrast_batch,
    epoch_batches,
    eval_batches,
    idle,
    micro_batches,
    process_share,
    sequence_batches,
)
from soup_xb.core.rows.examples import Source
from soup_xb.core.rows.row import Prompt, Row, TokenSequence
from soup_xb.core.rows.table import as_rows

LENGTHS = st.lists(st.integers(1, 200), min_size=1, max_size=300).map(np.array)


def sequence(*tokens: int, trained: tuple[int, ...] = ()) -> TokenSequence:
    marks = np.isin(np.arange(len(tokens)), trained)
    return TokenSequence(np.array(tokens), marks, Source("rows.jsonl", 1))


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
    batch = collate([sequence(11, 12, 13, 14, trained=(2, 3)), sequence(21, 22, trained=(1,))], pad_id=0)
    assert batch.tokens.tolist() == [[11, 12, 13, 14], [21, 22, 0, 0]]
    # The last place of the second row fills it: it weighs nothing.
    assert batch.weights.tolist() == [[1, 1], [1, 0]]
    assert batch.positions.tolist() == [[1, 2], [4, 4]]
    assert batch.targets.tolist() == [[13, 14], [22, 0]]
    assert batch.lengths.tolist() == [4, 2]
    assert batch.counted.tolist() == [1, 1]
    assert batch.target_tokens == 3
    assert batch.real_tokens == 6


def test_a_trained_first_token_is_no_target() -> None:
    first = sequence(11, 12, trained=(0, 1))
    assert first.target_tokens == 1
    batch = collate([first], pad_id=0)
    assert (batch.targets.tolist(), batch.weights.tolist()) == ([[12]], [[1]])


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=12), min_size=1, max_size=6))
@settings(deadline=None)
def test_the_places_of_a_row_are_its_own_targets_and_then_what_fills_it(marks: list[list[bool]]) -> None:
    sequences = [
        TokenSequence(100 * index + np.arange(len(trained)), trained, Source("rows.jsonl", 1))
        for index, trained in enumerate(marks)
    ]
    batch = collate(sequences, pad_id=0)
    length = batch.tokens.shape[1]
    counts = [one.target_tokens for one in sequences]
    assert batch.positions.shape == batch.targets.shape == batch.weights.shape
    assert batch.weights.shape == (len(sequences), max(1, *counts))
    assert (batch.positions.dtype, batch.targets.dtype, batch.weights.dtype) == (
        np.int64,
        np.int64,
        np.float32,
    )
    for index, (one, count) in enumerate(zip(sequences, counts, strict=True)):
        # Weights are 0 only where a place fills the row.
        assert batch.weights[index].tolist() == [1.0] * count + [0.0] * (batch.weights.shape[1] - count)
        assert (
            (index * length <= batch.positions[index]) & (batch.positions[index] < (index + 1) * length)
        ).all()
        places = batch.positions[index, :count] - index * length
        assert (places + 1).tolist() == [place for place in np.flatnonzero(one.trained).tolist() if place]
        assert batch.targets[index, :count].tolist() == batch.tokens[index, places + 1].tolist()
        assert batch.targets[index, :count].tolist() == one.tokens[places + 1].tolist()
    assert batch.target_tokens == sum(counts)
    assert batch.real_tokens == sum(one.length for one in sequences)


def test_rows_with_nothing_to_learn_have_one_place_that_fills_them() -> None:
    batch = collate([sequence(11, 12), sequence(21)], pad_id=0)
    assert (batch.positions.tolist(), batch.weights.tolist()) == ([[0], [2]], [[0], [0]])
    assert batch.target_tokens == 0
    assert batch.real_tokens == 3


ANSWER, OTHER = sequence(11, 12, 13, trained=(1, 2)), sequence(21, 22, trained=(1,))
ROWS = {
    "tokens": Row("tokens", (ANSWER,)),
    "pair": Row("pair", (ANSWER, OTHER)),
    "judged": Row("judged", (ANSWER, OTHER), True),
    "embedding": Row("embedding", (sequence(11), sequence(21, 22), sequence(31))),
    "prompt": Row("prompt", (sequence(11, 12),), Prompt({})),
}


@pytest.mark.parametrize("kind", list(ROWS))
def test_a_process_without_rows_runs_one_that_counts_for_nothing(kind: str) -> None:
    row = ROWS[kind]
    references = np.arange(float(len(row.sequences)))[None]
    working, idling = (
        micro_batches(as_rows([row]), references, [np.array([0])], (process, 2), pad_id=0)[0]
        for process in (0, 1)
    )
    assert working.counted.tolist() == [1]
    assert (idling.counted.tolist(), idling.target_tokens, idling.real_tokens) == ([0], 0, 0)
    # It has the shapes of a batch: as many rows, and every constant that the loss asks for.
    assert idling.tokens.shape == working.tokens.shape
    assert idling.positions.shape == idling.weights.shape == working.weights.shape
    assert {name: array.dtype for name, array in idling.constants.items()} == {
        name: array.dtype for name, array in working.constants.items()
    }
    assert (idling.beside is None) == (working.beside is None)
    if idling.beside is not None:
        assert (idling.beside.target_tokens, idling.beside.real_tokens) == (0, 0)
        assert not idling.beside.counted.any()


def test_nothing_in_an_idle_batch_counts_and_the_batch_it_is_made_of_stays() -> None:
    batch = collate_rows([ROWS["judged"], ROWS["judged"]], np.ones((2, 2)), 0)
    before = batch.target_tokens, batch.real_tokens
    nothing = idle(batch)
    assert nothing.beside is not None
    for part in (nothing, nothing.beside):
        assert not (part.weights.any() or part.lengths.any() or part.counted.any())
        assert part.weights.dtype == part.counted.dtype == np.float32
    np.testing.assert_array_equal(nothing.tokens, batch.tokens)
    np.testing.assert_array_equal(nothing.targets, batch.targets)
    assert (batch.target_tokens, batch.real_tokens) == before == (4, 6)


def test_a_process_without_an_answer_to_score_has_no_place_and_an_idle_batch() -> None:
    rows = [ROWS["pair"]]
    shares = [sequence_batches(rows, 4, 0, process, 3)[0] for process in range(3)]
    assert [places.tolist() for places, _ in shares] == [[0], [1], []]
    assert [batch.target_tokens for _, batch in shares] == [2, 1, 0]
    assert shares[2][1].tokens.shape[0] == 1


def test_an_idle_process_of_a_contrast_stands_at_no_place() -> None:
    rows = [ROWS["embedding"]]
    batch = contrast_batch(rows, (1, 2), 0)
    assert batch.constants["places"].tolist() == []
    assert batch.constants["count"] == 2
    assert batch.beside is not None
    # A positive goes through the model; whose it is does not matter, and no negative does.
    assert batch.beside.tokens.shape[0] == 1


def test_only_the_examples_of_a_pair_are_counted() -> None:
    batch = collate_rows([ROWS["pair"]] * 3, None, 0)
    assert batch.counted.tolist() == [1, 1, 1]
    assert batch.weights.tolist() == [[1, 1]] * 3 + [[1, 0]] * 3
    assert dict(batch.constants) == {}


def test_random_numbers_are_the_golden_ones() -> None:
    # python -c "from soup_xb.core.random_numbers import *; print(uniform(3, 'a', 1), permutation(8, 'rows', 42, 0))"
    np.testing.assert_allclose(uniform(3, "a", 1), [0.0691896680, 0.6790990047, 0.2828746730], atol=1e-9)
    assert permutation(8, "rows", 42, 0).tolist() == PERMUTATION


PERMUTATION = [5, 4, 1, 6, 2, 0, 7, 3]
