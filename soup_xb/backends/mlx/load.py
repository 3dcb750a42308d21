"""Opening a base with mlx-lm's models: weights into the model that the config means, nothing filled in at random.

With gradient checkpointing a block keeps its input and computes the rest again on the way back.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import transformers
from attrs import evolve, frozen
from mlx.utils import tree_flatten
from mlx_lm.models.mla import MultiLinear
from mlx_lm.models.switch_layers import SwitchLinear

from soup_xb.backends.mlx.adapters import walk
from soup_xb.backends.mlx.device import Device, memory_guard
from soup_xb.backends.mlx.families import family_of, text_config
from soup_xb.backends.mlx.patches import scale_exactly
from soup_xb.backends.mlx.quantization import (
    check_quantization,
    quantize_as_stored,
    quantize_decoder,
    stored_quantization,
)
from soup_xb.backends.mlx.reading import Reading, read_base, unreadable_config
from soup_xb.core.base.folder import BaseFolder, check_tied_head, holds_head, inspect_base, weight_files
from soup_xb.core.base.modules import Module
from soup_xb.core.base.proven import Part, proven_with
from soup_xb.core.disk import foreign_errors
from soup_xb.core.errors import ModelError, Problem
from soup_xb.core.run.session import BaseDescription, SessionSettings


@frozen(eq=False)
class Opened:
    """A model with how it was read. `places` says where the modules of transformers are in mlx-lm."""

    model: Any
    folder: BaseFolder
    reading: Reading
    description: BaseDescription
    places: dict[str, tuple[Part, ...]]
    notices: tuple[Problem, ...] = ()


def load_base(settings: SessionSettings, device: Device) -> Opened:
    """The base, frozen, in evaluation mode.

    Raises ModelError for a folder that is damaged, holds foreign formats or would be read otherwise than meant.
    """
    folder = inspect_base(settings.base)
    check_quantization(folder, settings.quantization)
    reading = read_base(folder, settings.rope_scaling)
    if not settings.pooling:
        _check_head(folder, reading)
    model = _build(folder, reading, settings)
    description, places = describe_model(model, folder, reading, bool(settings.pooling))
    notices = []
    with memory_guard("loading the base"):
        weights = _read_weights(folder, reading, model, bool(settings.pooling))
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
    notices += other_versions()
    notices.append(Problem("base-read", f"every field of the config is accounted for{_turned(reading)}"))
    if not reading.proven.cached:
        text = f"answers of `{folder.model_type}` are decoded without a cache, which gives other tokens than whole rows"
        notices.append(Problem("no-cache", text))
    longest, because = reading.longest
    if longest:
        message = f"rows may have {longest} tokens at most on MLX: {because}"
        notices.append(Problem("longest-row", message))
    if device.precision == "fp32" and reading.module in ("gemma3", "gemma3_text"):
        scale_exactly(model, text_config(reading.config))
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
) -> tuple[BaseDescription, dict[str, tuple[Part, ...]]]:
    """The structure of a plain model, and where its modules are.

    A `headless` one has the names of transformers' AutoModel, which is the decoder alone.
    """
    modules: dict[str, Module] = {}
    others, parameters = [], 0
    places: dict[str, tuple[Part, ...]] = {}
    for place, module in walk(model):
        own = module.parameters() if not module.children() else {}
        arrays = [array for array in own.values() if isinstance(array, mx.array)]
        parameters += sum(array.size for array in arrays)
        found = reading.proven.module_at(place) if _carries(module) else None
        if found is None:
            if any(array.ndim > 1 for array in arrays):
                others.append(place.removeprefix("model.") if headless else place)
            continue
        name, part = found
        name = name.removeprefix("model.") if headless else name
        grown = _grown(modules.get(name), name, module, part)
        by_weight = not grown.experts and name.rpartition(".")[2] in reading.proven.by_weight
        modules[name] = evolve(grown, by_weight=by_weight)
        places[name] = (*places.get(name, ()), part)
    text = reading.text
    description = BaseDescription(
        model_type=folder.model_type,
        modules=tuple(modules[name] for name in reading.proven.ordered(modules)),
        parameters=parameters,
        layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocabulary_size=text.vocab_size,
        other_weights=tuple(others),
        layer_settings=reading.layer_settings,
    )
    return description, places


def _carries(module: Any) -> bool:
    """Whether an adapter can sit on it."""
    return isinstance(module, nn.Linear | SwitchLinear | MultiLinear)


def _grown(known: Module | None, name: str, layer: Any, part: Part) -> Module:
    """A module of transformers with the rows that one of its places in mlx-lm holds."""
    shape = layer.weight.shape
    rows, columns = shape[-2:]
    if part.heads:
        rows, columns = (shape[0] * columns, rows) if part.heads == "keys" else (shape[0] * rows, columns)
    turned = part.turned and len(shape) == 3
    out, width = (columns, rows) if turned else (rows, columns)
    if known is not None:
        out, width = (out, known.in_features + width) if turned else (known.out_features + out, width)
    experts = shape[0] if len(shape) == 3 and not part.heads else 0
    return Module(name, out, width, experts=experts)


def read_arrays(file: Path) -> dict[str, mx.array]:
    """The arrays of a safetensors file that `inspect_base` has checked; they are read when asked for."""
    arrays: Any = mx.load(str(file))
    return dict(arrays)


def _check_head(folder: BaseFolder, reading: Reading) -> None:
    """Raise ModelError where the files hold another head than the config means; some of mlx-lm's models take any."""
    if reading.is_tied:
        check_tied_head(folder)
    elif not holds_head(folder):
        raise ModelError(
            "incomplete-weights",
            "the config gives the model an output head of its own, and the files hold none",
            where=str(folder.path),
            help="download the base again, or set `tie_word_embeddings` to true in config.json where the embedding is "
            "the head.",
        )


def _read_weights(folder: BaseFolder, reading: Reading, model: Any, headless: bool) -> dict[str, mx.array]:
    weights: dict[str, mx.array] = {}
    with foreign_errors(partial(_unreadable, folder)):
        for file in weight_files(folder.path):
            weights.update(read_arrays(file))
        if headless or reading.is_tied:
            weights = {name: array for name, array in weights.items() if not _is_of_head(name, headless)}
        # A buffer that older bases were saved with, computed from the config here as in transformers.
        weights = {name: weights[name] for name in weights if not name.endswith("rotary_emb.inv_freq")}
        if "embed_tokens.weight" in weights or (headless and not any(map(_is_whole, weights))):
            # transformers' AutoModel saves the decoder alone.
            weights = {f"model.{name}" if "lm_head" not in name else name: weights[name] for name in weights}
        if not family_of(reading.model_type).scaled:
            return reading.named(model, weights)
        # mlx-lm multiplies in place.
        stored = {name: mx.array(array) for name, array in weights.items()}
        weights = reading.named(model, weights)
        note_scales(model, stored, weights)
    return weights


def _is_whole(name: str) -> bool:
    return name.startswith("model.")


def _is_of_head(name: str, headless: bool) -> bool:
    """Whether it is of the output head; of a tied one the bias is not left out, which the embedding has not."""
    parts = name.split(".")
    return "lm_head" in parts and (headless or parts[-1] != "bias")


def note_scales(model: Any, stored: Mapping[str, mx.array], weights: Mapping[str, mx.array]) -> None:
    """Remember, for modules whose weights mlx-lm keeps multiplied, by how much each of their rows is."""
    for place, module in walk(model):
        name = f"{place}.weight"
        if not isinstance(module, nn.Linear) or name not in stored or name not in weights:
            continue
        before, after = (each[name].astype(mx.float32) for each in (stored, weights))
        largest = mx.argmax(mx.abs(before), axis=1, keepdims=True)
        own = mx.take_along_axis(before, largest, axis=1)
        scales = mx.where(own == 0, 1.0, mx.take_along_axis(after, largest, axis=1) / own)[:, 0]
        if not mx.allclose(scales, mx.ones_like(scales), atol=0, rtol=1e-6).item():
            module._row_scales = scales


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


def other_versions() -> list[Problem]:
    """One notice where a library is installed in another version than the proof was made with."""
    installed = {"transformers": transformers.__version__, "mlx-lm": mlx_lm.__version__}
    odd = [
        f"{name} {version} (proven with {proven})"
        for name, version in installed.items()
        if version != (proven := proven_with().get(name, "another"))
    ]
    text = f"what mlx-lm computes was not compared with transformers in these versions: {', '.join(odd)}"
    return [Problem("other-versions", text)] if odd else []


def _turned(reading: Reading) -> str:
    return "" if reading.ropes is None else f"; {len(reading.ropes)} blocks turn positions as it says"


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
