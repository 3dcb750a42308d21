"""The golden table of what is trained on under nine template families; `tests/family_masks.py` writes it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from family_masks import FAMILIES, TABLE, table

EXPECTED: dict[str, Any] = json.loads(TABLE.read_text("utf-8"))


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return table()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_masks_of_a_family_are_those_of_the_golden_table(made: dict[str, Any], family: str) -> None:
    assert made[family] == EXPECTED[family]


def test_the_golden_table_holds_every_family() -> None:
    assert EXPECTED.keys() == FAMILIES.keys()
    assert len(FAMILIES) >= 8
