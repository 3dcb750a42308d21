"""What a fuzz run met: how many inputs were taken or refused, with which codes, and which took longest."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from case_counts import Met, hand_over_fuzzing

# So that the test files share their mutations.
sys.path.insert(0, str(Path(__file__).parent))

# Of processor time, for one input; a busy machine does not count.
LONGEST_SECONDS = 1.0


MET = pytest.StashKey[dict[str, Met]]()


@pytest.fixture(scope="session")
def met(request: pytest.FixtureRequest) -> Callable[[str], Any]:
    """`with met(suite)(input):` lets our own errors pass, counts them, and fails on any other and on a slow input."""
    from soup_xb.core.errors import SoupError

    suites = request.config.stash.setdefault(MET, {})

    def suite(name: str) -> Callable[[object], Any]:
        tally = suites.setdefault(name, Met())

        @contextmanager
        def one(given: object) -> Iterator[None]:
            began = time.process_time()
            try:
                yield
            except SoupError as error:
                assert error.exit_code in (2, 3, 4, 5), error
                for problem in error.problems:
                    assert problem.render().replace("\n", "").isprintable()
                tally.codes[error.problems[0].code] += 1
            else:
                tally.taken += 1
            seconds = time.process_time() - began
            if seconds > tally.seconds:
                tally.seconds, tally.slowest = seconds, repr(given)[:160]
            assert seconds < LONGEST_SECONDS, f"{seconds:.2f} s"

        return one

    return suite


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """What a test met goes into its report, and from there into the table at the end."""
    if call.when != "call":
        return
    suites = item.config.stash.get(MET, {})
    for name, tally in suites.items():
        hand_over_fuzzing(item, name, tally)
    suites.clear()
