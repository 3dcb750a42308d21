"""A safetensors file of factors: read in float32 whatever it was saved in, and written as PEFT's readers expect it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from soup_xb.core.adapter.foreign_settings import damaged
from soup_xb.core.errors import ModelError

# safetensors' names of number formats, and how NumPy reads their bytes; bf16 is the upper half of a float32.
_FORMATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}

Array = np.ndarray[Any, Any]


def read_tensors(file: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """The tensors in float32, in the order of their names, and the metadata in the header.

    What is beyond float32 becomes infinite. Raises ModelError for a file that is damaged, and for integers and other
    formats that no factors are saved in.
    """
    from safetensors import SafetensorError, deserialize, safe_open

    try:
        with safe_open(str(file), framework="numpy") as opened:
            metadata = dict(opened.metadata() or {})
        found = deserialize(file.read_bytes())  # type: ignore[no-untyped-call]
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(file, f"cannot be read: {error}") from error
    tensors = {name: _as_float32(name, entry, file) for name, entry in sorted(found, key=lambda one: one[0])}
    return tensors, metadata


def _as_float32(name: str, entry: Mapping[str, Any], file: Path) -> Array:
    stored = _FORMATS.get(entry["dtype"])
    if stored is None:
        raise ModelError(
            "damaged-adapter",
            f"`{name}` is saved as {entry['dtype']}, and factors are read in float32, float16 and bfloat16",
            where=str(file),
            help="save it in one of these with the library that wrote it.",
        )
    array: Array = np.frombuffer(entry["data"], dtype=stored).reshape(entry["shape"])
    if entry["dtype"] == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def write_tensors(
    file: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a file of weights as PEFT's readers expect it, with further `metadata` in its header."""
    from safetensors.numpy import save_file

    # safetensors writes memory as it lies: a transposed view would come back scrambled.
    whole = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    save_file(whole, file, metadata={"format": "pt", **(metadata or {})})
    _sort_metadata(file)
    # safetensors writes with mode 0600 whatever the umask says.
    mask = os.umask(0)
    os.umask(mask)
    file.chmod(0o666 & ~mask)


def _sort_metadata(file: Path) -> None:
    """Put the metadata in the order of its keys: safetensors writes it in another one each time."""
    with file.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) > length:
            raise RuntimeError("safetensors spells its header in another way")
        stream.seek(8)
        stream.write(text.ljust(length))
