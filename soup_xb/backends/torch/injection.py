"""PEFT's LoRA layers put around exactly the planned modules and expert weights, and switched off for a while."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners import tuners_utils
from peft.tuners.lora import LoraLayer
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers.pytorch_utils import Conv1D

from soup_xb.backends.torch.experts import ExpertLayer, layer_name
from soup_xb.core.adapter.plan import AdapterPlan
from soup_xb.core.base.modules import AdapterModule
from soup_xb.core.errors import ModelError

ADAPTER = "default"
Factors = Mapping[str, Mapping[str, np.ndarray[Any, Any]]]


def inject(model: Any, plan: AdapterPlan, name: str) -> dict[str, Any]:
    """Wrap what the plan names, under PEFT's adapter `name`; the layers by core's names.

    On some model types PEFT rewrites `target_modules`: a name such as `mlp.down_proj` would then mean the experts, and
    the dense layer of that name would get no adapter, in silence. Names given by a state dict are not rewritten.
    """
    linears = [adapter for adapter in plan.modules if not adapter.experts]
    experts = [adapter for adapter in plan.modules if adapter.experts]
    with warnings.catch_warnings():
        # PEFT switches fan_in_fan_out by itself where a model mixes both kinds of layer, and warns of it; of modules
        # that no `target_modules` names, of ranks for parameters, and of being called twice; and of a head that
        # shares its weight, which a merge here parts from the embedding.
        for message in (
            "fan_in_fan_out",
            "While injecting the PEFT adapters",
            "The following rank_pattern",
            "Already found a `peft_config`",
            "Model has `tie_word_embeddings=True`",
        ):
            warnings.filterwarnings("ignore", message=message)
        # Factors on the meta device are not initialized in vain; DoRA's magnitudes are computed from theirs.
        if linears:
            conv1d = any(isinstance(model.get_submodule(adapter.name), Conv1D) for adapter in linears)
            config = _config(plan, linears, target_modules=[], fan_in_fan_out=conv1d)
            keys = {f"{adapter.name}.lora_A.weight": torch.empty(0) for adapter in linears}
            with _refusals_of_peft(model):
                inject_adapter_in_model(
                    config, model, name, low_cpu_mem_usage=not plan.use_dora, state_dict=keys
                )
        if experts:
            names = [adapter.name for adapter in experts]
            config = _config(plan, experts, target_modules=[], target_parameters=names)
            inject_adapter_in_model(config, model, name, low_cpu_mem_usage=True)
    layers = lora_layers(model)
    for adapter in experts:
        if adapter.name in layers:
            layers[adapter.name].__class__ = ExpertLayer
    return layers


def lora_layers(model: Any) -> dict[str, Any]:
    """The LoRA layers of a model by core's names."""
    return {
        layer_name(name, module): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def names_of_experts(model: Any, names: Iterable[str]) -> set[str]:
    """The module names of which PEFT thinks, on this model type, that they mean the experts of older transformers.

    A saved adapter cannot name a linear layer that is called so, in any form of `target_modules`.
    """
    taken = set()
    for name in names:
        config = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model=model, conversions=None)
        except ValueError:
            # One half of a fused pair.
            taken.add(name)
        if name not in config.target_modules:
            taken.add(name)
    return taken


# Modules whose weight the model multiplies with itself, past any adapter on them.
_READ_DIRECTLY = {"mamba": {"dt_proj"}, "falcon_mamba": {"dt_proj"}, "jamba": {"dt_proj"}}


def refused_names(model: Any, names: Iterable[str]) -> set[str]:
    """The module names on which an adapter would do nothing: their weights are read directly, as Mamba's kernels do.

    PEFT refuses some of them itself.
    """
    check: Any = getattr(tuners_utils, "_check_lora_target_modules_mamba", lambda *_: None)
    refused = _READ_DIRECTLY.get(model.config.model_type, set()) & set(names)
    for name in names:
        try:
            check(LoraConfig(), model, name)
        except ValueError:
            refused.add(name)
    return refused


@contextmanager
def bypassed(layers: Mapping[str, Any], parameters: Mapping[str, torch.nn.Parameter]) -> Iterator[None]:
    """Inside, PEFT's layers pass their input to the base alone; `parameters`, which PEFT freezes then, train again."""
    for layer in layers.values():
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers.values():
            layer.enable_adapters(True)
        for parameter in parameters.values():
            parameter.requires_grad_(True)


def check_reach(model: Any, plan: AdapterPlan, layers: Mapping[str, Any]) -> None:
    """Raise ModelError where PEFT wrapped other modules than the planned ones."""
    planned = {adapter.name for adapter in plan.modules}
    if planned != set(layers):
        odd = sorted(planned.symmetric_difference(layers))
        raise ModelError(
            "adapters-astray",
            f"PEFT put adapters elsewhere than planned on `{model.config.model_type}`, first at `{odd[0]}`",
            where="training.lora.target_modules",
            help="name the modules with a pattern that leaves these out, and report this model.",
        )


@contextmanager
def _refusals_of_peft(model: Any) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ModelError(
            "refused-by-peft",
            f"PEFT cannot adapt one of the modules of `{model.config.model_type}`: {str(error).splitlines()[0]}",
            where="training.lora.target_modules",
            help="name the modules with patterns that leave this one out.",
        ) from error


def _config(plan: AdapterPlan, adapters: Sequence[AdapterModule], **targets: Any) -> LoraConfig:
    first = adapters[0]
    ranks: Mapping[str, int] = {
        re.escape(adapter.name): adapter.rank for adapter in adapters if adapter.rank != first.rank
    }
    return LoraConfig(
        r=first.rank,
        lora_alpha=first.alpha,
        lora_dropout=plan.dropout,
        rank_pattern=dict(ranks),
        use_rslora=plan.use_rslora,
        use_dora=plan.use_dora,
        bias="none",
        init_lora_weights=True,
        **targets,
    )
