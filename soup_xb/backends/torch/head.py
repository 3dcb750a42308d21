"""The output head on trained positions alone: the vocabulary is a model's largest matrix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as functional


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


def summed_loss(
    model: Any, tokens: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Sum of the cross-entropies (nats) at `positions`, in float32.

    `tokens` is (rows, length), padded on the right: causal attention keeps padding out of every real token's
    sight, so no mask is needed.
    """
    with head_on_positions(model, positions):
        logits = model(input_ids=tokens, use_cache=False).logits
    return functional.cross_entropy(logits[0].float(), targets, reduction="sum")
