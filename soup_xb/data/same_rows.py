"""Several processes that each read their rows for themselves: all must have found the same."""

from __future__ import annotations

from soup_xb.core.errors import DataError
from soup_xb.core.rows.rows import Rows
from soup_xb.core.run.session import Session

# Bits of a fingerprint that fit a whole number of every engine.
_DIGITS = 7


def check_same_rows(session: Session, rows: Rows) -> None:
    """Raise DataError, on every process, where one has other rows than another; it waits for all of them.

    A dataset may move on while processes start: each asks the hub for the commit that it is at.
    """
    if session.processes == 1:
        return
    mine = int(rows.fingerprint[:_DIGITS], 16)
    if session.agree(mine) != -session.agree(-mine):
        raise DataError(
            "rows-differ",
            "the processes read different rows: the dataset changed on the hub while they started",
            where="data.train",
            help="start again.",
        )
