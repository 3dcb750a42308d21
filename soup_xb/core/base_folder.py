"""A base model's folder, checked before any library opens it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from attrs import frozen

from soup_xb.core.errors import ModelError

# Formats that can run code when read, or that hold no float weights; each with the way to the format we read.
_FOREIGN_WEIGHTS = {
    ".bin": "pickle",
    ".pt": "pickle",
    ".pth": "pickle",
    ".gguf": "GGUF",
    ".npz": "NumPy archive",
    ".h5": "Keras",
    ".msgpack": "Flax",
}
_CONFIG_LIMIT = 4 * 1024 * 1024
_NAMELESS = "a model folder holds config.json, safetensors weights and the tokenizer's files."


@frozen
class BaseFolder:
    """A base on the disk. `parameters` and `weight_bytes` are read from the safetensors headers."""

    path: Path
    config: dict[str, Any]
    parameters: int
    weight_bytes: int

    @property
    def model_type(self) -> str:
        """The config's `model_type`."""
        return str(self.config.get("model_type", ""))

    @property
    def quantization(self) -> str:
        """The name of the format that the weights are already quantized in, empty for plain weights."""
        written = self.config.get("quantization_config") or self.config.get("quantization") or {}
        if not written:
            return ""
        return str(written.get("quant_method") or "mlx") if isinstance(written, dict) else "unknown"


def inspect_base(path: Path, weights: bool = True) -> BaseFolder:
    """Check a base folder: its config, and with `weights` every safetensors file's header and size.

    Raises ModelError naming the file and what is wrong with it.
    """
    if not path.is_dir():
        raise ModelError("base-not-found", f"no such folder: {path}", help=_NAMELESS)
    config = _read_object(path / "config.json", "base-config")
    if not isinstance(config.get("model_type"), str):
        raise ModelError(
            "base-config", "`model_type` is missing", where=str(path / "config.json"), help=_NAMELESS
        )
    _refuse_code(path, config)
    if not weights:
        return BaseFolder(path, config, 0, 0)
    parameters = size = 0
    for file in _weight_files(path):
        count, length = _inspect_safetensors(file)
        parameters, size = parameters + count, size + length
    return BaseFolder(path, config, parameters, size)


def _read_object(file: Path, code: str) -> dict[str, Any]:
    if not file.is_file():
        raise ModelError(code, f"there is no {file.name}", where=str(file.parent), help=_NAMELESS)
    if file.stat().st_size > _CONFIG_LIMIT:
        raise ModelError(code, f"is larger than {_CONFIG_LIMIT} bytes", where=str(file))
    try:
        value = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(
            code, f"is not JSON: {error}", where=str(file), help="download the file again."
        ) from error
    if not isinstance(value, dict):
        raise ModelError(code, f"must be an object, got {type(value).__name__}", where=str(file))
    return value


def _refuse_code(path: Path, config: dict[str, Any]) -> None:
    """A folder may bring code; it is never imported. Types that the library knows run the library's own."""
    if "model_file" in config:
        raise ModelError(
            "remote-code",
            f"the base wants to run its own code (`model_file: {config['model_file']}`)",
            where=str(path / "config.json"),
            help="soup-xb never runs code from a model folder; use a base that transformers or mlx-lm knows.",
        )


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = _shard_names(index)
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise ModelError(
                "missing-shard",
                f"{len(missing)} of {len(names)} shards are missing: {', '.join(missing[:3])}",
                where=str(index),
                help="download the base again.",
            )
        return [path / name for name in names]
    files = sorted(path.glob("*.safetensors"))
    if files:
        return files
    foreign = [file for file in sorted(path.iterdir()) if file.suffix in _FOREIGN_WEIGHTS]
    if foreign:
        raise ModelError(
            "foreign-weights",
            f"`{foreign[0].name}` is a {_FOREIGN_WEIGHTS[foreign[0].suffix]} file and there is no safetensors file",
            where=str(path),
            help="save it as safetensors with the library that made it (in transformers: `save_pretrained`).",
        )
    raise ModelError("no-weights", "there is no safetensors file", where=str(path), help=_NAMELESS)


def _shard_names(index: Path) -> list[str]:
    weight_map = _read_object(index, "base-index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError("base-index", "`weight_map` is missing or empty", where=str(index))
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if name != Path(name).name or "\\" in name or "\0" in name or name in ("", ".", ".."):
            raise ModelError("base-index", f"`{name}` is not a plain file name", where=str(index))
    return names


def _inspect_safetensors(file: Path) -> tuple[int, int]:
    """Parameters and bytes of a file whose header fits its size."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="numpy") as tensors:
            shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            "damaged-weights",
            f"is damaged or cut off: {error}",
            where=str(file),
            help="download the file again.",
        ) from error
    parameters = 0
    for shape in shapes:
        count = 1
        for side in shape:
            count *= side
        parameters += count
    return parameters, file.stat().st_size
