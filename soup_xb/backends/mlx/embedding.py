"""Gemma 3's embedding scale in full precision."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from soup_xb.backends.mlx.families import Reading


class RescaledEmbedding(nn.Embedding):
    """An embedding whose rows come out multiplied by `ratio`; as a head it is plain."""

    def __call__(self, x: mx.array) -> mx.array:
        """Rows of the weight times the ratio."""
        return super().__call__(x) * self.ratio


def scale_exactly(model: Any, reading: Reading) -> None:
    """Give Gemma 3 the factor sqrt(hidden_size), which mlx-lm rounds to bf16 even in a float32 model.

    transformers rounds it to the model's own dtype.
    """
    embedding = model.model.embed_tokens
    if reading.module != "gemma3_text" or type(embedding) is not nn.Embedding:
        return
    exact = float(reading.arguments["hidden_size"]) ** 0.5
    rounded = float(np.array(mx.array(exact, mx.bfloat16).astype(mx.float32)))
    if rounded == exact:
        return
    rescaled = RescaledEmbedding.__new__(RescaledEmbedding)
    nn.Module.__init__(rescaled)
    rescaled.weight = embedding.weight
    rescaled.ratio = exact / rounded
    rescaled.freeze()
    model.model.embed_tokens = rescaled
