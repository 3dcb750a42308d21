"""Embeddings: texts become vectors, and those that belong together are told from all others of the micro-batch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from soup_xb.backends.torch.processes import Processes
from soup_xb.backends.torch.reward_losses import embedding
from soup_xb.core.objectives.settings import Embedding
from soup_xb.core.rows.batches import MicroBatch
from soup_xb.core.run.session import StepSettings

# The means that are told, in the order in which processes add them up.
_NAMES = ("accuracy", "positive_cosine", "negative_cosine")


def embed(model: Any, batch: MicroBatch, pooling: str, place: torch.device) -> Tensor:
    """The pooled hidden states of each row of a batch, float32 (rows, width): mean, cls (the first) or last."""
    lengths = torch.from_numpy(np.maximum(_lengths(batch), 1)).to(place)
    ids = torch.from_numpy(batch.tokens.astype(np.int64)).to(place)
    real = torch.arange(ids.shape[1], device=place) < lengths.unsqueeze(1)
    # Encoders look both ways, so padding must be hidden from them.
    settings = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    hidden = model(input_ids=ids, attention_mask=real.long(), **settings).last_hidden_state.float()
    if pooling == "cls":
        pooled = hidden[:, 0]
    elif pooling == "last":
        pooled = hidden[torch.arange(len(ids), device=place), lengths - 1]
    else:
        pooled = torch.where(real.unsqueeze(-1), hidden, 0.0).sum(1) / lengths.unsqueeze(1)
    # Without rows a batch is one padding token, so that every process takes part.
    return pooled[: len(batch.lengths)]


class EmbeddingTask:
    """Multiple negatives ranking over the anchors of a step.

    The wrong answers to an anchor are all other candidates of its micro-batch, those of other processes too.
    """

    def __init__(self, objective: Embedding, processes: Processes, place: torch.device) -> None:
        """Compute on `place`, with candidates and sums of all processes; the objective's pooling is decided."""
        self._objective, self._pooling = objective, objective.pooling
        self._processes, self._place = processes, place
        self._sums = torch.zeros(len(_NAMES) + 1, 2, dtype=torch.float64)

    def begin(self, model: Any, batches: Sequence[MicroBatch]) -> None:
        """Each micro-batch stands for itself."""
        self._sums.zero_()

    def summed(self, model: Any, batch: MicroBatch) -> Tensor:
        """Sum over the anchors of this process."""
        contrast = batch.contrast
        if contrast is None:
            raise RuntimeError("an embedding task needs batches of anchors with their candidates")
        anchors = embed(model, batch, self._pooling, self._place)
        own = embed(model, contrast.candidates, self._pooling, self._place)
        places = torch.from_numpy(contrast.places).to(self._place)
        candidates = _OfAllProcesses.apply(own, places, contrast.count, self._processes)
        right = torch.from_numpy(contrast.right).to(self._place)
        each, metrics = embedding(anchors, candidates, self._objective, right)
        self._sums[-1, 0] += len(each)
        # Alone with its positive an anchor has nothing to confuse it with.
        if contrast.count > 1:
            totals = torch.stack([metrics[name].sum() for name in ("accuracies", "positives", "negatives")])
            self._sums[:-1, 0] += totals.cpu().double()
            self._sums[:-1, 1] += len(each)
        return each.sum()

    def divisor(self, step: StepSettings) -> int:
        """The step's anchors."""
        return step.examples

    def finish(self, training: bool) -> tuple[int, Mapping[str, float]]:
        """The anchors of all processes; the share whose positive is nearest, and mean cosines."""
        shared = self._sums.to(self._place, torch.float32 if self._place.type == "mps" else torch.float64)
        self._processes.sum_([shared])
        *sums, (examples, _) = shared.tolist()
        return int(examples), {
            name: total / count for name, (total, count) in zip(_NAMES, sums, strict=True) if count
        }

    def parameters(self) -> Mapping[str, torch.nn.Parameter]:
        """The adapter is all."""
        return {}

    def state(self) -> Mapping[str, float]:
        """Nothing is carried."""
        return {}

    def load(self, state: Mapping[str, float]) -> None:
        """Nothing was."""


class _OfAllProcesses(torch.autograd.Function):
    """Vectors (own, width) of this process -> (count, width) of all, each at its place; gradients come back summed."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, places: Tensor, count: int, processes: Processes) -> Tensor:
        ctx.save_for_backward(places)
        ctx.processes = processes
        whole = own.new_zeros(count, own.shape[1])
        whole[places] = own
        processes.sum_([whole])
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (places,) = ctx.saved_tensors
        whole = gradient.clone()
        ctx.processes.sum_([whole])
        return whole[places], None, None, None


def _lengths(batch: MicroBatch) -> np.ndarray[Any, Any]:
    lengths = np.ones(len(batch.tokens), dtype=np.int64)
    lengths[: len(batch.lengths)] = batch.lengths
    return lengths
