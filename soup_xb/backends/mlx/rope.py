"""Rotary positions: transformers' meaning in numbers, mlx-lm's spelling of it, and the proof that both agree."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from attrs import frozen

from soup_xb.core.errors import ModelError

_KEYS = {
    "default": {"partial_rotary_factor"},
    "linear": {"factor", "partial_rotary_factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
        "attention_factor", "truncate",
    },
    "longrope": {
        "factor", "original_max_position_embeddings", "short_factor", "long_factor", "attention_factor",
        "partial_rotary_factor",
    },
}  # fmt: skip


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
        for key in set(parameters) - allowed - {"rope_type", "type", "rope_theta"}
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
        return _yarn(plain, parameters, where)
    if kind == "longrope":
        return _longrope(plain, parameters, where)
    return Rope(plain)


def spell_rope(parameters: Mapping[str, Any]) -> dict[str, Any] | None:
    """mlx-lm's `rope_scaling` for an entry of transformers' `rope_parameters`; None for the default kind."""
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        return None
    spelled = {
        key: value
        for key, value in parameters.items()
        if value is not None and key not in ("rope_type", "rope_theta", "partial_rotary_factor", "truncate")
    }
    spelled["type"] = spelled["rope_type"] = kind
    if kind == "linear":
        spelled["factor"] = float(spelled["factor"])
    if kind == "longrope":
        # mlx-lm always turns by the long factors; up to the original length transformers turns by the short ones.
        spelled["long_factor"] = spelled["short_factor"]
    return spelled


def check_rope(module: Any, rope: Rope, heads: int, layer: str) -> None:
    """Turn a probe with an opened layer's rotary module. Raises ModelError where it is not what the config means."""
    half = rope.frequencies.size
    ones = np.zeros((1, 1, 3, heads), dtype=np.float32)
    ones[..., :half] = 1.0
    turned = np.array(module(mx.array(ones)))[0, 0]
    angles = np.arange(3)[:, None] * rope.frequencies
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1) * rope.gain
    error = float(np.abs(turned[:, : 2 * half] - expected).max())
    if not error < 1e-4:
        raise ModelError(
            "rope-misread",
            f"mlx-lm turns positions of `{layer}` otherwise than the config says (off by {error:.2g})",
            help="run with --backend torch, and report this base.",
        )


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


def _yarn(plain: np.ndarray[Any, Any], parameters: Mapping[str, Any], where: str) -> Rope:
    factor, original = parameters["factor"], parameters["original_max_position_embeddings"]
    if parameters.get("truncate") is False:
        raise refused(where, "rope_parameters.truncate: false")
    theta, dims = parameters["rope_theta"], 2 * plain.size

    def boundary(turns: float) -> float:
        return dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(boundary(parameters.get("beta_fast") or 32)), 0)
    high = min(math.ceil(boundary(parameters.get("beta_slow") or 1)), dims - 1)
    ramp = np.clip((np.arange(plain.size) - low) / (high - low or 0.001), 0.0, 1.0)
    mscale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    gain = _mscale(factor, mscale) / _mscale(factor, all_dim) if mscale and all_dim else _mscale(factor, 1.0)
    told = parameters.get("attention_factor")
    if told is not None and abs(told - gain) > 1e-6:
        raise refused(where, f"rope_parameters.attention_factor: {told}")
    if (mscale or all_dim) and not (mscale and all_dim):
        raise refused(where, "rope_parameters.mscale")
    return Rope(plain * (1.0 - ramp) + plain / factor * ramp, gain)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope(plain: np.ndarray[Any, Any], parameters: Mapping[str, Any], where: str) -> Rope:
    original, factor = parameters["original_max_position_embeddings"], parameters["factor"]
    gain = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    told = parameters.get("attention_factor")
    if told is not None and abs(told - gain) > 1e-6:
        raise refused(where, f"rope_parameters.attention_factor: {told}")
    return Rope(plain / np.asarray(parameters["short_factor"], dtype=np.float64), gain, longest=original)
