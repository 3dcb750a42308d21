"""A base model's folder, checked before any library opens it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from attrs import frozen

from soup_xb.core.base.weight_files import MODEL_FOLDER, count_parameters, read_object, weight_files
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
