"""Where mlx-lm's model code computes something else than transformers': small changes of one opened model.

Each gives modules of the model a class of their own, whose code is mlx-lm's but for one thing; mlx-lm's classes stay
as they are. `tests/families/prove.py` says by numbers which types need one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.base import scaled_dot_product_attention

Config = Mapping[str, Any]
Patch = Callable[[Any, Config], None]


def with_methods(module: Any, **methods: Any) -> None:
    """Give one module other methods; its weights and their names stay."""
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {"__module__": kind.__module__, **methods})


def windows(model: Any, config: Config) -> None:
    """Build the sliding windows that mlx-lm's code leaves out: `layer_types` says of which layers."""
    window = config.get("sliding_window")
    if not window or config.get("use_sliding_window") is False:
        return
    kinds = config.get("layer_types") or ["sliding_attention"] * len(model.layers)
    for layer, kind in zip(model.layers, kinds, strict=True):
        if kind == "sliding_attention":
            with_methods(layer, __call__=_windowed(type(layer).__call__, window))


def _windowed(call: Any, window: int) -> Any:
    def windowed(self: Any, x: mx.array, mask: Any = None, cache: Any = None, **named: Any) -> Any:
        return call(self, x, within_window(x.shape[1], window, mask, cache), cache, **named)

    return windowed


def within_window(count: int, window: int, mask: Any, cache: Any = None) -> Any:
    """A mask for `count` new tokens with what a window of so many tokens lets them see of it."""
    if isinstance(mask, mx.array):
        places = mask.shape[-1]
    else:
        places = count + (cache.offset if cache is not None else 0)
        if places <= window:
            return mask
    every = mx.arange(places)
    own = mx.arange(places - count, places)[:, None]
    seen = own < every + window
    return seen & (mask if isinstance(mask, mx.array) else every <= own)


def tanh_gelu(model: Any, config: Config) -> None:
    """Gemma's and StarCoder 2's tanh approximation of GELU (arXiv:1606.08415), where mlx-lm has the exact one."""

    def gated(self: Any, x: mx.array) -> mx.array:
        return self.down_proj(nn.gelu_approx(self.gate_proj(x)) * self.up_proj(x))

    def plain(self: Any, x: mx.array) -> mx.array:
        return self.c_proj(nn.gelu_approx(self.c_fc(x)))

    for layer in model.layers:
        with_methods(layer.mlp, __call__=gated if "gate_proj" in layer.mlp else plain)


def exact_gelu(model: Any, config: Config) -> None:
    """GPT-NeoX's exact GELU, where mlx-lm has the tanh approximation."""

    def call(self: Any, x: mx.array) -> mx.array:
        return self.dense_4h_to_h(nn.gelu(self.dense_h_to_4h(x)))

    for layer in model.layers:
        with_methods(layer.mlp, __call__=call)


def norm_eps(value: float | str, *names: str) -> Patch:
    """The epsilon of the norms of these names: a number, or the config's key that holds it."""

    def patch(model: Any, config: Config) -> None:
        epsilon = config[value] if isinstance(value, str) else value
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in names:
                module.eps = epsilon

    return patch


def correction_bias(model: Any, config: Config) -> None:
    """ERNIE 4.5's router adds a bias before it chooses experts, which mlx-lm leaves out."""
    for layer in model.layers:
        if "switch_mlp" in layer.mlp:
            layer.mlp.e_score_correction_bias = mx.zeros((config["moe_num_experts"],))
            with_methods(layer.mlp, __call__=_ernie_moe)


def _ernie_moe(self: Any, x: mx.array) -> mx.array:
    shares = mx.softmax(self.gate(x).astype(mx.float32), axis=-1)
    chosen = _largest(shares + self.e_score_correction_bias.astype(mx.float32), self.k)
    weights = mx.take_along_axis(shares, chosen, axis=-1)
    weights = weights / mx.maximum(weights.sum(axis=-1, keepdims=True), 1e-12)
    summed = (self.switch_mlp(x, chosen) * weights[..., None]).sum(axis=-2).astype(x.dtype)
    return summed if self.shared_experts is None else summed + self.shared_experts(x)


def softmax_first(model: Any, config: Config) -> None:
    """Jamba's router takes the softmax over all experts before it chooses some; mlx-lm over the chosen ones."""

    def call(self: Any, x: mx.array) -> mx.array:
        shares = mx.softmax(self.router(x).astype(mx.float32), axis=-1)
        chosen = _largest(shares, self.num_experts_per_tok)
        weights = mx.take_along_axis(shares, chosen, axis=-1).astype(x.dtype)
        return (self.switch_mlp(x, chosen) * weights[..., None]).sum(axis=-2)

    for layer in model.layers:
        if "router" in layer.feed_forward:
            with_methods(layer.feed_forward, __call__=call)


def _largest(scores: mx.array, count: int) -> mx.array:
    return mx.stop_gradient(mx.argpartition(-scores, kth=count - 1, axis=-1)[..., :count])


def llama4_norm(model: Any, config: Config) -> None:
    """Llama 4 normalizes queries and keys with the config's epsilon, mlx-lm with 1e-6."""

    def call(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        rows, length, _ = x.shape
        offset = 0 if cache is None else cache.offset

        def heads(linear: Any, count: int) -> mx.array:
            return linear(x).reshape(rows, length, count, -1).transpose(0, 2, 1, 3)

        queries, keys = heads(self.q_proj, self.n_heads), heads(self.k_proj, self.n_kv_heads)
        values = heads(self.v_proj, self.n_kv_heads)
        if self.use_rope:
            queries, keys = self.rope(queries, offset=offset), self.rope(keys, offset=offset)
        if self.use_qk_norm:
            queries, keys = (mx.fast.rms_norm(each, None, config["rms_norm_eps"]) for each in (queries, keys))
        if self.attn_temperature_tuning and not self.use_rope:
            place = mx.arange(1, length + 1) + offset
            warm = mx.log(mx.floor(place / self.floor_scale) + 1.0) * self.attn_scale + 1.0
            queries = (queries * warm[:, None]).astype(queries.dtype)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        out = scaled_dot_product_attention(queries, keys, values, cache=cache, scale=self.scale, mask=mask)
        return self.o_proj(out.transpose(0, 2, 1, 3).reshape(rows, length, -1))

    for layer in model.layers:
        with_methods(layer.self_attn, __call__=call)


def grouped_norm(model: Any, config: Config) -> None:
    """Mamba 2 normalizes each of its groups apart, mlx-lm all of them together."""

    def call(self: Any, x: mx.array, gate: mx.array | None = None) -> mx.array:
        gated = x if gate is None else nn.silu(gate) * x
        parts = gated.reshape(*gated.shape[:-1], config["n_groups"], -1)
        return self.weight * mx.fast.rms_norm(parts, None, self.eps).reshape(gated.shape)

    for layer in model.layers:
        with_methods(layer.mixer.norm, __call__=call)


def scaled_tied_head(model: Any, config: Config) -> None:
    """MiniCPM 3 divides what its head sees, where the head is tied too; mlx-lm only where it is not."""
    if not config["tie_word_embeddings"]:
        return
    ratio = config["hidden_size"] / config["dim_model_base"]

    def call(self: Any, inputs: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        return self.model.embed_tokens.as_linear(self.model(inputs, mask, cache) / ratio)

    with_methods(model, __call__=call)


def function_norm_eps(model: Any, config: Config) -> None:
    """The norms of nanochat, which have no weights, take the config's epsilon; mlx-lm's function has its own."""
    module = importlib.import_module("mlx_lm.models.nanochat")
    decoder = model.transformer

    def rms_norm(x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, None, config["rms_norm_eps"])

    usual = type(decoder).__call__

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        with replaced(module, rms_norm=rms_norm):
            return usual(self, *arguments, **named)

    with_methods(decoder, __call__=call)


def unfinished_module(model: Any, config: Config) -> None:
    """RecurrentGemma's model never calls `nn.Module.__init__`, so that it cannot be frozen or trained."""
    object.__setattr__(model, "_no_grad", set())
    object.__setattr__(model, "_training", False)
    for _, module in model.model.named_modules():
        if type(module).__name__ == "RMSNorm":
            module.eps = config["rms_norm_eps"]


def differentiable(model: Any, config: Config) -> None:
    """Linear attention: in evaluation mode mlx-lm takes a Metal kernel that has no gradient."""
    for layer in model.layers:
        layer.train(True)


class RescaledEmbedding(nn.Embedding):
    """An embedding whose rows come out multiplied by `ratio`; as a head it is plain."""

    def __call__(self, x: mx.array) -> mx.array:
        """Rows of the weight times the ratio."""
        return super().__call__(x) * self.ratio


def scale_exactly(model: Any, config: Config) -> None:
    """Give Gemma 3 the factor sqrt(hidden_size), which mlx-lm rounds to bf16 even in a float32 model.

    transformers rounds it to the model's own dtype.
    """
    decoder = model.language_model.model if "language_model" in model else model.model
    embedding = decoder.embed_tokens
    if type(embedding) is not nn.Embedding:
        return
    exact = float(config["hidden_size"]) ** 0.5
    rounded = float(np.array(mx.array(exact, mx.bfloat16).astype(mx.float32)))
    if rounded == exact:
        return
    rescaled = RescaledEmbedding.__new__(RescaledEmbedding)
    nn.Module.__init__(rescaled)
    rescaled.weight = embedding.weight
    rescaled.ratio = exact / rounded
    rescaled.freeze()
    decoder.embed_tokens = rescaled


@contextmanager
def replaced(module: Any, **functions: Any) -> Iterator[None]:
    """Inside, functions of a module of mlx-lm's are others."""
    usual = {name: getattr(module, name) for name in functions}
    for name, function in functions.items():
        setattr(module, name, function)
    try:
        yield
    finally:
        for name, function in usual.items():
            setattr(module, name, function)
