"""The output head on trained positions alone, and of many targets a few at a time: it is a model's largest matrix.

A micro-batch is padded to a grid of few sizes, so that a compiled step is compiled few times.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from attrs import frozen
from mlx.utils import tree_flatten, tree_unflatten

from soup_xb.core.objectives.head_chunks import positions_at_once
from soup_xb.core.rows.batches import MicroBatch

Array = np.ndarray[Any, Any]
_BLOCK = 256


@frozen(eq=False)
class Grid:
    """A micro-batch as arrays.

    `positions`, `targets` and `live` are (n,), one for each trained token and some that fill up: where its hidden state
    stands in the flattened (rows * length) grid, its id, and 1, or 0 for one that only fills up. `documents` is int32
    (rows, length), the number of each token's document, where a row holds several.
    """

    tokens: mx.array
    positions: mx.array
    targets: mx.array
    live: mx.array
    documents: mx.array | None = None

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """All of them, in the order in which `Grid` takes them."""
        arrays = (self.tokens, self.positions, self.targets, self.live)
        return arrays if self.documents is None else (*arrays, self.documents)


def grid_size(count: int, least: int = 16, steps: int = 4) -> int:
    """The next size of the grid: `steps` sizes an octave, so at most 1/steps of it is padding.

    >>> [grid_size(count) for count in (1, 16, 17, 33, 100, 129)]
    [16, 16, 20, 40, 112, 160]
    """
    if count <= least:
        return least
    octave = least
    while octave * 2 < count:
        octave *= 2
    stride = octave // steps
    return -(-count // stride) * stride


def exact_grid(batch: MicroBatch) -> Grid:
    """The micro-batch as it is; without targets one place that only fills up stands in for them."""
    return _grid(batch, batch.tokens.shape[1], max(1, batch.target_tokens))


def padded_grid(batch: MicroBatch) -> Grid:
    """The micro-batch padded on the right to a grid length and a grid number of targets."""
    return _grid(batch, grid_size(batch.tokens.shape[1], steps=8), grid_size(batch.target_tokens))


def padded_tokens(batch: MicroBatch, wide: int) -> Array:
    """The tokens of a micro-batch, int32 (rows, wide), with zeros on the right."""
    rows, length = batch.tokens.shape
    tokens = np.zeros((rows, wide), dtype=np.int32)
    tokens[:, :length] = batch.tokens
    return tokens


def _grid(batch: MicroBatch, wide: int, count: int) -> Grid:
    length = batch.tokens.shape[1]
    trained = batch.weights != 0
    row, column = np.divmod(batch.positions[trained], length)
    # What fills up repeats a real place, so that nothing odd is computed there.
    filled = np.minimum(np.arange(count), max(0, row.size - 1))
    if not row.size:
        row = column = np.zeros(1, dtype=np.int64)
    targets = batch.targets[trained] if trained.any() else np.zeros(1, dtype=np.int64)
    documents = _documents(batch, wide)
    return Grid(
        mx.array(padded_tokens(batch, wide)),
        mx.array((row * wide + column)[filled].astype(np.int32)),
        mx.array(targets[filled].astype(np.int32)),
        mx.array((np.arange(count) < batch.target_tokens).astype(np.float32)),
        None if documents is None else mx.array(documents),
    )


def laid_out(batch: MicroBatch, wide: int, values: Mapping[str, Array]) -> dict[str, mx.array]:
    """Arrays of a micro-batch on its grid: those of its targets, (rows, width), become (rows, wide)."""
    rows, length = batch.tokens.shape
    trained = batch.weights != 0
    row, column = np.divmod(batch.positions[trained], length)
    found = {}
    for name, array in values.items():
        if array.shape == batch.weights.shape:
            whole = np.zeros((rows, wide), dtype=array.dtype)
            whole[row, column] = array[trained]
            array = whole
        found[name] = mx.array(array.astype(np.float32) if array.dtype == np.float64 else array)
    return found


def taken_back(batch: MicroBatch, values: mx.array) -> Array:
    """Values (rows, grid length) as those of the micro-batch's targets, (rows, width), 0 where nothing is trained."""
    row, column = np.divmod(batch.positions, batch.tokens.shape[1])
    return np.where(batch.weights != 0, np.array(values)[row, column], np.float32(0.0))


def _documents(batch: MicroBatch, wide: int) -> Any:
    """The number of each token's document; what fills the grid belongs to none of them."""
    if batch.position_ids is None:
        return None
    documents = np.zeros((batch.tokens.shape[0], wide), dtype=np.int32)
    documents[:, : batch.tokens.shape[1]] = np.cumsum(batch.position_ids == 0, axis=1)
    return documents


_OUTER = ("language_model", "model", "transformer", "backbone")
# Modules of mlx-lm whose decoder applies the head itself.
_GIVES_LOGITS = ("gemma3n", "gpt_neox")
_EMBEDDINGS = ("embed_tokens", "wte", "embeddings", "embed_in", "word_embeddings", "embedding")


@frozen(eq=False)
class Trunk:
    """The decoder that gives hidden states: `owner.name`, where `owner` computes logits of them.

    `name` is empty for a model whose decoder gives logits itself: its hidden states are these.
    """

    owner: Any
    name: str

    @property
    def decoder(self) -> Any:
        """The decoder itself."""
        return self.owner[self.name] if self.name else self.owner

    @property
    def vocabulary(self) -> int:
        """The number of logits of a token."""
        embedding = next(self.decoder[name] for name in _EMBEDDINGS if name in self.decoder)
        head = self.owner.get("lm_head", embedding)
        # Under an adapter there is the head itself.
        return int(head.get("linear", head).weight.shape[0])


def trunk_of(model: Any) -> Trunk:
    """Where a model of mlx-lm keeps its decoder, text models of multimodal ones too."""
    owner = model
    while True:
        name = next((name for name in _OUTER if isinstance(owner.get(name), nn.Module)), "")
        if not name:
            return Trunk(owner, "")
        inner = owner[name]
        if any(embedding in inner for embedding in _EMBEDDINGS):
            module = type(inner).__module__.rpartition(".")[2]
            return Trunk(inner, "") if module in _GIVES_LOGITS else Trunk(owner, name)
        owner = inner


class _Known(nn.Module):
    """A decoder that gives hidden states (1, n, hidden) which are known already; a tied head stays in its place."""

    def __init__(self, decoder: Any, hidden: mx.array) -> None:
        super().__init__()
        # What the model's own code asks of its decoder beside a call: settings, and the embedding of a tied head.
        self.__dict__.update(decoder.__dict__)
        for name, child in decoder.items():
            self[name] = child
        # An underscore keeps it out of the parameters.
        self._hidden = hidden

    def __call__(self, *_arguments: Any, **_named: Any) -> mx.array:
        return self._hidden


@contextmanager
def _decoder_known(trunk: Trunk, hidden: mx.array) -> Iterator[None]:
    decoder = trunk.decoder
    trunk.owner[trunk.name] = _Known(decoder, hidden[None])
    try:
        yield
    finally:
        trunk.owner[trunk.name] = decoder


def hidden_states(model: Any, tokens: mx.array, documents: mx.array | None = None) -> mx.array:
    """What the head sees of tokens (rows, length): (rows, length, hidden).

    Rows are padded on the right: causal attention keeps padding out of every real token's sight, so no mask is needed,
    unless a row holds several documents.
    """
    with documents_apart(model, documents):
        hidden: mx.array = trunk_of(model).decoder(tokens, cache=None)
    return hidden


def at_places(hidden: mx.array, places: mx.array) -> mx.array:
    """The hidden states (n, hidden) of places (n,) in the flattened (rows * length) grid."""
    return mx.take(hidden.reshape(-1, hidden.shape[-1]), places, axis=0)


def head_logits(model: Any, hidden: mx.array) -> mx.array:
    """Float32 logits (n, vocabulary) of hidden states (n, hidden).

    The model's own code does what it does after the head (soft caps, scaling), with its decoder answering at once, so
    the logits are those of the full computation.
    """
    trunk = trunk_of(model)
    if not trunk.name:
        return hidden.astype(mx.float32)
    with _decoder_known(trunk, hidden):
        logits: mx.array = trunk.owner(mx.zeros((1, hidden.shape[0]), mx.int32))
    return logits[0].astype(mx.float32)


def token_logps(model: Any, grid: Grid, temperature: float = 1.0) -> mx.array:
    """Log-probability (nats) of each target, float32 (rows, grid length), where its hidden state stands; 0 elsewhere.

    Logits are divided by `temperature`. Of many targets the head computes a few at a time (see
    soup_xb.core.objectives.head_chunks), which it does again on the way back.
    """
    hidden = at_places(hidden_states(model, grid.tokens, grid.documents), grid.positions)
    count = hidden.shape[0]
    trunk = trunk_of(model)
    at_once = positions_at_once(count, trunk.vocabulary) if trunk.name else count
    if at_once >= count:
        chosen = _target_logps(model, hidden, grid.targets, temperature)
    else:
        chosen = _in_chunks(model, hidden, grid.targets, (at_once, temperature))
    return mx.zeros(grid.tokens.size).at[grid.positions].add(chosen * grid.live).reshape(grid.tokens.shape)


def _target_logps(model: Any, hidden: mx.array, targets: mx.array, temperature: float) -> mx.array:
    """Log-probability of each target (n,) from hidden states (n, hidden)."""
    logits = head_logits(model, hidden)
    if temperature != 1.0:
        logits = logits / temperature
    return mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0] - log_sum_exp(logits)


def _in_chunks(model: Any, hidden: mx.array, targets: mx.array, how: tuple[int, float]) -> mx.array:
    """`_target_logps` for as many positions at once as `how` says first; its second is the temperature.

    One chunk comes after the other in both directions: none needs anything of another, and all at once are the whole.
    """
    at_once, temperature = how
    owner = trunk_of(model).owner
    parts = [slice(start, start + at_once) for start in range(0, hidden.shape[0], at_once)]

    def logps(states: mx.array, values: Any, part: slice) -> mx.array:
        if values:
            owner.lm_head.update(values)
        return _target_logps(model, states, targets[part], temperature)

    def forward(hidden: mx.array, values: Any) -> mx.array:
        each: list[mx.array] = []
        for part in parts:
            each.append(logps(_after(hidden[part], each[-1:]), values, part))
        return mx.concatenate(each)

    def backward(primals: Any, cotangent: mx.array, _output: mx.array) -> Any:
        hidden, values = primals
        names, arrays = zip(*tree_flatten(values), strict=True) if values else ((), ())
        states: list[mx.array] = []
        total: list[mx.array] = []
        for part in parts:

            def again(states: mx.array, *arrays: mx.array, part: slice = part) -> mx.array:
                return logps(states, tree_unflatten(list(zip(names, arrays, strict=True))), part)

            known = _after(hidden[part], [*states[-1:], *total])
            _, (found, *more) = mx.vjp(again, [known, *arrays], [cotangent[part]])
            states.append(found)
            total = [one + other for one, other in zip(total, more, strict=True)] if total else more
        return mx.concatenate(states), tree_unflatten(list(zip(names, total, strict=True)))

    chunked: Any = mx.custom_function(forward)
    chunked.vjp(backward)
    # What a gradient is wanted of has to be an argument; everything else is a constant to MLX.
    trained = owner.lm_head.trainable_parameters() if "lm_head" in owner else {}
    result: mx.array = chunked(hidden, trained)
    return result


def _after(array: mx.array, others: list[mx.array]) -> mx.array:
    """The array, computed when the others are."""
    return mx.depends([array], others)[0] if others else array


def log_sum_exp(logits: mx.array) -> mx.array:
    """log(sum(exp(logits))) over the last axis of float32 (n, vocabulary).

    mx.logsumexp adds one term after the other on a CPU, which loses 1e-4 over 50,000 terms, always downwards;
    sums of blocks first keep what float32 can hold.
    """
    largest = mx.stop_gradient(mx.max(logits, axis=-1, keepdims=True))
    terms = mx.exp(logits - largest)
    blocked = terms.shape[-1] // _BLOCK * _BLOCK
    blocks = terms[:, :blocked].reshape(terms.shape[0], -1, _BLOCK)
    total = mx.sum(mx.sum(blocks, axis=-1), axis=-1) + mx.sum(terms[:, blocked:], axis=-1)
    return largest[:, 0] + mx.log(total)


def for_heads(model: Any, mask: mx.array) -> mx.array:
    """A mask (rows, 1, length, places) as the model's attention takes it.

    Gemma 2's gives the query heads that share a key an axis of their own.
    """
    grouped = model.model_type == "gemma2" and model.layers[0].self_attn.repeats > 1
    return mask[:, None] if grouped else mask


@contextmanager
def documents_apart(model: Any, documents: mx.array | None) -> Iterator[None]:
    """Inside, the model's masks keep tokens of different documents apart.

    `documents` is int32 (rows, length), the number of the document that each token belongs to; None changes nothing.
    mlx-lm's models make their mask with a function of their module, which is replaced for the while. One without such a
    mask is left as it is: a run finds out that it lets documents see each other.
    """
    module: Any = sys.modules[type(trunk_of(model).decoder).__module__]
    if documents is None or not hasattr(module, "create_attention_mask"):
        yield
        return
    usual = module.create_attention_mask
    same = for_heads(model, documents[:, None, :, None] == documents[:, None, None, :])

    def create_attention_mask(h: mx.array, cache: Any = None, **options: Any) -> mx.array:
        if h.shape[1] == 1:
            return same
        return usual(h, cache, **{**options, "return_array": True}) & same

    module.create_attention_mask = create_attention_mask
    try:
        yield
    finally:
        module.create_attention_mask = usual
