"""Several documents in one row: attention does not cross from one to the next.

Rotary positions are relative, so a document's logits do not depend on where in the row it stands; only the mask
has to know.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx


@contextmanager
def documents_apart(model: Any, documents: mx.array | None) -> Iterator[None]:
    """Inside, the model's masks keep tokens of different documents apart.

    `documents` is int32 (rows, length), the number of the document that each token belongs to; None changes nothing.
    mlx-lm's models make their mask with a function of their module, which is replaced for the while.
    """
    if documents is None:
        yield
        return
    module: Any = sys.modules[type(model.model).__module__]
    usual = module.create_attention_mask
    same = documents[:, None, :, None] == documents[:, None, None, :]

    def create_attention_mask(h: mx.array, cache: Any = None, **options: Any) -> mx.array:
        if h.shape[1] == 1:
            return same
        return usual(h, cache, **{**options, "return_array": True}) & same

    module.create_attention_mask = create_attention_mask
    try:
        yield
    finally:
        module.create_attention_mask = usual
