"""The base with the adapter folded into its weights."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from soup_xb.backends.torch.adapters import Adapters
from soup_xb.backends.torch.experts import add_piece, base_weight
from soup_xb.backends.torch.injection import ADAPTER
from soup_xb.backends.torch.vera import VeraAdapters
from soup_xb.core.adapter.pieces import beyond_format
from soup_xb.core.errors import ModelError


def write_merged(model: Any, adapters: Adapters | VeraAdapters, folder: Path) -> None:
    """Write the full model, weight + scale * B A, as safetensors in the base's dtype.

    An adapted output head that shares its weight with the embedding gets one of its own. Raises ModelError for a
    quantized base, whose rounded weights the sum does not fit into, for any other weight that modules share, and for a
    sum that the dtype cannot hold.
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
            name = re.sub(r"(\.base_layer)+\.", ".", name)
        elif ".lora_" in name or ".vera_" in name:
            continue
        state[name] = tensor
    for adapter in adapters.plan.modules:
        name = adapter.name if adapter.experts else f"{adapter.name}.weight"
        state[name] = _merged_weight(adapters, adapter.name)
        if not state[name].isfinite().all():
            raise beyond_format(adapter.name, str(state[name].dtype).removeprefix("torch."))
    with _own_head(model, adapters):
        model.save_pretrained(folder, state_dict=state, safe_serialization=True)


@contextmanager
def _own_head(model: Any, adapters: Adapters | VeraAdapters) -> Iterator[None]:
    """Inside, the config says that head and embedding are two weights, where an adapter on the head parts them."""
    shared = _sharing(model, adapters)
    head = model.get_output_embeddings()
    for name in shared:
        if adapters.layers[name] is not head:
            raise ModelError(
                "merge-shared-weight",
                f"`{name}` shares its weight with another module, which a merged weight would change too",
                help="use the adapter beside the base, or train without this module in `target_modules`.",
            )
    configs = [model.config, model.config.get_text_config()] if shared else []
    tied = [config.tie_word_embeddings for config in configs]
    try:
        for config in configs:
            config.tie_word_embeddings = False
        yield
    finally:
        for config, value in zip(configs, tied, strict=True):
            config.tie_word_embeddings = value


def _sharing(model: Any, adapters: Adapters | VeraAdapters) -> list[str]:
    """The adapted modules whose weight is another module's too."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    weights = {
        name: getattr(layer.get_base_layer(), "weight", None) for name, layer in adapters.layers.items()
    }
    return [name for name, weight in weights.items() if uses[id(weight)] > 1]


def _merged_weight(adapters: Adapters | VeraAdapters, name: str) -> torch.Tensor:
    layer = adapters.layers[name]
    weight = base_weight(layer).detach()
    if not adapters.plan.use_dora:
        merged = weight.clone()
        add_piece(merged, adapters.live_piece(name), partial(adapters.delta, name))
        return merged
    # DoRA rescales whole rows; PEFT's own merge knows how, and is undone at once.
    keep = weight.clone()
    layer.merge(safe_merge=True, adapter_names=[ADAPTER])
    merged = layer.get_base_layer().weight.detach().clone()
    layer.unmerge()
    layer.get_base_layer().weight.data.copy_(keep)
    return merged
