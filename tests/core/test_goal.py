"""How much of a streamed dataset the steps of a run need."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soup_xb.core.config.load import parse_config
from soup_xb.core.run.schedule import floor_share
from soup_xb.data.goal import Goal, streaming_goal


def goal(task: str = "sft", **data: object) -> Goal | None:
    content = {
        "base": "tiny",
        "task": task,
        "data": {"train": "owner/name", "streaming": True, "max_length": 100, **data},
        "training": {"max_steps": 5, "batch_size": 3, "gradient_accumulation_steps": 2},
    }
    return streaming_goal(parse_config(json.dumps(content), "soup.yaml").config)


@pytest.mark.parametrize(
    ("task", "data", "expected"),
    [
        ("sft", {}, Goal("rows", 30)),
        ("sft", {"val_split": 0.1}, Goal("rows", 33)),
        ("sft", {"val_split": 0.001}, Goal("rows", 31)),
        ("sft", {"packing": True}, Goal("tokens", 3000, 100)),
        ("pretrain", {"val_split": 0.5}, Goal("tokens", 6000, 100)),
        ("dpo", {}, Goal("rows", 30)),
        ("kto", {}, Goal("answers", 30)),
        ("sft", {"streaming": False}, None),
    ],
)
def test_the_steps_say_how_much_is_taken(task: str, data: dict[str, object], expected: Goal | None) -> None:
    assert goal(task, **data) == expected


@given(st.floats(0.001, 0.9))
@settings(deadline=None)
def test_as_many_rows_are_left_as_the_steps_consume_when_some_are_held_out(share: float) -> None:
    taken = goal(val_split=share)
    assert taken is not None
    assert taken.count - max(1, floor_share(taken.count, share)) == 30


@given(st.lists(st.integers(0, 40), min_size=1, max_size=300), st.integers(1, 2000))
def test_tokens_are_reached_within_a_few_readings_and_not_far_exceeded(
    lengths: list[int], count: int
) -> None:
    """Documents of 0 tokens have nothing to learn."""
    wanted, read, held, readings = Goal("tokens", count, 100), 0, 0, 0
    endless = lengths + [20] * 3000
    while more := wanted.examples_to_read(read, held):
        held += sum(endless[read : read + more])
        read, readings = read + more, readings + 1
    assert held >= count
    assert readings <= 60
    enough = int(np.argmax(np.cumsum(endless) >= count)) + 1
    assert read <= 2 * enough


def test_a_token_that_is_left_over_from_a_cut_document_is_not_counted() -> None:
    counts, lengths = np.ones(3, np.int32), np.array([101, 100, 1], np.int32)
    assert Goal("tokens", 1, 100).held(counts, lengths) == 201
