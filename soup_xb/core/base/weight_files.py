"""Which files hold a base's weights: one answer for both engines, every header checked before one of them reads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from soup_xb.core.errors import ModelError

MODEL_FOLDER = "a model folder holds config.json, safetensors weights and the tokenizer's files."
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_MOST_SHARDS = 4096
# In bytes; what no file system takes cannot be asked for either.
_LONGEST_NAME = 255
_LARGEST_OBJECT = 4 * 1024 * 1024
_PICKLE = "is a pickle, which can run code when it is read"
_OPEN_IT = "where you trust its author, open it with the library that made it and save it as safetensors "
_IN_TRANSFORMERS = _OPEN_IT + "(transformers: `from_pretrained`, then `save_pretrained`)."
# What a base may come in instead, and the way to the format that is read.
_FOREIGN = {
    **dict.fromkeys((".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"), (_PICKLE, _IN_TRANSFORMERS)),
    ".gguf": ("is GGUF, made for inference", "take the safetensors repository that it was made from."),
    ".npz": (
        "is a NumPy archive",
        "convert the original base with `mlx_lm.convert`, which writes safetensors.",
    ),
    ".h5": ("is Keras'", _IN_TRANSFORMERS),
    ".msgpack": ("is Flax'", _IN_TRANSFORMERS),
    ".onnx": ("is ONNX, made for inference", "take the safetensors repository that it was made from."),
}


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a base, in the order in which transformers looks: the single file, then the index.

    Other safetensors files in the folder are not read. Raises ModelError naming what is missing or foreign.
    """
    single, index = path / _SINGLE, path / _INDEX
    if single.is_file():
        return [single]
    if single.exists() or single.is_symlink():
        raise ModelError(
            "damaged-weights", "is not a file", where=str(single), help="download the file again."
        )
    if index.is_file():
        return _shards(index)
    there = sorted(path.iterdir())
    foreign = next((file for file in there if file.suffix in _FOREIGN), None)
    if foreign is not None:
        what, way = _FOREIGN[foreign.suffix]
        raise ModelError(
            "foreign-weights",
            f"`{foreign.name}` {what}; there is no {_SINGLE}",
            where=str(path),
            help=way,
        )
    other = next((file.name for file in there if file.suffix == ".safetensors"), None)
    what = "there is no safetensors file" if other is None else f"there is no {_SINGLE}, only `{other}`"
    raise ModelError("no-weights", what, where=str(path), help=MODEL_FOLDER)


def count_parameters(file: Path) -> int:
    """The entries of all tensors of a safetensors file.

    Raises ModelError where the header does not fit the file: tensors that overlap, leave gaps or reach beyond
    its end, unknown types, a header that is cut off or larger than the format allows.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="numpy") as tensors:
            return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            "damaged-weights",
            f"is damaged or cut off: {error}",
            where=str(file),
            help="download the file again.",
        ) from error


def read_object(file: Path, code: str) -> dict[str, Any]:
    """A JSON file of a base that holds one object, of at most 4 MiB. Raises ModelError with that code."""
    if not file.is_file():
        raise ModelError(code, f"there is no {file.name}", where=str(file.parent), help=MODEL_FOLDER)
    if file.stat().st_size > _LARGEST_OBJECT:
        raise ModelError(code, f"is larger than {_LARGEST_OBJECT} bytes", where=str(file))
    try:
        value = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(
            code, f"is not JSON: {error}", where=str(file), help="download the file again."
        ) from error
    if not isinstance(value, dict):
        raise ModelError(code, f"must be an object, got {type(value).__name__}", where=str(file))
    return value


def _shards(index: Path) -> list[Path]:
    content = read_object(index, "base-index")
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError("base-index", "`weight_map` is missing or empty", where=str(index))
    if not isinstance(content.get("metadata"), dict):
        raise ModelError("base-index", "`metadata` must be an object", where=str(index))
    names = sorted({str(name) for name in weight_map.values()})
    if len(names) > _MOST_SHARDS:
        raise ModelError(
            "base-index", f"names {len(names)} files, at most {_MOST_SHARDS} are read", where=str(index)
        )
    for name in names:
        if not _is_plain(name):
            raise ModelError(
                "base-index", f"`{name}` is not a plain file name that ends in .safetensors", where=str(index)
            )
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ModelError(
            "missing-shard",
            f"{len(missing)} of {len(names)} shards are missing: {', '.join(missing[:3])}",
            where=str(index),
            help="download the base again.",
        )
    return [index.parent / name for name in names]


def _is_plain(name: str) -> bool:
    is_bare = name == Path(name).name and "\\" not in name and "\0" not in name
    return is_bare and name.endswith(".safetensors") and len(name.encode(errors="replace")) <= _LONGEST_NAME
