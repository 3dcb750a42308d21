"""The list of error codes is that of the source, and each code is one word for one thing."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"


@pytest.fixture(scope="module")
def reader() -> Iterator[Any]:
    """The scripts beside the page, which are no package."""
    sys.path.insert(0, str(REFERENCE))
    try:
        import error_codes
        import error_source

        yield error_source, error_codes
    finally:
        sys.path.remove(str(REFERENCE))


@pytest.fixture(scope="module")
def uses(reader: Any) -> list[Any]:
    found: list[Any] = reader[0].uses()
    return found


def test_the_page_is_fresh(reader: Any) -> None:
    page = (REFERENCE / "errors.md").read_text("utf-8")
    assert page == reader[1].errors_page(), "run python docs/reference/generate.py"


def test_every_code_is_a_word(uses: list[Any]) -> None:
    assert len({use.code for use in uses}) > 150
    odd = {use.code for use in uses if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", use.code)}
    assert not odd


def test_a_code_stands_for_one_kind_of_error(reader: Any, uses: list[Any]) -> None:
    """The same finding may be a warning here and an error there, but never two exit codes."""
    kinds = defaultdict(set)
    for use in uses:
        kinds[use.code].add(use.fate)
    assert not {code: found for code, found in kinds.items() if len(found - {reader[0].NOTICE}) > 1}


def test_no_two_codes_say_the_same_in_another_order(uses: list[Any]) -> None:
    codes = {use.code for use in uses}
    assert len({frozenset(code.split("-")) for code in codes}) == len(codes)


def test_every_exception_of_the_list_of_fates_is_in_use(reader: Any, uses: list[Any]) -> None:
    modules = {use.module for use in uses} | {f"{use.module}:{use.code}" for use in uses}
    assert set(reader[0].FATES) <= modules
