"""The declarations, and configs that code builds."""

from __future__ import annotations

import pytest
from attrs.exceptions import FrozenInstanceError

from soup_xb.core.config.keys import Range
from soup_xb.core.config.schema import KEYS, Config, DataConfig, LoraConfig, TrainingConfig


def test_every_key_has_one_line_of_meaning() -> None:
    for name, key in KEYS.items():
        assert key.meaning.endswith("."), name
        assert "\n" not in key.meaning, name


def test_every_default_lies_in_its_range() -> None:
    for name, key in KEYS.items():
        if key.kind in ("integer", "number") and key.default is not None:
            assert key.range.holds(key.default), name
        if key.choices:
            assert key.default in key.choices, name


@pytest.mark.parametrize(
    ("allowed", "inside", "outside"),
    [
        (Range(1, 3), (1, 2, 3), (0, 4)),
        (Range(0, 1, above=True), (0.1, 1), (0, 1.1)),
        (Range(0, 1, below=True), (0, 0.9), (-0.1, 1)),
        (Range(2), (2, 10**9), (1,)),
        (Range(), (-1, 1), ()),
    ],
)
def test_a_range_holds_its_numbers(
    allowed: Range, inside: tuple[float, ...], outside: tuple[float, ...]
) -> None:
    assert all(allowed.holds(value) for value in inside)
    assert not any(allowed.holds(value) for value in outside)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        TrainingConfig().lr = 1.0  # type: ignore[misc]


def test_code_cannot_build_what_no_file_could_say() -> None:
    with pytest.raises(ValueError, match="lr must be above 0"):
        TrainingConfig(lr=0.0)
    with pytest.raises(ValueError, match="rank_pattern must be 1 to 1024"):
        LoraConfig(rank_pattern={"q_proj": 0})
    with pytest.raises(ValueError, match="task must be one of"):
        Config(base="tiny", data=DataConfig(train="x"), task="singing")


def test_lists_become_tuples_and_one_path_a_tuple_of_one() -> None:
    assert DataConfig(train=["a", "b"]).train == ("a", "b")
    assert DataConfig(train="a").train == ("a",)
    assert LoraConfig(target_modules=["q_proj"]).target_modules == ("q_proj",)
