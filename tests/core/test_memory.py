"""The estimate of memory that `soupx plan` shows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from soup_xb.core.config.schema import Config, DataConfig, TrainingConfig
from soup_xb.core.rows.examples import Source
from soup_xb.core.rows.row import Prompt, Row, TokenSequence, facts_of
from soup_xb.core.run.memory import LargestBatch, MemoryEstimate, estimate_memory
from soup_xb.core.run.session import BaseDescription


def estimate(processes: int, sharding: str) -> MemoryEstimate:
    base = BaseDescription(
        model_type="llama", parameters=10_000_000, layers=100, hidden_size=100, intermediate_size=300,
        vocabulary_size=10_000, modules=(),
    )  # fmt: skip
    return estimate_memory(
        base, (), TrainingConfig(sharding=sharding), "fp32", LargestBatch(64, 64, processes)
    )


def test_a_process_of_a_sharded_base_holds_its_part_and_three_blocks() -> None:
    whole = estimate(1, "none")
    assert whole.base == 40_000_000
    assert estimate(4, "none") == whole
    assert estimate(1, "fsdp") == whole
    cut = estimate(4, "fsdp")
    assert cut.base == 10_000_000 + 3 * 360_000
    assert cut.activations == whole.activations


def text(length: int, answer: int) -> TokenSequence:
    return TokenSequence(np.arange(length), np.arange(length) >= length - answer, Source("rows.jsonl", 1))


def row(length: int, answer: int) -> Row:
    return Row("tokens", (text(length, answer),))


ROWS: dict[str, Any] = {
    "sft": [row(20, 4), row(30, 4)],
    "dpo": [Row("pair", (text(20, 4), text(30, 9))), Row("pair", (text(25, 5), text(24, 4)))],
    "reward": [Row("pair", (text(20, 4), text(30, 9)))],
    "kto": [
        Row("judged", (text(30, 9), text(28, 7)), True),
        Row("judged", (text(20, 9), text(28, 7)), False),
    ],
    "grpo": [Row("prompt", (text(30, 0),), Prompt({}))],
    "embedding": [Row("embedding", (text(10, 0), text(12, 0), text(8, 0)))],
}


@pytest.mark.parametrize(
    ("task", "tokens", "through_head"),
    [
        ("sft", 2 * 30, 60),
        ("dpo", 2 * 2 * 30, 120),
        ("reward", 2 * 2 * 30, 4),
        ("kto", 2 * 30, 60),
        ("grpo", 2 * 4 * (30 + 6), 2 * 4 * 6),
        ("embedding", 2 * 30, 0),
    ],
)
def test_a_micro_batch_holds_all_that_goes_through_the_model_for_its_rows(
    task: str, tokens: int, through_head: int
) -> None:
    training = TrainingConfig(batch_size=4, group_size=4, max_new_tokens=6)
    config = Config(base="tiny", task=task, data=DataConfig(train=("rows.jsonl",)), training=training)
    batch = LargestBatch.of(config, facts_of(ROWS[task]), 1_000, processes=2)
    assert batch == LargestBatch(tokens, through_head, 2)


def test_the_head_of_a_long_row_is_counted_as_it_is_computed() -> None:
    training = TrainingConfig(batch_size=2)
    config = Config(base="tiny", data=DataConfig(train=("rows.jsonl",)), training=training)
    batch = LargestBatch.of(config, facts_of([row(5_000, 4_000)]), 50_000, 1)
    assert batch.through_head < 700
