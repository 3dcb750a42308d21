"""The output head on trained positions alone: the vocabulary is a model's largest matrix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from attrs import evolve, frozen

from soup_xb.core.batches import MicroBatch


@contextmanager
def head_on_positions(model: Any, positions: torch.Tensor) -> Iterator[None]:
    """Inside, the head sees hidden states (1, n, hidden) of `positions` (n,) in the flattened (rows * length) grid.

    The model's own forward still does what it does after the head (soft caps, scaling), so the logits (1, n,
    vocabulary) are those of the full computation at these positions.
    """

    def select(_module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden = inputs[0]
        return (hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions).unsqueeze(0), *inputs[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


@frozen(eq=False)
class BatchTensors:
    """A MicroBatch on the device; see soup_xb.core.batches. `counts` are the targets of each row."""

    tokens: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    position_ids: torch.Tensor | None
    counts: tuple[int, ...]

    @classmethod
    def of(cls, batch: MicroBatch, place: torch.device) -> BatchTensors:
        """Copies of the arrays, ids as int64."""
        ids = batch.position_ids
        return cls(
            torch.from_numpy(batch.tokens.astype(np.int64)).to(place),
            torch.from_numpy(batch.positions).to(place),
            torch.from_numpy(batch.targets).to(place),
            None if ids is None else torch.from_numpy(ids.astype(np.int64)).to(place),
            tuple(batch.row_targets.tolist()),
        )


def summed_loss(model: Any, batch: BatchTensors) -> torch.Tensor:
    """Sum of the cross-entropies (nats) at `positions`, in float32."""
    return functional.cross_entropy(_logits(model, batch), batch.targets, reduction="sum")


def row_log_probabilities(model: Any, batch: BatchTensors) -> torch.Tensor:
    """Log-probability (nats) of each row's targets, their sum, float32 (rows,)."""
    each = -functional.cross_entropy(_logits(model, batch), batch.targets, reduction="none")
    if not batch.counts:
        return each
    # Targets stand row by row; a sum over a slice has one order, which scattered additions do not have.
    return torch.stack([row.sum() for row in each.split(batch.counts)])


def pass_through(model: Any, batch: BatchTensors) -> None:
    """A forward for what hooks see of it: the head has no position to work on."""
    _logits(model, evolve(batch, positions=batch.positions[:0]))


def _logits(model: Any, batch: BatchTensors) -> torch.Tensor:
    """Float32 logits (n, vocabulary) at `positions`.

    Rows are padded on the right: causal attention keeps padding out of every real token's sight, so no mask is
    needed. Position ids that restart tell transformers where a document ends, and attention does not cross it.
    """
    with head_on_positions(model, batch.positions):
        packed = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
        logits: torch.Tensor = model(input_ids=batch.tokens, use_cache=False, **packed).logits
    return logits[0].float()
