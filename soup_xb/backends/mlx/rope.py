"""Rotary positions: transformers' meaning in numbers, and the module that turns by them in mlx-lm's models.

mlx-lm's code of many types takes no notice of scaled positions, and some turns other parts of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from attrs import frozen

from soup_xb.core.errors import ModelError

_KEYS = {
    "default": {"partial_rotary_factor"},
    "linear": {"factor", "partial_rotary_factor"},
    "llama3": {
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "partial_rotary_factor",
    },
    "yarn": {
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
        "attention_factor", "truncate", "partial_rotary_factor",
    },
    "longrope": {
        "factor", "original_max_position_embeddings", "short_factor", "long_factor", "attention_factor",
        "partial_rotary_factor",
    },
}  # fmt: skip
# Sections of a head for pictures, which text turns alike, and what a type's attention does beside its rope.
_BESIDE = {"mrope_section", "mrope_interleaved", "llama_4_scaling_beta", "max_position_embeddings"}
KINDS = tuple(_KEYS)


@frozen(eq=False)
class Rope:
    """What a rotary embedding does: the rotated dimensions turn by `frequencies` (n,) times the position.

    `gain` multiplies the rotated values. `longest` is the length up to which it is so; 0 stands for any.
    """

    frequencies: np.ndarray[Any, Any]
    gain: float = 1.0
    longest: int = 0


def read_rope(parameters: Mapping[str, Any], head_dim: int, where: str) -> Rope:
    """The meaning of one entry of transformers' `rope_parameters`.

    Raises ModelError for a kind, or a key of a kind, that mlx-lm would read differently. The formulas are those
    of RoPE (arXiv:2104.09864), YaRN (arXiv:2309.00071), LongRoPE (arXiv:2402.13753) and Llama 3.1.
    """
    kind = parameters.get("rope_type", "default")
    allowed = _KEYS.get(kind)
    if allowed is None:
        raise refused(where, f"rope_parameters.rope_type: {kind}")
    odd = sorted(
        key
        for key in set(parameters) - allowed - _BESIDE - {"rope_type", "type", "rope_theta"}
        if parameters[key] is not None
    )
    if odd:
        raise refused(where, f"rope_parameters.{odd[0]}")
    dims = int(head_dim * (parameters.get("partial_rotary_factor") or 1.0))
    plain = float(parameters["rope_theta"]) ** (-np.arange(0, dims, 2) / dims)
    if kind == "linear":
        return Rope(plain / parameters["factor"])
    if kind == "llama3":
        return Rope(_llama3(plain, parameters))
    if kind == "yarn":
        return _yarn(plain, parameters)
    if kind == "longrope":
        return _longrope(plain, parameters)
    return Rope(plain)


class ExactRope(nn.Module):
    """Turns queries or keys (…, length, head) as a `Rope` says, in place of a module of mlx-lm's."""

    def __init__(self, rope: Rope, traditional: bool) -> None:
        """`traditional` rotates neighbours of a head, else its two halves: which of them is the model's own layout."""
        super().__init__()
        self.dims, self.gain, self.traditional = 2 * rope.frequencies.size, rope.gain, traditional
        # An underscore keeps it out of the parameters.
        self._periods = mx.array((1.0 / rope.frequencies).astype(np.float32))

    def __call__(self, x: mx.array, offset: Any = 0) -> mx.array:
        """The turned x; `offset` is the position of its first token."""
        if self.gain != 1.0:
            turned, rest = mx.split(x, [self.dims], axis=-1) if self.dims < x.shape[-1] else (x, None)
            turned = self.gain * turned
            x = turned if rest is None else mx.concatenate([turned, rest], axis=-1)
        return mx.fast.rope(
            x,
            self.dims,
            traditional=self.traditional,
            base=None,
            scale=1.0,
            offset=offset,
            freqs=self._periods,
        )


def turns_neighbours(module: Any, dims: int) -> bool:
    """Whether a rotary module of mlx-lm's turns neighbours of a head of so many dimensions, and not its two halves."""
    told = getattr(module, "traditional", None)
    if told is not None:
        return bool(told)
    first = np.zeros((1, 1, 2, dims), dtype=np.float32)
    first[..., 0] = 1.0
    turned = np.array(module(mx.array(first)))[0, 0, 1]
    return dims > 2 and bool(turned[1] != 0)


def refused(where: str, field: str) -> ModelError:
    """The error for a field that mlx-lm would read otherwise."""
    return ModelError(
        "mlx-misreads-base",
        f"`{field}` would be read differently by mlx-lm than by transformers",
        where=where,
        help="run with --backend torch.",
    )


def _llama3(plain: np.ndarray[Any, Any], parameters: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = parameters["original_max_position_embeddings"] * plain / (2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    result: np.ndarray[Any, Any] = plain * (share + (1.0 - share) / parameters["factor"])
    return result


def _yarn(plain: np.ndarray[Any, Any], parameters: Mapping[str, Any]) -> Rope:
    factor, original = parameters["factor"], parameters["original_max_position_embeddings"]
    theta, dims = parameters["rope_theta"], 2 * plain.size

    def boundary(turns: float) -> float:
        return dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = boundary(parameters.get("beta_fast") or 32), boundary(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    ramp = np.clip((np.arange(plain.size) - low) / (high - low or 0.001), 0.0, 1.0)
    mscale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    gain = _mscale(factor, mscale) / _mscale(factor, all_dim) if mscale and all_dim else _mscale(factor, 1.0)
    told = parameters.get("attention_factor")
    if told is not None:
        gain = float(told)
    return Rope(plain * (1.0 - ramp) + plain / factor * ramp, gain)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope(plain: np.ndarray[Any, Any], parameters: Mapping[str, Any]) -> Rope:
    original, factor = parameters["original_max_position_embeddings"], parameters["factor"]
    gain = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    told = parameters.get("attention_factor")
    if told is not None:
        gain = float(told)
    return Rope(plain / np.asarray(parameters["short_factor"], dtype=np.float64), gain, longest=original)
