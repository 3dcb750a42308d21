"""What a model is asked for: log-probabilities, answers, vectors of texts, and a reward model's scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from attrs import frozen
from safetensors.numpy import save_file

from soup_xb.backends.mlx.adapters import Arrays, factor_from_numpy, factor_to_numpy
from soup_xb.backends.mlx.device import memory_guard
from soup_xb.backends.mlx.generation import sample
from soup_xb.backends.mlx.head import (
    Grid,
    at_places,
    exact_grid,
    grid_size,
    hidden_states,
    padded_grid,
    padded_tokens,
    taken_back,
    token_logps,
)
from soup_xb.backends.mlx.load import Opened
from soup_xb.backends.mlx.processes import Processes
from soup_xb.core.adapter.extras import head_start, pooling_for
from soup_xb.core.adapter.peft_file import HEAD, check_factors
from soup_xb.core.adapter.plan import AdapterPlan
from soup_xb.core.errors import CheckpointError, ModelError, Problem
from soup_xb.core.rows.batches import MicroBatch, score_places
from soup_xb.core.run.checkpoint import read_tensors
from soup_xb.core.run.session import GenerationSettings, SessionSettings

Array = np.ndarray[Any, Any]
HEAD_FILE = "task.safetensors"
# A vector that is shorter is not scaled to length 1; torch's value.
_LEAST_NORM = 1e-12


@frozen(eq=False)
class OpenBase:
    """An opened base: `model()` gives it, and inside `with_adapter(False)` it is without its adapter.

    `check_length` raises ModelError for rows that are longer than it reads exactly. `cached`: it may answer with a
    cache.
    """

    model: Callable[[], Any]
    processes: Processes
    with_adapter: Callable[[bool], AbstractContextManager[Any]]
    check_length: Callable[[int], None]
    cached: bool = True


@frozen(eq=False)
class Outputs:
    """What an opened base can be asked for; what it cannot give is None."""

    base: OpenBase
    scorer: MlxScorer | None = None
    sampler: MlxSampler | None = None
    embedder: MlxEmbedder | None = None
    judge: ScoreHead | None = None
    temperature: float = 1.0
    notices: tuple[Problem, ...] = ()

    @classmethod
    def of(cls, base: OpenBase, settings: SessionSettings, opened: Opened) -> Outputs:
        """Vectors of a base that was opened without its head, else words and scores."""
        if settings.pooling:
            pooling, reason = pooling_for(settings.pooling, settings.base)
            told = Problem("pooling", f"{pooling}: {reason}")
            return cls(base, embedder=MlxEmbedder(base, pooling), notices=(told,))
        scored = settings.objective.outputs == "scores"
        judge = ScoreHead(base, opened, settings.seed) if scored else None
        temperature = settings.objective.temperature
        return cls(base, MlxScorer(base), MlxSampler(base), judge=judge, temperature=temperature)

    def arrays(self, batch: MicroBatch, padded: bool) -> tuple[mx.array, ...]:
        """What `compute` takes of a batch; `padded` to a grid of few sizes, so that it is compiled few times."""
        self.base.check_length(batch.tokens.shape[1])
        if self.embedder is not None:
            return self.embedder.arrays(batch, padded)
        if self.judge is not None:
            return self.judge.arrays(batch, padded)
        return (padded_grid if padded else exact_grid)(batch).arrays

    def compute(self, arrays: Sequence[mx.array]) -> Any:
        """What the objective asks of the model for a batch."""
        if self.embedder is not None:
            return self.embedder.compared(arrays)
        if self.judge is not None:
            return self.judge.of(arrays)
        return token_logps(self.base.model(), Grid(*arrays), self.temperature)

    def values(self) -> Arrays:
        """What is trained beside the adapter, by name, in the shape of mlx-lm's factors."""
        return {} if self.judge is None else {HEAD: self.judge.weight}

    def place(self, values: Mapping[str, mx.array]) -> None:
        """Make these, which may be those of a trace, what is trained beside the adapter."""
        if self.judge is not None:
            self.judge.weight = values[HEAD]


class MlxScorer:
    """See soup_xb.core.objectives.objective.Scorer."""

    def __init__(self, base: OpenBase) -> None:
        """Ask the model of `base`."""
        self._base = base

    def token_logps(self, batch: MicroBatch, temperature: float = 1.0, adapter: bool = True) -> Array:
        """Log-probability of each target."""
        self._base.check_length(batch.tokens.shape[1])
        with self._base.with_adapter(adapter), memory_guard("scoring answers"):
            return taken_back(batch, token_logps(self._base.model(), exact_grid(batch), temperature))

    def sum(self, values: Array) -> Array:
        """Values summed over all processes."""
        whole = np.asarray(values, dtype=np.float64)
        summed = [self._base.processes.sum_exactly(float(value)) for value in whole.reshape(-1)]
        return np.array(summed).reshape(whole.shape)


class MlxSampler:
    """See soup_xb.core.run.session.Sampler. Prompts are padded on the left, and padding is masked."""

    def __init__(self, base: OpenBase) -> None:
        """Sample from the model as it is."""
        self._base = base

    def sample(
        self, prompts: Sequence[Array], chances: Array, settings: GenerationSettings, adapter: bool = True
    ) -> list[Array]:
        """Continue each prompt, with the tokens that `chances` choose."""
        self._base.check_length(max(map(len, prompts)) + settings.max_new_tokens)
        with self._base.with_adapter(adapter), memory_guard("sampling answers"):
            return sample(self._base.model(), prompts, chances, settings, self._base.cached)


class MlxEmbedder:
    """See soup_xb.core.run.session.Embedder."""

    def __init__(self, base: OpenBase, pooling: str) -> None:
        """Pool the hidden states of the model of `base`."""
        self.pooling, self._base = pooling, base

    def embeddings(self, batch: MicroBatch, adapter: bool = True) -> Array:
        """A unit vector for each row."""
        self._base.check_length(batch.tokens.shape[1])
        with self._base.with_adapter(adapter), memory_guard("embedding texts"):
            vectors = np.array(self._vectors(*self._texts(batch, batch.tokens.shape[1])))
        norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
        result: Array = vectors / np.maximum(norms, _LEAST_NORM)
        return result

    def arrays(self, batch: MicroBatch, padded: bool) -> tuple[mx.array, ...]:
        """The anchors of a batch, its candidates, and at which places of all candidates these stand."""
        if batch.beside is None:
            raise RuntimeError("an embedding task needs batches of anchors with their candidates")
        self._base.check_length(batch.beside.tokens.shape[1])
        length, longest = batch.tokens.shape[1], batch.beside.tokens.shape[1]
        if padded:
            # Anchors are short as a rule: fewer sizes of theirs, for each of which there are all of the candidates.
            length, longest = grid_size(length, steps=2), grid_size(longest, steps=8)
        places = batch.constants["places"]
        spread = np.zeros((int(batch.constants["count"]), len(batch.beside.tokens)), dtype=np.float32)
        spread[places, np.arange(len(places))] = 1.0
        return (*self._texts(batch, length), *self._texts(batch.beside, longest), mx.array(spread))

    def compared(self, arrays: Sequence[mx.array]) -> tuple[mx.array, mx.array]:
        """The anchors of a batch (rows, width), and the candidates of all processes (count, width)."""
        anchors, pool, candidates, candidate_pool, spread = arrays
        own = spread @ self._vectors(candidates, candidate_pool)
        return self._vectors(anchors, pool), self._base.processes.sum_of_all(own)

    def _texts(self, batch: MicroBatch, wide: int) -> tuple[mx.array, mx.array]:
        """Tokens (rows, wide), and by how much each counts for its row's vector, float32 (rows, 1, wide)."""
        lengths = np.maximum(batch.lengths, 1)[:, None]
        places = np.arange(wide)[None]
        counts = {
            "mean": (places < lengths) / lengths,
            "cls": (places == 0) & (lengths > 0),
            "last": places == lengths - 1,
        }[self.pooling]
        return mx.array(padded_tokens(batch, wide)), mx.array(counts[:, None].astype(np.float32))

    def _vectors(self, tokens: mx.array, pool: mx.array) -> mx.array:
        """The pooled hidden states of each row, float32 (rows, width)."""
        hidden = hidden_states(self._base.model(), tokens).astype(mx.float32)
        return (pool @ hidden)[:, 0]


class ScoreHead:
    """See soup_xb.core.run.session.Judge. The head, `weight` (width, 1), is float32 and trained with the adapter."""

    def __init__(self, base: OpenBase, opened: Opened, seed: int) -> None:
        """Make the head for the base's hidden states, from core's start for `seed`."""
        self._base, self._pad_id = base, opened.reading.pad_id
        self.weight = factor_from_numpy(head_start(opened.description.hidden_size, seed))

    def head(self) -> Array:
        """The head's weight, a copy."""
        return factor_to_numpy(self.weight)

    def load_head(self, head: Array) -> None:
        """Set the head's weight."""
        check_factors({HEAD: tuple(reversed(self.weight.shape))}, {HEAD: head})
        self.weight = factor_from_numpy(head)

    def scores(self, batch: MicroBatch) -> Array:
        """The score of each row."""
        self._base.check_length(batch.tokens.shape[1])
        with memory_guard("scoring answers"):
            return np.array(self.of(self.arrays(batch, padded=False)), copy=True)

    def save(self, folder: Path) -> None:
        """Write the head's weight into a checkpoint."""
        save_file({HEAD: self.head()}, folder / HEAD_FILE)

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote. Raises CheckpointError where it does not fit."""
        file = folder / HEAD_FILE
        found = read_tensors(file)
        expected = {HEAD: tuple(reversed(self.weight.shape))}
        if {name: array.shape for name, array in found.items()} != expected:
            raise CheckpointError("foreign-checkpoint", "is not the state of this task", where=str(file))
        self.load_head(found[HEAD])

    def arrays(self, batch: MicroBatch, padded: bool) -> tuple[mx.array, ...]:
        """The tokens of a batch, and where each row is scored in the flattened grid."""
        rows, length = batch.tokens.shape
        wide = grid_size(length, steps=8) if padded else length
        places = score_places(batch, self._pad_id) + np.arange(rows) * wide
        return mx.array(padded_tokens(batch, wide)), mx.array(places.astype(np.int32))

    def of(self, arrays: Sequence[mx.array]) -> mx.array:
        """The score of each row, float32 (rows,): the head on the hidden state where stock transformers reads it."""
        tokens, places = arrays
        # Causal attention keeps the padding on the right out of every real token's sight.
        hidden = at_places(hidden_states(self._base.model(), tokens), places)
        return (hidden.astype(mx.float32) @ self.weight)[:, 0]


def check_scorable(opened: Opened, plan: AdapterPlan) -> None:
    """Raise ModelError where stock transformers could not score with what this base and adapter make."""
    if not opened.reading.proven.scores:
        raise ModelError(
            "no-score-head",
            f"transformers has no sequence classification with a `{HEAD}` head for `{opened.description.model_type}`",
            where="task",
            help="take a base of another type, such as Llama, Qwen or Mistral.",
        )
    astray = next((adapter.name for adapter in plan.modules if adapter.name == "lm_head"), None)
    if astray is not None:
        raise ModelError(
            "no-score-head",
            f"`{astray}` is not part of the model that scores, which has no output head",
            where="training.lora.target_modules",
            help="use `target_modules: auto`.",
        )
