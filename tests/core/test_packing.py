"""Several documents in one sequence."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soup_xb.core.rows.batches import collate_rows
from soup_xb.core.rows.examples import Source
from soup_xb.core.rows.packing import pack, packing_notice, split_long
from soup_xb.core.rows.row import Row, text_row


def row(length: int, line: int = 1) -> Row:
    return text_row(np.arange(length) + 100 * line, np.arange(length) > 0, Source("rows.jsonl", line))


@given(st.lists(st.integers(2, 64), min_size=1, max_size=200))
@settings(deadline=None)
def test_packing_keeps_every_token_and_overfills_nothing(lengths: list[int]) -> None:
    rows = [row(length, index) for index, length in enumerate(lengths)]
    packed = pack(rows, 64)
    assert all(sequence.length <= 64 for sequence in packed)
    assert sorted(np.concatenate([one.sequences[0].tokens for one in packed]).tolist()) == sorted(
        np.concatenate([one.sequences[0].tokens for one in rows]).tolist()
    )
    assert sum(one.target_tokens for one in packed) == sum(one.target_tokens for one in rows)
    # Two sequences that are both at most half full would have been one.
    assert sum(one.length <= 32 for one in packed) <= 1


def test_positions_restart_with_each_document_and_its_first_token_is_no_target() -> None:
    (one,) = pack([row(3, 1), text_row([7, 8], [True, True], Source("rows.jsonl", 2))], 8)
    (packed,) = one.sequences
    assert packed.documents == (0, 3)
    assert packed.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert packed.trained.tolist() == [False, True, True, False, True]


def test_a_long_document_is_cut_and_only_what_nothing_precedes_is_not_learned() -> None:
    pieces = split_long([row(21)], 8)
    assert [piece.length for piece in pieces] == [8, 8, 5]
    assert [piece.target_tokens for piece in pieces] == [7, 7, 4]
    assert split_long([row(17)], 8)[-1].length == 8
    assert split_long([row(8)], 8)[0].length == 8


def test_a_row_that_fits_no_sequence_is_a_fault() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        pack([row(9)], 8)


def test_a_batch_tells_positions_only_where_a_row_holds_several_documents() -> None:
    assert collate_rows([row(4), row(6)], None, 0).position_ids is None
    packed = pack([row(2, 1), row(3, 2)], 6)
    batch = collate_rows([*packed, row(6, 3)], None, 0)
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]


def test_the_notice_says_how_full_the_sequences_are() -> None:
    sequences = pack([row(4, 1), row(4, 2), row(6, 3)], 8)
    assert packing_notice(3, sequences, 8).message == "3 documents in 2 sequences of 8 tokens, 87.5% full"
