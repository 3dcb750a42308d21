"""The loss of many targets, the logits of a few at a time (see soup_xb.core.objectives.head_chunks).

The decoder runs once. For each chunk of its hidden states the model's own forward runs again with the decoder answering
at once with that chunk, so that whatever the model does to logits (soft caps, scaling) is done by its own code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as functional
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput


def decoder_of(model: Any) -> Any:
    """What computes hidden states below the head; None where it cannot be told apart from the model."""
    decoder = model.base_model
    return None if decoder is model else decoder


@contextmanager
def caught_output(decoder: Any) -> Iterator[list[Any]]:
    """Inside, what the decoder gives is put into the list."""
    caught: list[Any] = []
    handle = decoder.register_forward_hook(lambda _module, _inputs, output: caught.append(output))
    try:
        yield caught
    finally:
        handle.remove()


def hidden_states(caught: list[Any]) -> torch.Tensor | None:
    """The decoder's hidden states (rows * length, hidden) in the flattened grid; None if it gave something else."""
    if len(caught) != 1 or not isinstance(caught[0], ModelOutput):
        return None
    hidden = caught[0].get("last_hidden_state")
    return None if hidden is None else hidden.reshape(-1, hidden.shape[-1])


def chunk_logits(model: Any, decoder: Any, kind: type, hidden: torch.Tensor) -> torch.Tensor:
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


def chunked_losses(
    model: Any, kind: type, hidden: torch.Tensor, targets: torch.Tensor, chunks: int
) -> torch.Tensor:
    """Cross-entropy (nats) of each target (n,), float32, from hidden states (n or more, hidden) in so many chunks."""
    decoder = decoder_of(model)

    def losses(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(chunk_logits(model, decoder, kind, hidden), targets, reduction="none")

    padded = functional.pad(targets, (0, len(hidden) - len(targets)))
    parts = zip(hidden.tensor_split(chunks), padded.tensor_split(chunks), strict=True)
    each = torch.cat([checkpoint(losses, *part, use_reentrant=False) for part in parts])
    return each[: len(targets)]
