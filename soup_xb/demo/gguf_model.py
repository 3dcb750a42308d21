"""A Llama model in one GGUF file, written as the ordinary folder that transformers and mlx-lm load."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

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
