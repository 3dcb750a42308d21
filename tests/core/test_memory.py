"""The estimate of memory that `soupx plan` shows."""

from __future__ import annotations

from soup_xb.core.config import TrainingConfig
from soup_xb.core.memory import LargestBatch, MemoryEstimate, estimate_memory
from soup_xb.core.session import BaseDescription


def estimate(processes: int, sharding: str) -> MemoryEstimate:
    base = BaseDescription(
        model_type="llama", parameters=10_000_000, layers=100, hidden_size=100, intermediate_size=300,
        vocabulary_size=10_000, modules=(),
    )  # fmt: skip
    return estimate_memory(
        base, (), TrainingConfig(sharding=sharding), "fp32", LargestBatch(64, 64, processes)
    )


def test_a_process_of_a_sharded_base_holds_its_part_and_two_blocks() -> None:
    whole = estimate(1, "none")
    assert whole.base == 40_000_000
    assert estimate(4, "none") == whole
    assert estimate(1, "fsdp") == whole
    cut = estimate(4, "fsdp")
    assert cut.base == 10_000_000 + 2 * 360_000
    assert cut.activations == whole.activations
