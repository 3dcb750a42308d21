"""Opening a base with mlx-lm's models: weights into the model that the config means, nothing filled in at random.

With gradient checkpointing a block keeps its input and computes the rest again on the way back.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from attrs import frozen
from mlx.utils import tree_flatten

from soup_xb.backends.mlx.adapters import walk
from soup_xb.backends.mlx.device import Device, memory_guard
from soup_xb.backends.mlx.families import Reading, read_base, scale_exactly, unreadable_config
from soup_xb.backends.mlx.quantization import (
    check_quantization,
    quantize_as_stored,
    quantize_decoder,
    stored_quantization,
)
from soup_xb.backends.mlx.rope import check_rope
from soup_xb.core.base.folder import BaseFolder, inspect_base, weight_files
from soup_xb.core.base.modules import Module
from soup_xb.core.disk import foreign_errors
from soup_xb.core.errors import ModelError, Problem
from soup_xb.core.run.session import BaseDescription, SessionSettings


@frozen(eq=False)
class Opened:
    """A model with how it was read. `places` maps the modules' names in transformers to those in mlx-lm."""

    model: Any
    folder: BaseFolder
    reading: Reading
    description: BaseDescription
    places: dict[str, str]
    notices: tuple[Problem, ...] = ()


def load_base(settings: SessionSettings, device: Device) -> Opened:
    """The base, frozen, in evaluation mode.

    Raises ModelError for a folder that is damaged, holds foreign formats or would be read otherwise than meant.
    """
    folder = inspect_base(settings.base)
    check_quantization(folder, settings.quantization)
    reading = read_base(folder, settings.rope_scaling)
    model = _build(folder, reading, settings)
    description, places = describe_model(model, folder, reading, bool(settings.pooling))
    notices = []
    with memory_guard("loading the base"):
        weights = _read_weights(folder, reading, model)
        stored = stored_quantization(folder)
        if stored:
            quantize_as_stored(model, stored, weights)
        _fill(model, weights, folder)
        del weights
        model.set_dtype(device.dtype)
        if settings.quantization != "none":
            notices.append(quantize_decoder(model, places, settings.quantization))
        mx.eval(model.parameters())
    model.freeze()
    model.eval()
    notices.append(_check_ropes(model, reading))
    if reading.longest:
        message = f"rows may have {reading.longest} tokens at most on MLX: {reading.longest_because}"
        notices.append(Problem("longest-row", message))
    if device.precision == "fp32":
        scale_exactly(model, reading)
    return Opened(model, folder, reading, description, places, tuple(notices))


def outline_base(settings: SessionSettings) -> Opened:
    """The base's modules without weights: MLX computes nothing that is not asked for."""
    folder = inspect_base(settings.base, weights=False)
    reading = read_base(folder, settings.rope_scaling)
    model = _build(folder, reading, settings)
    description, places = describe_model(model, folder, reading, bool(settings.pooling))
    return Opened(model, folder, reading, description, places)


def _build(folder: BaseFolder, reading: Reading, settings: SessionSettings) -> Any:
    """The model that the config means; for vectors of texts without its head."""
    with foreign_errors(partial(unreadable_config, folder)):
        model = reading.build()
    if settings.pooling:
        model.pop("lm_head", None)
    return model


def describe_model(
    model: Any, folder: BaseFolder, reading: Reading, headless: bool = False
) -> tuple[BaseDescription, dict[str, str]]:
    """The structure of a plain model, and where its modules are.

    A `headless` one has the names of transformers' AutoModel, which is the decoder alone.
    """
    modules, others, places, parameters = [], [], {}, 0
    for place, module in walk(model):
        name = place.removeprefix("model.") if headless else place
        if isinstance(module, nn.Linear):
            out_features, in_features = module.weight.shape
            modules.append(Module(name, out_features, in_features))
            places[name] = place
        own = module.parameters() if not module.children() else {}
        arrays = [array for array in own.values() if isinstance(array, mx.array)]
        parameters += sum(array.size for array in arrays)
        if not isinstance(module, nn.Linear) and any(array.ndim > 1 for array in arrays):
            others.append(name)
    arguments = reading.arguments
    description = BaseDescription(
        model_type=folder.model_type,
        modules=tuple(modules),
        parameters=parameters,
        layers=arguments["num_hidden_layers"],
        hidden_size=arguments["hidden_size"],
        intermediate_size=arguments["intermediate_size"],
        vocabulary_size=arguments["vocab_size"],
        other_weights=tuple(others),
        layer_settings=reading.layer_settings,
    )
    return description, places


def read_arrays(file: Path) -> dict[str, mx.array]:
    """The arrays of a safetensors file that `inspect_base` has checked; they are read when asked for."""
    arrays: Any = mx.load(str(file))
    return dict(arrays)


def _read_weights(folder: BaseFolder, reading: Reading, model: Any) -> dict[str, mx.array]:
    weights: dict[str, mx.array] = {}
    with foreign_errors(partial(_unreadable, folder)):
        for file in weight_files(folder.path):
            weights.update(read_arrays(file))
        if "lm_head" not in model:
            weights = {name: array for name, array in weights.items() if not name.startswith("lm_head.")}
            if not any(name.startswith("model.") for name in weights):
                # transformers' AutoModel saves the decoder alone.
                weights = {f"model.{name}": array for name, array in weights.items()}
        # Gemma 3's does nothing but tie the head, which `build` has done.
        if hasattr(model, "sanitize") and reading.module != "gemma3_text":
            weights = model.sanitize(weights)
    return weights


def _unreadable(folder: BaseFolder, reason: str) -> ModelError:
    return ModelError(
        "damaged-weights",
        f"mlx-lm cannot read the weights: {reason}",
        where=str(folder.path),
        help="download the base again, or run with --backend torch.",
    )


def _fill(model: Any, weights: dict[str, mx.array], folder: BaseFolder) -> None:
    expected = {name: array.shape for name, array in _flat(model)}
    missing = sorted(set(expected) - set(weights))
    foreign = sorted(set(weights) - set(expected))
    shapes = sorted(name for name in set(expected) & set(weights) if weights[name].shape != expected[name])
    if missing or shapes or foreign:
        first = (missing or shapes or foreign)[0]
        raise ModelError(
            "incomplete-weights",
            f"{len(missing)} weights are missing, {len(shapes)} have another shape and {len(foreign)} have no "
            f"place in mlx-lm's `{folder.model_type}`, first `{first}`",
            where=str(folder.path),
            help="download the base again, or run with --backend torch.",
        )
    model.load_weights(list(weights.items()), strict=True)


def _flat(model: Any) -> list[tuple[str, mx.array]]:
    return list(tree_flatten(model.parameters()))


def _check_ropes(model: Any, reading: Reading) -> Problem:
    checked = 0
    for index, (layer, rope) in enumerate(zip(model.layers, reading.ropes, strict=True)):
        if rope is not None:
            check_rope(layer.self_attn.rope, rope, reading.head_dim, f"layers.{index}")
            checked += 1
    return Problem(
        "base-read", f"every field of the config is accounted for; rope checked in {checked} blocks"
    )


class CheckpointedBlocks:
    """Blocks that run checkpointed until `undo`: their objects get a class of their own, mlx-lm's stays as it is."""

    def __init__(self, blocks: list[Any]) -> None:
        """Change the blocks."""
        self._blocks = [(block, type(block)) for block in blocks]
        classes = {cls: _checkpointed(cls) for _, cls in self._blocks}
        for block, cls in self._blocks:
            block.__class__ = classes[cls]

    def undo(self) -> None:
        """Give the blocks their class back."""
        for block, cls in self._blocks:
            block.__class__ = cls


def _checkpointed(cls: type[Any]) -> type[Any]:
    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        if named.get("cache") is not None or any(one is not None for one in arguments[2:]):
            # With a cache of keys and values it answers, and nothing is computed again.
            return cls.__call__(self, *arguments, **named)

        # What a gradient is wanted of has to be an argument; everything else is a constant to MLX.
        def inner(values: Any, *arguments: Any) -> Any:
            self.update(values)
            return cls.__call__(self, *arguments, **named)

        return mx.checkpoint(inner)(self.trainable_parameters(), *arguments)

    return type(f"Checkpointed{cls.__name__}", (cls,), {"__call__": call})
