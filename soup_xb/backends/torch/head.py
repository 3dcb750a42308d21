"""The output head on trained positions alone, and of many targets a few at a time: it is a model's largest matrix.

For the loss of many targets (see soup_xb.core.objectives.head_chunks) the decoder runs once. For each chunk of its
hidden states the model's own forward runs again with the decoder answering at once with that chunk, so that whatever
the model does to logits (soft caps, scaling) is done by its own code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as functional
from attrs import evolve, field, frozen
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from soup_xb.backends.torch.sharding import compute_device, is_sharded
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
    """A MicroBatch on the device; see soup_xb.core.rows.batches.

    `positions`, `targets` and `places` are (n,), one for each trained token: where its hidden state stands in the
    flattened (rows * length) grid, its id, and where it stands in the flattened (rows * width) targets of `shape`.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    places: torch.Tensor
    shape: tuple[int, int]
    position_ids: torch.Tensor | None
    inputs: Mapping[str, torch.Tensor] = field(factory=dict)

    @classmethod
    def of(cls, batch: MicroBatch, place: torch.device) -> BatchTensors:
        """Copies of the arrays, ids as int64, and what the files of the rows give."""
        ids = batch.position_ids
        trained = np.flatnonzero(batch.weights)
        return cls(
            torch.from_numpy(batch.tokens.astype(np.int64)).to(place),
            torch.from_numpy(batch.positions.reshape(-1)[trained]).to(place),
            torch.from_numpy(batch.targets.reshape(-1)[trained]).to(place),
            torch.from_numpy(trained).to(place),
            batch.targets.shape,
            None if ids is None else torch.from_numpy(ids.astype(np.int64)).to(place),
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


def token_logps(model: Any, batch: BatchTensors, temperature: float = 1.0) -> torch.Tensor:
    """Log-probability (nats) of each target, float32 (rows, width), 0 where nothing is trained.

    Logits are divided by `temperature`.
    """
    losses = _losses_in_chunks(model, batch, temperature)
    if losses is None:
        logits = _logits(model, batch)
        losses = _cross_entropy(logits, batch.targets, temperature)
    rows, width = batch.shape
    return -losses.new_zeros(rows * width).index_copy(0, batch.places, losses).view(rows, width)


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    scaled = logits if temperature == 1.0 else logits / temperature
    return functional.cross_entropy(scaled, targets, reduction="none")


def _losses_in_chunks(model: Any, batch: BatchTensors, temperature: float) -> torch.Tensor | None:
    """Cross-entropy of each target (n,), float32; None where the head had better see all of them at once.

    That is so for few targets, and for a model whose head is not told apart from the rest (the first target's logits
    show it). Processes that share the model take part in every forward, so all do what suits the one with most targets.
    """
    decoder, processes = _decoder_of(model), _sharing_processes(model)
    most = processes.largest(len(batch.positions))
    at_once = positions_at_once(most, model.config.get_text_config().vocab_size)
    if at_once >= most or decoder is None or not processes.can_chunk:
        return None
    with _caught_output(decoder) as caught:
        shown = _logits(model, evolve(batch, positions=batch.positions[:1]))
    states = _hidden_states(caught)
    if states is None:
        return None
    kind, hidden = type(caught[0]), states.index_select(0, batch.positions)
    with torch.no_grad():
        again = _chunk_logits(model, decoder, kind, hidden[:1])
        close = torch.allclose(
            shown, again, rtol=1e-2, atol=1e-3 * max(shown.abs().flatten().tolist(), default=0.0)
        )
        if processes.largest(not close):
            return None
    chunks = -(-most // at_once)
    # A process with fewer targets than chunks fills up with states that count for nothing.
    rest = states[:1].expand(max(0, chunks - len(hidden)), -1)
    each = _chunked_losses(model, kind, torch.cat([hidden, rest]), batch.targets, (chunks, temperature))
    # No value, and a way back: FSDP makes the model ready for the backward where its own output has a part in it.
    return each + shown[:, :0].sum()


def pass_through(model: Any, batch: BatchTensors) -> None:
    """A forward for what hooks see of it: the head has no position to work on."""
    _logits(model, evolve(batch, positions=batch.positions[:0]))


def _logits(model: Any, batch: BatchTensors) -> torch.Tensor:
    """Float32 logits (n, vocabulary) at `positions`.

    Rows are padded on the right: causal attention keeps padding out of every real token's sight, so no mask is
    needed. Position ids that restart tell transformers where a document ends, and attention does not cross it.
    """
    with head_on_positions(model, batch.positions):
        logits: torch.Tensor = model(**batch.arguments(model), use_cache=False).logits
    return logits[0].float()


def _decoder_of(model: Any) -> Any:
    """What computes hidden states below the head; None where it cannot be told apart from the model."""
    decoder = model.base_model
    return None if decoder is model else decoder


@contextmanager
def _caught_output(decoder: Any) -> Iterator[list[Any]]:
    """Inside, what the decoder gives is put into the list."""
    caught: list[Any] = []
    handle = decoder.register_forward_hook(lambda _module, _inputs, output: caught.append(output))
    try:
        yield caught
    finally:
        handle.remove()


def _hidden_states(caught: list[Any]) -> torch.Tensor | None:
    """The decoder's hidden states (rows * length, hidden) in the flattened grid; None if it gave something else."""
    if len(caught) != 1 or not isinstance(caught[0], ModelOutput):
        return None
    hidden = caught[0].get("last_hidden_state")
    return None if hidden is None else hidden.reshape(-1, hidden.shape[-1])


def _chunk_logits(model: Any, decoder: Any, kind: type, hidden: torch.Tensor) -> torch.Tensor:
    """Float32 logits (n, vocabulary) of hidden states (n, hidden); `kind` is the class of the decoder's output."""
    output = kind(last_hidden_state=hidden.unsqueeze(0))
    tokens = torch.zeros((1, len(hidden)), dtype=torch.int64, device=hidden.device)
    decoder.forward = lambda *_arguments, **_named: output
    try:
        # Not by a call: where processes share the model, that would gather what the head has no need of.
        logits: torch.Tensor = model.forward(input_ids=tokens, use_cache=False).logits
    finally:
        del decoder.forward
    return logits[0].float()


def _chunked_losses(
    model: Any, kind: type, hidden: torch.Tensor, targets: torch.Tensor, how: tuple[int, float]
) -> torch.Tensor:
    """Cross-entropy (nats) of each target (n,), float32, from hidden states (n or more, hidden).

    `how` is the number of chunks, and the temperature that logits are divided by.
    """
    chunks, temperature = how
    decoder = _decoder_of(model)

    def losses(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return _cross_entropy(_chunk_logits(model, decoder, kind, hidden), targets, temperature)

    padded = functional.pad(targets, (0, len(hidden) - len(targets)))
    parts = zip(hidden.tensor_split(chunks), padded.tensor_split(chunks), strict=True)
    each = torch.cat([checkpoint(losses, *part, use_reentrant=False) for part in parts])
    return each[: len(targets)]


@frozen(eq=False)
class _SharingProcesses:
    """The processes of `group`, or this one alone. `can_chunk`: their head runs as often as it likes by itself."""

    group: Any
    place: torch.device
    can_chunk: bool

    def largest(self, value: int) -> int:
        """The largest value over all of them, the same on each; it waits for all of them."""
        if self.group is None:
            return value
        shared = torch.tensor([value], dtype=torch.int64, device=self.place)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self.group)
        return int(shared.item())


def _sharing_processes(model: Any) -> _SharingProcesses:
    """Those that hold parts of the model.

    A head whose rows are cut multiplies slice by slice (see vocabulary); any other, and a bias, would have to be
    gathered with the model.
    """
    if not is_sharded(model):
        return _SharingProcesses(None, torch.device("cpu"), can_chunk=True)
    cut = next(weight for weight in model.parameters() if isinstance(weight, DTensor))
    head = model.get_output_embeddings()
    plain = isinstance(head, torch.nn.Linear) and "forward" in vars(head) and head.bias is None
    return _SharingProcesses(cut.device_mesh.get_group(), compute_device(cut), can_chunk=plain)
