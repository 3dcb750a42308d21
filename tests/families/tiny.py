"""Tiny random models of every type that transformers and mlx-lm both know; `cases.json` holds their configs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

CASES = json.loads(Path(__file__).with_name("cases.json").read_text("utf-8"))
COMMON = CASES.pop("common")
# Ids above stand for pictures, sound and the like.
TOKENS = 112


def config_of(name: str, changes: Mapping[str, Any] | None = None) -> Any:
    """The config of a type's tiny model, fields of its text model changed."""
    case = CASES[name]
    told = whole(case["config"])
    text = told["text_config"] if isinstance(told.get("text_config"), dict) else told
    text.update(changes or {})
    return transformers.CONFIG_MAPPING[case.get("type", name)](**told)


def whole(config: Any) -> Any:
    """A config with the common fields in the place of `like`."""
    if not isinstance(config, dict):
        return config
    told = {key: whole(value) for key, value in config.items() if key not in ("like", "without")}
    if "like" in config:
        told = {**COMMON, **told}
        for key in config.get("without", ()):
            told.pop(key, None)
    return told


def random_model(name: str, config: Any, scale: float = 3.0, seed: int = 1) -> Any:
    """A float32 model whose weights are `scale` times as large as new ones, and no two rows of which are alike."""
    case = CASES[name]
    torch.manual_seed(seed)
    for part in (config, *(getattr(config, f"{kind}_config", None) for kind in ("text", "vision", "audio"))):
        if part is not None:
            part._attn_implementation = "eager"
    cls = getattr(transformers, case.get("class", "AutoModelForCausalLM"))
    make = cls.from_config if hasattr(cls, "from_config") else cls._from_config
    model = make(config, attn_implementation="eager").float().eval()
    noise = torch.Generator().manual_seed(seed + 1)
    scale = min(scale, case["scale"]) if case.get("scale", 3.0) < 3.0 else scale
    with torch.no_grad():
        for key, weight in model.named_parameters():
            drawn = torch.randn(weight.shape, generator=noise)
            if "A_log" in key or "dt_bias" in key or key.endswith(".D") or weight.ndim < 2:
                weight.add_(0.1 * drawn)
            else:
                weight.mul_(scale).add_(0.03 * drawn)
        for key, buffer in model.named_buffers():
            if buffer.is_floating_point() and "bias" in key and buffer.ndim <= 2:
                buffer.add_(0.1 * torch.randn(buffer.shape, generator=noise).to(buffer.dtype))
    return model


def save(name: str, model: Any, folder: Path) -> Path:
    """A model folder as transformers writes it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    case = CASES[name]
    file = folder / "config.json"
    written = json.loads(file.read_text("utf-8"))
    if case.get("nested"):
        # Its towers need packages of their own: the text model alone, as the whole type's files hold it.
        written = {"model_type": case["saved_as"], "text_config": written}
        _rename(folder, "model.", "model.language_model.")
    elif "saved_as" in case:
        written["model_type"] = case["saved_as"]
    file.write_text(json.dumps(written, indent=1), "utf-8")
    return folder


def _rename(folder: Path, old: str, new: str) -> None:
    from safetensors.numpy import load_file, save_file

    for file in folder.glob("*.safetensors"):
        weights = load_file(file)
        save_file({key.replace(old, new, 1): array for key, array in weights.items()}, file, {"format": "pt"})


def tiny_base(name: str, folder: Path, scale: float = 3.0, seed: int = 1, **changes: Any) -> Path:
    """A type's tiny model in a folder, fields of its text model changed."""
    return save(name, random_model(name, config_of(name, changes), scale, seed), folder)


def text_alone(folder: Path) -> Any:
    """The text model of a nested case, its modules named as the whole type names them."""
    from safetensors.torch import load_file

    told = json.loads((folder / "config.json").read_text("utf-8"))["text_config"]
    config = transformers.CONFIG_MAPPING[told["model_type"]].from_dict(told)
    inner = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    weights = {
        name.replace("model.language_model.", "model.", 1): tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    inner.load_state_dict(weights, strict=False)
    inner.tie_weights()
    outer = torch.nn.Module()
    outer.model = torch.nn.Module()
    outer.model.language_model, outer.config = inner.model, inner.config
    outer.forward = inner.forward  # type: ignore[method-assign]
    return outer
