"""What tests counted, in tables at the end of a run, whichever process ran them.

A test hands its counts over in its report (`user_properties`), which pytest-xdist brings from a worker to the process
that prints; a worker's memory ends with the worker.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from attrs import asdict, define, field

CASES, FUZZING = "cases", "fuzzing"


@define
class Met:
    """The inputs of one fuzz suite: how many were taken, the codes of the refusals, and the slowest."""

    taken: int = 0
    codes: Counter[str] = field(factory=Counter)
    seconds: float = 0.0
    slowest: str = ""

    @property
    def refused(self) -> int:
        return sum(self.codes.values())

    def add(self, other: Met) -> None:
        self.taken += other.taken
        self.codes.update(other.codes)
        if other.seconds > self.seconds:
            self.seconds, self.slowest = other.seconds, other.slowest


def hand_over_cases(node: pytest.Item, suite: str, cases: int) -> None:
    """Put cases that ended as they should into the test's report."""
    node.user_properties.append((CASES, [suite, cases]))


def hand_over_fuzzing(node: pytest.Item, suite: str, met: Met) -> None:
    """Put what a fuzz suite met into the test's report, in types that travel between processes."""
    node.user_properties.append((FUZZING, [suite, {**asdict(met), "codes": dict(met.codes)}]))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    suites: dict[str, Met] = {}
    for suite, met in _handed_over(terminalreporter, FUZZING):
        suites.setdefault(suite, Met()).add(Met(**{**met, "codes": Counter(met["codes"])}))
    if suites:
        terminalreporter.section("fuzzing")
    for name, tally in suites.items():
        terminalreporter.write_line(
            f"{tally.taken + tally.refused:8,}  {name}: {tally.taken:,} taken, {tally.refused:,} refused with "
            f"{len(tally.codes)} codes; slowest {tally.seconds:.2f} s: {tally.slowest}"
        )
    counts: Counter[str] = Counter()
    for suite, cases in _handed_over(terminalreporter, CASES):
        counts[suite] += cases
    if counts:
        terminalreporter.section("cases that ended as they should")
    for suite, cases in counts.items():
        terminalreporter.write_line(f"{cases:8,}  {suite}")


def _handed_over(terminalreporter: Any, kind: str) -> Iterator[Any]:
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport) and report.when == "call":
                yield from (value for key, value in report.user_properties if key == kind)
