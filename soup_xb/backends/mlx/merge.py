"""The base with the adapter folded into its weights, file by file, under the names that transformers reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from soup_xb.backends.mlx.adapters import Adapters
from soup_xb.backends.mlx.load import Opened, read_arrays
from soup_xb.core.adapter.pieces import beyond_format
from soup_xb.core.base.folder import weight_files
from soup_xb.core.errors import ModelError

# What belongs to a model besides its weights; code is left behind.
_COMPANIONS = {".json", ".txt", ".model", ".jinja", ".tiktoken"}


def write_merged(opened: Opened, adapters: Adapters, folder: Path) -> None:
    """Write the full model, weight + scale * B A, in the files, names and dtypes of the base.

    Raises ModelError for a quantized base, whose rounded weights the sum does not fit into, and for a sum that
    the dtype cannot hold.
    """
    layers = adapters.layers.values()
    if opened.folder.quantization or any("scales" in layer.linear for layer in layers):
        raise ModelError(
            "merge-quantized",
            "the base is quantized, and a merged weight does not fit into its format",
            help="merge onto the plain base: run again with `--set training.quantization=none`.",
        )
    folder.mkdir(parents=True, exist_ok=True)
    left = set(adapters.layers)
    for file in weight_files(opened.folder.path):
        weights = read_arrays(file)
        for name in sorted(left):
            if f"{name}.weight" in weights:
                weights[f"{name}.weight"] = _merged(adapters, name, weights[f"{name}.weight"])
                left.discard(name)
        mx.save_safetensors(str(folder / file.name), weights, metadata={"format": "pt"})
    if left:
        raise ModelError(
            "merge-misses-weight",
            f"the base's files hold {len(left)} adapted weights under other names, first `{min(left)}`",
            where=str(opened.folder.path),
            help="merge with --backend torch.",
        )
    for companion in sorted(opened.folder.path.iterdir()):
        if companion.is_file() and companion.suffix in _COMPANIONS:
            shutil.copyfile(companion, folder / companion.name)
    if opened.reading.stretched is not None:
        _stretch(folder / "config.json", opened.reading.stretched)


def _stretch(file: Path, parameters: Mapping[str, Any]) -> None:
    """Write positions that were stretched for the training into the merged model's config."""
    config = json.loads(file.read_text("utf-8"))
    for older in ("rope_scaling", "rope_theta"):
        config.pop(older, None)
    config["rope_parameters"] = dict(parameters)
    file.write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _merged(adapters: Adapters, name: str, stored: mx.array) -> mx.array:
    layer = adapters.layers[name]
    weight = stored.astype(mx.float32)
    piece = adapters.piece(name)
    merged = weight + (layer.scale * mx.array(piece.b)) @ mx.array(piece.a)
    if adapters.plan.use_dora:
        merged = (layer.m / mx.linalg.norm(merged, axis=1))[:, None] * merged
    merged = merged.astype(stored.dtype)
    if not mx.isfinite(merged).all().item():
        raise beyond_format(name, str(stored.dtype).removeprefix("mlx.core."))
    return merged
