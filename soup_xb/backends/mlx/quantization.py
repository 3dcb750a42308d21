"""MLX's own quantized formats: bases that come in one, and plain bases quantized on opening."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from soup_xb.core.base.folder import BaseFolder
from soup_xb.core.base.modules import is_decoder_linear
from soup_xb.core.base.proven import Part
from soup_xb.core.config.support import feature_refusal
from soup_xb.core.errors import ConfigError, ModelError, Problem

GROUP_SIZE = 64
_BITS = {"4bit": 4, "8bit": 8}
_MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")


def check_quantization(folder: BaseFolder, asked: str) -> None:
    """Raise ConfigError for bitsandbytes' format and ModelError for others that MLX does not train on."""
    if folder.quantization == "bitsandbytes":
        problem = feature_refusal("base=quantized by bitsandbytes", "mlx", str(folder.path))
        if problem is not None:
            raise ConfigError.of([problem])
    if folder.quantization not in ("", "mlx"):
        raise ModelError(
            "foreign-quantization",
            f"the base is quantized by {folder.quantization}, which soup-xb does not read on MLX",
            where=str(folder.path),
            help="name the plain base; `training.quantization: 4bit` quantizes it in MLX's own format.",
        )
    if folder.quantization and asked != "none":
        raise ModelError(
            "already-quantized",
            f"the base is already quantized ({folder.quantization}) and `quantization: {asked}` asks for it again",
            where="training.quantization",
            help="remove `training.quantization`, or name the plain base.",
        )


def stored_quantization(folder: BaseFolder) -> Mapping[str, Any]:
    """The `quantization` entry of a base in MLX's format, empty for a plain base."""
    if folder.quantization != "mlx":
        return {}
    stored = folder.config.get("quantization") or folder.config.get("quantization_config")
    assert isinstance(stored, dict)
    for name in ("bits", "group_size"):
        value = stored.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not 2 <= value <= 256:
            raise _unreadable(folder, f"quantization.{name}: {value!r}")
    if stored.get("mode", "affine") not in _MODES:
        raise _unreadable(folder, f"quantization.mode: {stored['mode']!r}")
    return stored


def quantize_as_stored(model: Any, stored: Mapping[str, Any], weights: Mapping[str, mx.array]) -> None:
    """Give the model the quantized layers whose scales are among the weights."""

    def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized") or f"{path}.scales" not in weights:
            return False
        own = stored.get(path)
        return dict(own) if isinstance(own, dict) else True

    nn.quantize(
        model,
        group_size=stored["group_size"],
        bits=stored["bits"],
        mode=stored.get("mode", "affine"),
        class_predicate=predicate,
    )


def quantize_decoder(model: Any, places: Mapping[str, tuple[Part, ...]], asked: str) -> Problem:
    """Quantize the linear layers of the decoder blocks in MLX's affine format; says what was done."""
    bits = _BITS[asked]
    wanted = {part.place for name, parts in places.items() if is_decoder_linear(name) for part in parts}
    odd = []

    def predicate(path: str, module: nn.Module) -> bool:
        if path not in wanted:
            return False
        if module.weight.shape[-1] % GROUP_SIZE:
            odd.append(path)
            return False
        return True

    nn.quantize(model, group_size=GROUP_SIZE, bits=bits, mode="affine", class_predicate=predicate)
    left = (
        f", {len(odd)} stay plain (their width is no multiple of {GROUP_SIZE}, first `{odd[0]}`)"
        if odd
        else ""
    )
    return Problem(
        "quantized",
        f"{len(wanted) - len(odd)} linear layers in {bits} bits, groups of {GROUP_SIZE}, in MLX's own format{left}; "
        "the numbers differ from those of torch, which has another format",
    )


def dequantized_weight(linear: Any) -> mx.array:
    """The weight (…, out_features, in_features) of a layer, plain or quantized, in float32."""
    if "scales" not in linear:
        return linear.weight.astype(mx.float32)
    scales, biases = linear.scales, linear.get("biases")
    if biases is not None:
        # MLX computes this format in the dtype of its scales, whatever dtype is asked for.
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(
        linear.weight,
        scales,
        biases,
        group_size=linear.group_size,
        bits=linear.bits,
        mode=linear.mode,
        dtype=mx.float32,
    )


def _unreadable(folder: BaseFolder, field: str) -> ModelError:
    return ModelError(
        "foreign-quantization",
        f"`{field}` is not a format of MLX's",
        where=str(folder.path / "config.json"),
        help="quantize the base again with mlx-lm, or name the plain base.",
    )
