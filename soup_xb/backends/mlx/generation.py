"""Continuing a prompt with a key-value cache."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from soup_xb.core.random_numbers import step_seed
from soup_xb.core.run.session import GenerationSettings

_PREFILL = 512


def generate_tokens(model: Any, prompt: Any, settings: GenerationSettings) -> np.ndarray[Any, Any]:
    """New token ids, int32, the end token not included; greedy, or sampled from the whole distribution."""
    cache = make_prompt_cache(model)
    tokens = mx.array(np.asarray(prompt, dtype=np.int32))[None]
    for start in range(0, tokens.shape[1] - 1, _PREFILL):
        model(tokens[:, start : min(start + _PREFILL, tokens.shape[1] - 1)], cache=cache)
        mx.eval([entry.state for entry in cache])
    last = tokens[:, -1:]
    keys = mx.random.split(mx.random.key(step_seed(settings.seed, "generate")), settings.max_new_tokens)
    new: list[int] = []
    for index in range(settings.max_new_tokens):
        logits = model(last, cache=cache)[:, -1].astype(mx.float32)
        if settings.temperature > 0:
            chosen = mx.random.categorical(logits / settings.temperature, key=keys[index])
        else:
            chosen = mx.argmax(logits, axis=-1)
        token = int(np.array(chosen)[0])
        if token in settings.end_ids:
            break
        new.append(token)
        last = chosen[:, None]
    return np.array(new, dtype=np.int32)
