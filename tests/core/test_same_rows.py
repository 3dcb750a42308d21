"""Processes that read a stream each for itself find out where one has other rows."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest

from soup_xb.core.errors import DataError
from soup_xb.core.rows.examples import Source
from soup_xb.core.rows.row import text_row
from soup_xb.core.rows.table import ListedRows
from soup_xb.data.dataset import check_same_rows


class Meeting:
    """What a session's processes agree on, for threads that stand for them."""

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._values: list[int] = []
        self._barrier = Barrier(processes)

    def agree(self, value: int) -> int:
        self._values.append(value)
        self._barrier.wait()
        largest = max(self._values)
        if self._barrier.wait() == 0:
            self._values.clear()
        self._barrier.wait()
        return largest


def rows(token: int) -> ListedRows:
    return ListedRows([text_row([1, token], [False, True], Source("a", 1))])


def outcomes(tokens: tuple[int, ...]) -> list[str]:
    meeting: Any = Meeting(len(tokens))

    def one(token: int) -> str:
        try:
            check_same_rows(meeting, rows(token))
        except DataError as error:
            return error.problems[0].code
        return "same"

    with ThreadPoolExecutor(len(tokens)) as pool:
        return list(pool.map(one, tokens))


@pytest.mark.parametrize(("tokens", "found"), [((7, 7, 7), "same"), ((7, 8, 7), "rows-differ")])
def test_every_process_learns_it_where_one_has_other_rows(tokens: tuple[int, ...], found: str) -> None:
    assert outcomes(tokens) == [found] * len(tokens)
