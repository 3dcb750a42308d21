"""The base with the adapter folded into its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from soup_xb.backends.torch.adapters import ADAPTER, Adapters
from soup_xb.backends.torch.vera import VeraAdapters
from soup_xb.core.errors import ModelError


def write_merged(model: Any, adapters: Adapters | VeraAdapters, folder: Path) -> None:
    """Write the full model, weight + scale * B A, as safetensors in the base's dtype.

    Raises ModelError for a quantized base, whose rounded weights the sum does not fit into.
    """
    if getattr(model, "is_quantized", False):
        raise ModelError(
            "merge-quantized",
            "the base is quantized, and a merged weight does not fit into its format",
            help="merge onto the plain base: run again with `--set training.quantization=none`.",
        )
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if ".base_layer." in name:
            name = name.replace(".base_layer.", ".")
        elif ".lora_" in name or ".vera_" in name:
            continue
        state[name] = tensor
    for name in adapters.layers:
        state[f"{name}.weight"] = _merged_weight(adapters, name)
    model.save_pretrained(folder, state_dict=state, safe_serialization=True)


def _merged_weight(adapters: Adapters | VeraAdapters, name: str) -> torch.Tensor:
    layer = adapters.layers[name]
    weight = layer.get_base_layer().weight.detach()
    if not adapters.plan.use_dora:
        return (weight.float() + adapters.delta(name, adapters.live_piece(name))).to(weight.dtype)
    # DoRA rescales whole rows; PEFT's own merge knows how, and is undone at once.
    keep = weight.clone()
    layer.merge(safe_merge=True, adapter_names=[ADAPTER])
    merged = layer.get_base_layer().weight.detach().clone()
    layer.unmerge()
    layer.get_base_layer().weight.data.copy_(keep)
    return merged
