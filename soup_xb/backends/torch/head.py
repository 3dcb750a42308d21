"""The output head on trained positions alone: the vocabulary is a model's largest matrix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from attrs import evolve, field, frozen

from soup_xb.backends.torch.chunked_head import (
    caught_output,
    chunk_logits,
    chunked_losses,
    decoder_of,
    hidden_states,
)
from soup_xb.backends.torch.shared_head import sharing_processes
from soup_xb.core.objectives.head_chunks import positions_at_once
from soup_xb.core.rows.batches import MicroBatch


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
    """A MicroBatch on the device; see soup_xb.core.rows.batches. `counts` are the targets of each row."""

    tokens: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    position_ids: torch.Tensor | None
    counts: tuple[int, ...]
    inputs: Mapping[str, torch.Tensor] = field(factory=dict)

    @classmethod
    def of(cls, batch: MicroBatch, place: torch.device) -> BatchTensors:
        """Copies of the arrays, ids as int64, and what the files of the rows give."""
        ids = batch.position_ids
        return cls(
            torch.from_numpy(batch.tokens.astype(np.int64)).to(place),
            torch.from_numpy(batch.positions).to(place),
            torch.from_numpy(batch.targets).to(place),
            None if ids is None else torch.from_numpy(ids.astype(np.int64)).to(place),
            tuple(batch.row_targets.tolist()),
            {name: torch.from_numpy(array).to(place) for name, array in batch.inputs().items()},
        )

    def arguments(self, model: Any) -> dict[str, torch.Tensor]:
        """The model's arguments: tokens by the name that it gives them, inputs in its number format."""
        name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
        inputs = {
            key: value.to(model.dtype) if value.is_floating_point() else value
            for key, value in self.inputs.items()
        }
        packed = {} if self.position_ids is None else {"position_ids": self.position_ids}
        return {name: self.tokens, **packed, **inputs}


def summed_loss(model: Any, batch: BatchTensors) -> torch.Tensor:
    """Sum of the cross-entropies (nats) at `positions`, in float32."""
    if (each := _losses_in_chunks(model, batch)) is not None:
        return each.sum()
    return functional.cross_entropy(_logits(model, batch), batch.targets, reduction="sum")


def row_log_probabilities(model: Any, batch: BatchTensors) -> torch.Tensor:
    """Log-probability (nats) of each row's targets, their sum, float32 (rows,)."""
    losses = _losses_in_chunks(model, batch)
    if losses is None:
        losses = functional.cross_entropy(_logits(model, batch), batch.targets, reduction="none")
    each = -losses
    if not batch.counts:
        return each
    # Targets stand row by row; a sum over a slice has one order, which scattered additions do not have.
    return torch.stack([row.sum() for row in each.split(batch.counts)])


def _losses_in_chunks(model: Any, batch: BatchTensors) -> torch.Tensor | None:
    """Cross-entropy of each target (n,), float32; None where the head had better see all of them at once.

    That is so for few targets, and for a model whose head is not told apart from the rest (the first target's logits
    show it). Processes that share the model take part in every forward, so all do what suits the one with most targets.
    """
    decoder, processes = decoder_of(model), sharing_processes(model)
    most = processes.largest(len(batch.positions))
    at_once = positions_at_once(most, model.config.get_text_config().vocab_size)
    if at_once >= most or decoder is None or not processes.can_chunk:
        return None
    with caught_output(decoder) as caught:
        shown = _logits(model, evolve(batch, positions=batch.positions[:1]))
    states = hidden_states(caught)
    if states is None:
        return None
    kind, hidden = type(caught[0]), states.index_select(0, batch.positions)
    with torch.no_grad():
        again = chunk_logits(model, decoder, kind, hidden[:1])
        close = torch.allclose(
            shown, again, rtol=1e-2, atol=1e-3 * max(shown.abs().flatten().tolist(), default=0.0)
        )
        if processes.largest(not close):
            return None
    chunks = -(-most // at_once)
    # A process with fewer targets than chunks fills up with states that count for nothing.
    rest = states[:1].expand(max(0, chunks - len(hidden)), -1)
    each = chunked_losses(model, kind, torch.cat([hidden, rest]), batch.targets, chunks)
    # No value, and a way back: FSDP makes the model ready for the backward where its own output has a part in it.
    return each + shown[:, :0].sum()


def pass_through(model: Any, batch: BatchTensors) -> None:
    """A forward for what hooks see of it: the head has no position to work on."""
    _logits(model, evolve(batch, positions=batch.positions[:0]))


def target_log_probabilities(model: Any, batch: BatchTensors, temperature: float = 1.0) -> torch.Tensor:
    """Log-probability (nats) of each target, float32 (n,), of logits divided by `temperature`."""
    return -functional.cross_entropy(_logits(model, batch) / temperature, batch.targets, reduction="none")


def _logits(model: Any, batch: BatchTensors) -> torch.Tensor:
    """Float32 logits (n, vocabulary) at `positions`.

    Rows are padded on the right: causal attention keeps padding out of every real token's sight, so no mask is
    needed. Position ids that restart tell transformers where a document ends, and attention does not cross it.
    """
    with head_on_positions(model, batch.positions):
        logits: torch.Tensor = model(**batch.arguments(model), use_cache=False).logits
    return logits[0].float()
