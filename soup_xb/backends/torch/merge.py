"""What an adapter adds to its layers: measured beside the base, and folded into the weights of a whole model."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.pytorch_utils import Conv1D

from soup_xb.backends.torch.adapters import Adapters
from soup_xb.backends.torch.experts import add_piece, base_weight, is_stored_transposed
from soup_xb.backends.torch.injection import ADAPTER
from soup_xb.backends.torch.sharding import compute_device, whole
from soup_xb.backends.torch.starts import weight_matrix
from soup_xb.backends.torch.vera import VeraAdapters
from soup_xb.core.adapter.pieces import beyond_format
from soup_xb.core.adapter.probe import LayerDelta, probe_inputs
from soup_xb.core.base.folder import read_object
from soup_xb.core.base.model_config import CONFIG, ConfigChanges
from soup_xb.core.base.modules import AdapterModule
from soup_xb.core.errors import ModelError

Array = np.ndarray[Any, Any]


def base_outputs(adapters: Adapters) -> dict[str, Array]:
    """What each base layer gives before the first merge, float64 (rows, out_features), of experts a stack."""
    with torch.no_grad():
        return {
            adapter.name: _base_output(adapters.layers[adapter.name], adapter)
            for adapter in adapters.plan.modules
        }


def live_addition(
    adapters: Adapters | VeraAdapters,
    adapter: AdapterModule,
    factors: Mapping[str, Array],
    true: Mapping[str, Array],
    merged: Mapping[str, Array],
) -> LayerDelta:
    """See Session.addition; `true` are `base_outputs` where merges may have been folded into the base.

    `merged` are those after the last merge, where a base that is cut over the processes cannot be asked by one.
    """
    layer = adapters.layers[adapter.name]
    with torch.no_grad():
        if adapters.plan.use_dora:
            return _dora_addition(layer, adapter, factors)
        added, roundoff = _plain_addition(layer, adapter)
        if isinstance(adapters, VeraAdapters) or adapter.name not in true:
            return LayerDelta(added, roundoff)
        # The base holds what merges folded into it, rounded once for each of them.
        before, folded = true[adapter.name], len(adapters.pieces[adapter.name])
        now = merged[adapter.name] if adapter.name in merged else _base_output(layer, adapter)
        return LayerDelta(
            added + (now - before),
            roundoff,
            base=before,
            base_roundoff=_roundoff(base_weight(layer).dtype) * math.sqrt(1 + folded),
        )


def _plain_addition(layer: Any, adapter: AdapterModule) -> tuple[Array, float]:
    """The layer's output without the base's, and the roundoff of the format that it was made in."""
    if adapter.experts:
        return _stacked_addition(layer, adapter), _roundoff(base_weight(layer).dtype)
    with _on_base(layer, _Silent(adapter.out_features)):
        return _array(layer(_inputs(layer, adapter))), _roundoff(torch.float32)


class _Silent(torch.nn.Module):
    """A base layer that gives zeros: what is left of an adapted layer's output is the adapter's, in full precision."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.new_zeros((*inputs.shape[:-1], self.out_features))


@contextmanager
def _on_base(layer: Any, base: torch.nn.Module) -> Iterator[None]:
    own, layer.base_layer = layer.base_layer, base
    try:
        yield
    finally:
        layer.base_layer = own


def _dora_addition(layer: Any, adapter: AdapterModule, factors: Mapping[str, Array]) -> LayerDelta:
    """DoRA scales what the base gives, here a float32 copy of this one base layer, whatever its format."""
    inputs, base = _inputs(layer, adapter), layer.get_base_layer()
    weight, bias = weight_matrix(base).float(), getattr(base, "bias", None)
    bias = None if bias is None else bias.float()
    a, b = (torch.from_numpy(factors[name]).to(weight.device) for name in ("lora_A", "lora_B"))
    copy = _linear(weight, bias, transposed=isinstance(base, Conv1D))
    with _on_base(layer, copy):
        added = layer(inputs) - copy(inputs)
    return LayerDelta(
        _array(added),
        _roundoff(torch.float32),
        base=_array(inputs @ weight.T),
        base_roundoff=_roundoff(torch.float32),
        norms=_array(torch.linalg.norm(weight + adapter.scale * (b @ a), dim=1)),
    )


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool) -> torch.nn.Module:
    out_features, in_features = weight.shape
    with torch.device("meta"):
        layer = (
            Conv1D(out_features, in_features)
            if transposed
            else torch.nn.Linear(in_features, out_features, bias is not None)
        )
    layer.weight = torch.nn.Parameter(weight.T if transposed else weight, requires_grad=False)
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    return layer


def _stacked_addition(layer: Any, adapter: AdapterModule) -> Array:
    """The adapted stack with zeros for the base's: made whole, as each forward makes it."""
    module, leaf, weight = layer.get_base_layer(), layer.parameter_name, layer.get_param()
    module.__dict__[leaf] = torch.zeros((), dtype=weight.dtype, device=compute_device(weight)).expand(
        weight.shape
    )
    try:
        return _stack_output(layer.adapted_weight(), layer, adapter)
    finally:
        del module.__dict__[leaf]


def _base_output(layer: Any, adapter: AdapterModule) -> Array:
    """Weight times inputs of a plain base (merges go into no other), float64: small sums are looked for in it."""
    weight = whole(base_weight(layer))
    stack = weight if adapter.experts else weight.unsqueeze(0)
    transposed = is_stored_transposed(layer) or isinstance(layer.get_base_layer(), Conv1D)
    inputs = torch.from_numpy(probe_inputs(adapter.name, adapter.in_features)).double()
    # One matrix at a time, and on the CPU: Metal has no float64.
    outputs = [inputs @ (matrix if transposed else matrix.T).double().cpu() for matrix in stack]
    array: Array = torch.stack(outputs).numpy()
    return array if adapter.experts else array[0]


def _stack_output(stack: torch.Tensor, layer: Any, adapter: AdapterModule) -> Array:
    inputs, transposed = _inputs(layer, adapter), is_stored_transposed(layer)
    outputs = [inputs @ (matrix if transposed else matrix.T).float() for matrix in stack]
    return _array(torch.stack(outputs))


def _inputs(layer: Any, adapter: AdapterModule) -> torch.Tensor:
    vera = hasattr(layer, "vera_lambda_d")
    factor = layer.vera_lambda_d[ADAPTER] if vera else layer.lora_A[ADAPTER].trained
    return torch.from_numpy(probe_inputs(adapter.name, adapter.in_features)).to(factor.device)


def _roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def _array(tensor: torch.Tensor) -> Array:
    array: Array = tensor.float().cpu().numpy()
    return array


def write_merged(model: Any, adapters: Adapters | VeraAdapters, folder: Path) -> ConfigChanges:
    """Write the full model, weight + scale * B A, as safetensors in the base's dtype; gives what its config changes.

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
    with _own_head(model, adapters) as own_head, _without_generation(model):
        model.save_pretrained(folder, state_dict=state, safe_serialization=True)
    (folder / "generation_config.json").unlink(missing_ok=True)
    written = read_object(folder / CONFIG, "base-config")
    return ConfigChanges(
        dtype=str(model.dtype).removeprefix("torch."),
        architectures=written.get("architectures") or (),
        own_head=own_head,
        instead=written,
    )


@contextmanager
def _without_generation(model: Any) -> Iterator[None]:
    """Inside, the model has a plain generation config: transformers refuses to save some that many bases have."""
    own = getattr(model, "generation_config", None)
    if own is None:
        yield
        return
    model.generation_config = type(own)()
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def _own_head(model: Any, adapters: Adapters | VeraAdapters) -> Iterator[bool]:
    """Inside, the config says that head and embedding are two weights, where an adapter on the head parts them.

    Gives whether they are.
    """
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
        yield bool(shared)
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
