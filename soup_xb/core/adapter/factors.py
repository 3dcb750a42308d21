"""The adapter's random start, made here so that both backends begin with the same values."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from soup_xb.core.base.modules import AdapterModule
from soup_xb.core.random_numbers import uniform


def random_factor(adapter: AdapterModule, seed: int, restart: int = 0) -> np.ndarray[Any, Any]:
    """The start of A, float32 in `adapter.a_shape`; B starts at zero, so that the output is the base's.

    `restart` is the step of the merge after which the factor begins, 0 for the first one.

    Uniform in +-1/sqrt(in_features), which is the Kaiming rule (arXiv:1502.01852) with a = sqrt(5) that LoRA's
    reference code and PEFT use. The values depend on seed and module name, not on the order of modules.
    """
    key = ("lora_A", seed, adapter.name, *([restart] if restart else []))
    values = uniform(math.prod(adapter.a_shape), *key)
    bound = 1.0 / math.sqrt(adapter.in_features)
    return ((2.0 * values - 1.0) * bound).astype(np.float32).reshape(adapter.a_shape)
