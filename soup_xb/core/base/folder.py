"""A base model's folder: checked before any library opens it, its weight files, and the fingerprint of its content."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen

from soup_xb.core.disk import write_text
from soup_xb.core.errors import ModelError

# The largest sizes that a base may claim, far above every model of today: what lies beyond is no model, and a
# library that builds it would fill the memory before it finds out.
_LARGEST = {
    "num_hidden_layers": 4096,
    "num_attention_heads": 65_536,
    "num_key_value_heads": 65_536,
    "num_experts": 65_536,
    "num_local_experts": 65_536,
    "n_routed_experts": 65_536,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "head_dim": 2**16,
    "vocab_size": 2**24,
    "max_position_embeddings": 2**31 - 1,
    "n_layer": 4096,
    "n_head": 65_536,
    "n_embd": 2**20,
}
# In the model types of encoders: roberta, modernbert, xlm-roberta-xl and others.
_ENCODERS = ("bert", "mpnet", "electra")


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
    def is_encoder(self) -> bool:
        """Whether it reads texts and writes none, as far as the config alone tells: BERT and its kin."""
        named = self.config.get("architectures")
        names = [str(name) for name in named] if isinstance(named, list) else []
        if any("CausalLM" in name or "LMHead" in name for name in names):
            return False
        masked = any(name.endswith("ForMaskedLM") for name in names)
        return masked or any(kin in self.model_type for kin in _ENCODERS)

    @property
    def quantization(self) -> str:
        """The name of the format that the weights are already quantized in, empty for plain weights."""
        written = self.config.get("quantization_config") or self.config.get("quantization") or {}
        if not written:
            return ""
        return str(written.get("quant_method") or "mlx") if isinstance(written, dict) else "unknown"


def has_tied_head(base: BaseFolder) -> bool:
    """Whether the output head is the embedding: the files hold no other head, and the config does not untie them."""
    if _other_head(_stored_tensors(base.path)):
        return False
    told = [
        part["tie_word_embeddings"]
        for part in (base.config, base.config.get("text_config"))
        if isinstance(part, dict) and "tie_word_embeddings" in part
    ]
    if not told:
        return True
    return told[0] is True if holds_head(base) else True in told


def holds_head(base: BaseFolder) -> bool:
    """Whether the files hold a weight for the output head."""
    return any(_is_head(name) for name in _stored_tensors(base.path))


def check_tied_head(base: BaseFolder) -> None:
    """Check the files of a base whose config ties the output head to the embedding.

    A head that is stored all the same must have the embedding's values, which both are read for. Libraries disagree
    about any other: some take the head, others the embedding. Raises ModelError.
    """
    other = _other_head(_stored_tensors(base.path))
    if other:
        raise untied_head(base, other)


def untied_head(base: BaseFolder, head: str) -> ModelError:
    """The error for a stored head that is not the embedding to which the config ties it."""
    return ModelError(
        "untied-head",
        f"the config ties the output head to the embedding, and the files hold another `{head}`",
        where=str(base.path),
        help="set `tie_word_embeddings` to false in config.json where the head belongs to the model; else remove the "
        "head from the files.",
    )


def inspect_base(path: Path, weights: bool = True) -> BaseFolder:
    """Check a base folder: its config, and with `weights` every safetensors file's header and size.

    Raises ModelError naming the file and what is wrong with it.
    """
    if not path.is_dir():
        raise ModelError("base-not-found", f"no such folder: {path}", help=MODEL_FOLDER)
    if (path / "adapter_config.json").exists():
        # transformers would put the adapter on, and could take another base for it.
        raise ModelError(
            "base-is-adapter",
            "holds adapter_config.json: an adapter, not a base",
            where=str(path),
            help="name the adapter's own base as `base`, and this folder as `adapter`.",
        )
    config = read_object(path / "config.json", "base-config")
    if not isinstance(config.get("model_type"), str):
        raise ModelError(
            "base-config", "`model_type` is missing", where=str(path / "config.json"), help=MODEL_FOLDER
        )
    _refuse_code(path, config)
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        _check_sizes(path / "config.json", part)
    if not weights:
        return BaseFolder(path, config, 0, 0)
    parameters = size = 0
    for file in weight_files(path):
        parameters, size = parameters + count_parameters(file), size + file.stat().st_size
    stored = _stored_tensors(path)
    _refuse_doubles(path, stored)
    if not _names_quantization(config):
        _refuse_formats(stored)
    return BaseFolder(path, config, parameters, size)


def unknown_type(base: BaseFolder, transformers: str) -> ModelError:
    """The error for a type that this version of transformers does not know; names the code that the folder brings."""
    wants = base.config.get("auto_map")
    code = f", and its folder wants to run its own code ({', '.join(wants)})" if wants else ""
    return ModelError(
        "remote-code" if wants else "unknown-model-type",
        f"transformers {transformers} does not know `{base.model_type}`{code}",
        where=str(base.path / "config.json"),
        help="use a newer transformers that knows it; soup-xb never runs code from a model folder.",
    )


def _check_sizes(file: Path, config: dict[str, Any]) -> None:
    """Some types keep a list with a size for each layer, or null; what is one number must be a plausible one."""
    for name, largest in _LARGEST.items():
        value = config.get(name)
        if value is None or isinstance(value, list):
            continue
        lowest = 0 if "experts" in name else 1
        if type(value) is not int or not lowest <= value <= largest:
            raise ModelError(
                "base-config",
                f"`{name}` must be an integer from {lowest} to {largest}, got {json.dumps(value)[:60]}",
                where=str(file),
                help="download the file again.",
            )


def _refuse_code(path: Path, config: dict[str, Any]) -> None:
    """A folder may bring code; it is never imported. Types that the library knows run the library's own."""
    if not isinstance(config.get("auto_map") or {}, dict):
        raise ModelError("base-config", "`auto_map` must be an object", where=str(path / "config.json"))
    if "transformers_weights" in config:
        raise ModelError(
            "base-config",
            "`transformers_weights` names other weights than the folder's own",
            where=str(path / "config.json"),
            help="remove the key; weights lie in model.safetensors or in the shards of its index.",
        )
    if "model_file" in config:
        raise ModelError(
            "remote-code",
            f"the base wants to run its own code (`model_file: {config['model_file']}`)",
            where=str(path / "config.json"),
            help="soup-xb never runs code from a model folder; use a base that transformers or mlx-lm knows.",
        )


# Of each tensor, from its middle: every training moves every tensor, and a whole base takes minutes to read.
_PIECE = 4096


def base_fingerprint(path: Path) -> str:
    """The sha256 of a base's config, of its weight files' headers, and of a piece of each tensor.

    A base that `inspect_base` has checked. Raises OSError where a file is gone since.
    """
    digest = hashlib.sha256(hashlib.sha256((path / "config.json").read_bytes()).digest())
    for file in weight_files(path):
        _add_file(digest, file)
    return digest.hexdigest()


def _add_file(digest: hashlib._Hash, file: Path) -> None:
    with file.open("rb") as stream:
        length = stream.read(8)
        header = stream.read(int.from_bytes(length, "little"))
        digest.update(length + header)
        data = stream.tell()
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        for begin, end in sorted(tuple(entry["data_offsets"]) for entry in entries.values()):
            stream.seek(data + begin + max(0, (end - begin - _PIECE) // 2))
            digest.update(stream.read(min(_PIECE, end - begin)))


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


# safetensors' names of number formats, and how NumPy reads their bytes; bf16 is the upper half of a float32.
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
# Masks, positions and tables of experts are stored in these, weights are not.
_INTEGERS = ("BOOL", "I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64")
_HEADS = ("lm_head", "embed_out")
_EMBEDDINGS = (
    "embed_tokens", "embed_in", "embeddings", "shared", "tok_embeddings", "tokens_embed", "word_embeddings", "wte",
)  # fmt: skip
# Of a head or an embedding; the latter two belong to weights that MLX has packed.
_PARTS = ("weight", "scales", "biases")
# Names begin with these or not, depending on the class that saved the base.
_PREFIXES = ("model", "language_model")
_COMPARED = 8 * 1024 * 1024


@frozen
class _Tensor:
    """A tensor in a safetensors file: its number format, and from which byte of the file to which it lies."""

    file: Path
    format: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _stored_tensors(path: Path) -> dict[str, list[_Tensor]]:
    """Every place of each tensor of a base, by name. The headers have been checked."""
    stored: dict[str, list[_Tensor]] = {}
    for file in weight_files(path):
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = (8 + length + offset for offset in entry["data_offsets"])
                place = _Tensor(file, entry["dtype"], tuple(entry["shape"]), begin, end)
                stored.setdefault(name, []).append(place)
    return stored


def _is_head(name: str) -> bool:
    return _is_weight_of(name, _HEADS)


def _is_weight_of(name: str, owners: Sequence[str]) -> bool:
    """Whether it is the weight of one of them, and not of a layer that predicts tokens further on."""
    owner, _, last = name.rpartition(".")
    parts = owner.split(".")
    return last == "weight" and parts[-1] in owners and not any(part.isdigit() for part in parts)


def _other_head(stored: Mapping[str, list[_Tensor]]) -> str:
    """The name of an output head that is none of the embeddings; empty where there is no head or nothing to compare."""
    embeddings = [name for name in stored if _is_weight_of(name, _EMBEDDINGS)]
    for head in filter(_is_head, stored):
        if embeddings and not any(_same_weight(stored, head, embedding) for embedding in embeddings):
            return head
    return ""


def _same_weight(stored: Mapping[str, list[_Tensor]], one: str, other: str) -> bool:
    for part in _PARTS:
        first, second = (stored.get(f"{name.removesuffix('weight')}{part}", []) for name in (one, other))
        if len(first) != len(second) or (first and not _same_values(first[0], second[0])):
            return False
    return True


def _same_values(one: _Tensor, other: _Tensor) -> bool:
    """Whether two tensors are equal, read in pieces; one may be stored in a wider format than the other."""
    if one.shape != other.shape:
        return False
    if one.format == other.format:
        pairs = zip(_pieces(one, _COMPARED), _pieces(other, _COMPARED), strict=True)
        return all(first == second for first, second in pairs)
    if not {one.format, other.format} <= set(_FLOATS):
        return False
    sizes = [np.dtype(_FLOATS[each.format]).itemsize * (_COMPARED // 8) for each in (one, other)]
    return all(
        np.array_equal(_widened(first, one.format), _widened(second, other.format))
        for first, second in zip(_pieces(one, sizes[0]), _pieces(other, sizes[1]), strict=True)
    )


def _pieces(tensor: _Tensor, size: int) -> Iterator[bytes]:
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.begin)
        for begin in range(tensor.begin, tensor.end, size):
            yield stream.read(min(size, tensor.end - begin))


def _widened(raw: bytes, format: str) -> np.ndarray[Any, Any]:
    array = np.frombuffer(raw, dtype=_FLOATS[format])
    return (array.astype(np.uint32) << 16).view(np.float32) if format == "BF16" else array


def _refuse_doubles(path: Path, stored: Mapping[str, list[_Tensor]]) -> None:
    """A tensor may lie in several files, or under the names of two classes, as long as all have the same values."""
    places: dict[str, list[tuple[str, _Tensor]]] = {}
    for name, tensors in stored.items():
        parts = name.split(".")
        while parts[0] in _PREFIXES and len(parts) > 1:
            parts = parts[1:]
        places.setdefault(".".join(parts), []).extend((name, tensor) for tensor in tensors)
    for (first, one), *others in places.values():
        for name, other in others:
            if not _same_values(one, other):
                where = f"`{first}` in {one.file.name} and `{name}` in {other.file.name}"
                raise ModelError(
                    "doubled-weight",
                    f"the same weight is stored twice with other values: {where}",
                    where=str(path),
                    help="remove the files that do not belong to the base, or download it again into an empty folder.",
                )


def _refuse_formats(stored: Mapping[str, list[_Tensor]]) -> None:
    """Integers, float8 and complex numbers are no weights as they are; libraries convert them, each in its own way."""
    for name, tensors in stored.items():
        last = name.rpartition(".")[2]
        for tensor in tensors:
            weighs = last == "weight" or last.endswith("_proj") or (last == "bias" and len(tensor.shape) == 1)
            if tensor.format in _FLOATS or (tensor.format in _INTEGERS and not weighs):
                continue
            raise ModelError(
                "weight-format",
                f"`{name}` is stored as {tensor.format}, and config.json does not say how it was quantized",
                where=str(tensor.file),
                help="take the plain base, or one whose config.json has its `quantization_config`.",
            )


def _names_quantization(config: Mapping[str, Any]) -> bool:
    parts = (config, *(part for part in config.values() if isinstance(part, dict)))
    return any(
        part.get(key)
        for part in parts
        for key in ("quantization_config", "quantization", "compression_config")
    )


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


def write_index(folder: Path, places: Mapping[str, str], size: int) -> None:
    """Write the index of a model in several files: `places` names each tensor's file, `size` counts their bytes."""
    content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    write_text(folder / _INDEX, json.dumps(content, indent=2) + "\n")


def _is_plain(name: str) -> bool:
    is_bare = name == Path(name).name and "\\" not in name and "\0" not in name
    return is_bare and name.endswith(".safetensors") and len(name.encode(errors="replace")) <= _LONGEST_NAME
