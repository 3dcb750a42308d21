"""Token ids that go on: one prompt, or a batch whose tokens are chosen from outside.

A cache keeps keys and values, for model types that give the same with it as without (soup_xb.core.base.proven); for all
others the whole row is read again for each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from soup_xb.backends.mlx.head import for_heads, head_logits, hidden_states, trunk_of
from soup_xb.core.random_numbers import step_seed
from soup_xb.core.run.session import GenerationSettings

Array = np.ndarray[Any, Any]
_PREFILL = 512


def generate_tokens(model: Any, prompt: Any, settings: GenerationSettings, cached: bool = True) -> Array:
    """New token ids, int32, the end token not included; greedy, or sampled from the whole distribution."""
    row = [int(token) for token in np.asarray(prompt)]
    cache = make_prompt_cache(model) if cached else None
    if cache is not None:
        for start in range(0, len(row) - 1, _PREFILL):
            model(mx.array(row[start : min(start + _PREFILL, len(row) - 1)])[None], cache=cache)
            mx.eval([entry.state for entry in cache])
    keys = mx.random.split(mx.random.key(step_seed(settings.seed, "generate")), settings.max_new_tokens)
    new: list[int] = []
    for index in range(settings.max_new_tokens):
        if cache is not None:
            logits = model(mx.array(row[-1:])[None], cache=cache)[:, -1].astype(mx.float32)
        else:
            logits = head_logits(model, hidden_states(model, mx.array(row)[None])[:, -1])
        if settings.temperature > 0:
            chosen = mx.random.categorical(logits / settings.temperature, key=keys[index])
        else:
            chosen = mx.argmax(logits, axis=-1)
        token = int(np.array(chosen)[0])
        if token in settings.end_ids:
            break
        new.append(token)
        row.append(token)
    return np.array(new, dtype=np.int32)


def sample(
    model: Any, prompts: Sequence[Array], chances: Array, settings: GenerationSettings, cached: bool = True
) -> list[Array]:
    """See soup_xb.core.run.session.Sampler."""
    kind = _PaddedBatch if cached else _ReadAgain
    batch: Any = kind(model, prompts, settings.max_new_tokens)
    logits = batch.read_prompts()
    filler = settings.filler(logits.shape[1])
    new = np.full((len(prompts), settings.max_new_tokens), filler, dtype=np.int32)
    ended = np.zeros(len(prompts), dtype=bool)
    for index in range(settings.max_new_tokens):
        tokens = chosen_tokens(logits, chances[:, index], settings.temperature)
        new[:, index] = np.where(ended, filler, tokens)
        ended |= np.isin(tokens, settings.end_ids)
        if ended.all() or index + 1 == settings.max_new_tokens:
            break
        logits = batch.read(new[:, index : index + 1])
    return [_to_the_end(row, settings.end_ids) for row in new]


def chosen_tokens(logits: Array, chances: Array, temperature: float) -> Array:
    """The token of each row of logits (rows, vocabulary) that a number of chances (rows,) chooses, int32.

    It is the first that lifts the sum of the shares up to it above the number: uniform numbers make that a sample.
    """
    scaled = logits if temperature == 1.0 else logits / np.float32(temperature)
    # The terms are float32, as the logits are; their sum over a vocabulary is not.
    sums = np.exp(scaled - scaled.max(axis=-1, keepdims=True)).cumsum(axis=-1, dtype=np.float64)
    wanted = chances * sums[:, -1]
    found = [row.searchsorted(number, side="right") for row, number in zip(sums, wanted, strict=True)]
    return np.minimum(found, logits.shape[1] - 1).astype(np.int32)


class _ReadAgain:
    """Rows that grow together, padded on the right, where no causal model looks; nothing is kept of them."""

    def __init__(self, model: Any, prompts: Sequence[Array], new_tokens: int) -> None:
        self._model = model
        self._lengths = np.array([len(prompt) for prompt in prompts])
        self._tokens = np.zeros((len(prompts), self._lengths.max() + new_tokens), dtype=np.int32)
        for row, prompt in zip(self._tokens, prompts, strict=True):
            row[: len(prompt)] = prompt

    def read_prompts(self) -> Array:
        """The logits (rows, vocabulary) that follow the rows."""
        longest = self._lengths.max()
        hidden = hidden_states(self._model, mx.array(self._tokens[:, :longest]))
        last = hidden[mx.arange(len(self._tokens)), mx.array(self._lengths - 1)]
        return np.array(head_logits(self._model, last))

    def read(self, tokens: Array) -> Array:
        """The logits that follow the rows with tokens (rows, 1) behind them."""
        self._tokens[np.arange(len(tokens)), self._lengths] = tokens[:, 0]
        self._lengths = self._lengths + 1
        return self.read_prompts()


class _PaddedBatch:
    """Rows that grow together, padded on the left: where each stands, and the keys and values of all layers.

    mlx-lm's models ask a layer's cache for the position that its rotary embedding begins at, for a mask, and to keep
    keys and values. All layers keep all of them: a sliding window is in the mask.
    """

    def __init__(self, model: Any, prompts: Sequence[Array], new_tokens: int) -> None:
        self._model, self.length = model, 0
        longest = max(map(len, prompts))
        self.width = longest + new_tokens
        self._prompts = np.zeros((len(prompts), longest), dtype=np.int32)
        for row, prompt in enumerate(prompts):
            self._prompts[row, longest - len(prompt) :] = prompt
        self._padding = mx.array([longest - len(prompt) for prompt in prompts])
        # The position of each row's next token, (rows,); negative inside the padding.
        self.offset = -self._padding
        self._layers = [_LayerCache(self) for _ in model.layers]

    def read_prompts(self) -> Array:
        """The logits (rows, vocabulary) that follow the prompts."""
        longest = self._prompts.shape[1]
        for start in range(0, longest - 1, _PREFILL):
            self._hidden(self._prompts[:, start : min(start + _PREFILL, longest - 1)])
            mx.eval([layer.arrays for layer in self._layers])
        return self.read(self._prompts[:, -1:])

    def read(self, tokens: Array) -> Array:
        """The float32 logits (rows, vocabulary) that follow tokens (rows, 1)."""
        return np.array(head_logits(self._model, self._hidden(tokens)[:, -1]))

    def mask(self, count: int, window: int | None) -> mx.array:
        """Which of all places the next `count` tokens see: (rows, 1, count, places).

        A place inside the padding sees itself, so that nothing odd is computed there.
        """
        places = mx.arange(self.length + count)
        own = mx.arange(self.length, self.length + count)[:, None]
        seen = (places <= own) & (places >= self._padding[:, None, None, None])
        if window is not None:
            seen = seen & (own < places + window)
        return for_heads(self._model, seen | (places == own))

    def _hidden(self, tokens: Array) -> mx.array:
        hidden: mx.array = trunk_of(self._model).decoder(mx.array(tokens), cache=self._layers)
        self.length += tokens.shape[1]
        self.offset = self.length - self._padding
        return hidden


class _LayerCache:
    """The keys and values of one layer, as mlx-lm's models use a cache."""

    def __init__(self, batch: _PaddedBatch) -> None:
        self._batch = batch
        self.arrays: list[mx.array] = []

    @property
    def offset(self) -> mx.array:
        return self._batch.offset

    def update_and_fetch(self, *new: mx.array) -> tuple[mx.array, ...]:
        """Keep keys and values (rows, heads, tokens, width); gives all of them so far."""
        start, width = self._batch.length, self._batch.width
        end = start + new[0].shape[2]
        if not self.arrays:
            self.arrays = [mx.zeros((*one.shape[:2], width, one.shape[3]), one.dtype) for one in new]
        for place, one in enumerate(new):
            # In place: MLX writes into an array that nobody else holds.
            self.arrays[place][..., start:end, :] = one
        return tuple(kept[..., :end, :] for kept in self.arrays)

    def make_mask(self, count: int, window_size: int | None = None, **_options: Any) -> mx.array:
        return self._batch.mask(count, window_size)


def _to_the_end(row: Array, end_ids: Sequence[int]) -> Array:
    """The row up to the first end id, which is included."""
    ends = np.flatnonzero(np.isin(row, end_ids))
    return row[: ends[0] + 1] if ends.size else row
