"""How much memory a run will take, from sizes alone: an estimate by the largest micro-batch, to choose settings by."""

from __future__ import annotations

from attrs import frozen

from soup_xb.core.adapter.vera import shared_entries
from soup_xb.core.base.modules import AdapterModule
from soup_xb.core.config.schema import Config, TrainingConfig
from soup_xb.core.objectives.head_chunks import positions_at_once
from soup_xb.core.rows.row import RowFacts
from soup_xb.core.run.session import BaseDescription
from soup_xb.core.tasks import TASKS

_WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0}
# 4 bits and a scale for 64 weights that is quantized itself; 8 bits and a scale a row.
_QUANTIZED_BYTES = {"4bit": 0.52, "8bit": 1.01}
# Whole blocks at a time where processes share the base.
_GATHERED = 3


@frozen
class MemoryEstimate:
    """Bytes for one process. `adapter` counts float32 factors, gradients and two moments, and VeRA's projections."""

    base: int
    adapter: int
    activations: int

    @property
    def total(self) -> int:
        """All parts together."""
        return self.base + self.adapter + self.activations


def estimate_memory(
    description: BaseDescription,
    adapters: tuple[AdapterModule, ...],
    training: TrainingConfig,
    precision: str,
    batch: LargestBatch,
) -> MemoryEstimate:
    """Estimate for one process with its largest micro-batch.

    Kept activations are taken as, for each block and token, the inputs of its matrix products and norms (about 10
    hidden and 4 intermediate sizes), or one hidden size with gradient checkpointing, plus the head's logits
    and their gradient in float32 on the positions that go through it together; rows that train on fewer need less.
    With `sharding: fsdp` a process holds its part of the base and three whole blocks: the one that computes, what
    it is gathered into, and the messages (2.85 measured, two gloo processes; `python bench/sharding.py memory`).
    """
    width = _WEIGHT_BYTES[precision]
    # Experts keep their format: only linear layers are quantized.
    linear = sum(
        module.out_features * module.in_features for module in description.modules if not module.experts
    )
    plain = description.parameters - linear if training.quantization != "none" else description.parameters
    quantized = description.parameters - plain
    base = plain * width + quantized * _QUANTIZED_BYTES.get(training.quantization, 0.0)
    if training.sharding == "fsdp" and batch.processes > 1:
        blocks = base - description.vocabulary_size * description.hidden_size * width
        base = base / batch.processes + _GATHERED * max(0.0, blocks) / max(1, description.layers)
    moments = 0 if training.optimizer == "sgd" else 2
    trained = sum(module.parameters for module in adapters)
    adapter = 4 * ((2 + moments) * trained + shared_entries(adapters))
    block = 10 * description.hidden_size + 4 * description.intermediate_size
    kept = description.layers * (description.hidden_size if training.gradient_checkpointing else block)
    live = block if training.gradient_checkpointing else 0
    logits = 2 * 4 * batch.through_head * description.vocabulary_size
    activations = batch.tokens * (kept + live) * width + logits
    return MemoryEstimate(int(base), adapter, int(activations))


@frozen
class LargestBatch:
    """Of one of `processes`: its `tokens` with their padding, and how many of them go `through_head` together."""

    tokens: int
    through_head: int
    processes: int = 1

    @classmethod
    def of(cls, config: Config, facts: RowFacts, vocabulary: int, processes: int) -> LargestBatch:
        """A run's, from its rows: both answers of a pair, all answers to a prompt, all texts of a row that embeds."""
        task, training = TASKS[config.task], config.training
        rows = training.batch_size // processes
        longest = int(facts.lengths.max())
        if task.embeds:
            return cls(rows * int(facts.tokens.max()), 0, processes)
        if task.scores:
            return cls(2 * rows * longest, 2 * rows, processes)
        tokens = trained = rows * longest * (2 if task.kind == "pair" else 1)
        if task.samples:
            answers, new = rows * training.group_size, training.max_new_tokens
            tokens, trained = answers * (longest + new), answers * new
        return cls(tokens, positions_at_once(trained, vocabulary), processes)
