"""Opening a base with transformers, with every setting passed: whole, or cut over all processes shard by shard.

Of a sharded base every process reads its rows of each weight, and none ever holds the whole model.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_utils import LoadStateDictConfig
from transformers.pytorch_utils import Conv1D

from soup_xb.backends.torch.base_kind import auto_class, check_embedding, check_kind
from soup_xb.backends.torch.device import Device, give_freed_memory_back, memory_guard
from soup_xb.backends.torch.experts import expert_weights
from soup_xb.backends.torch.injection import names_of_experts, refused_names
from soup_xb.backends.torch.processes import Processes
from soup_xb.backends.torch.sharding import mesh_of, shard_blocks, shard_vocabulary
from soup_xb.core.base.folder import (
    BaseFolder,
    check_tied_head,
    inspect_base,
    unknown_type,
    untied_head,
    weight_files,
)
from soup_xb.core.base.layers import layer_settings
from soup_xb.core.base.model_config import POSITIONS_BEHIND_PADDING, padding_without_row
from soup_xb.core.base.modules import Module
from soup_xb.core.base.rope import RopeScaling
from soup_xb.core.disk import foreign_errors
from soup_xb.core.errors import ConfigError, ModelError, Problem
from soup_xb.core.run.session import BaseDescription, SessionSettings

# A config.json may name a kernel on the hub here, which is code that somebody else wrote; None is the library's own.
_OWN_IMPLEMENTATIONS = {"attn_implementation": None, "experts_implementation": None}


def load_base(settings: SessionSettings, device: Device) -> Any:
    """The base as a transformers model, frozen, in evaluation mode, on the device.

    It is a causal language model, or with `settings.media` what takes such files and gives text.

    Raises ModelError for a folder that is damaged, holds foreign formats or wants to run code.
    """
    folder = inspect_base(settings.base)
    config, kind = read_config(folder, settings.media, embeds=bool(settings.pooling))
    stretch(config, folder, settings.rope_scaling)
    quantization = _quantization(settings.quantization, folder, device)
    if is_tied(config, kind) and not settings.pooling:
        check_tied_head(folder)
    with memory_guard("loading the base"):
        with foreign_errors(partial(unreadable, folder)):
            model, report = kind.from_pretrained(
                settings.base,
                config=config,
                dtype=device.dtype,
                trust_remote_code=False,
                **_OWN_IMPLEMENTATIONS,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                **quantization,
            )
        check_loading(folder, model, report)
        if not quantization and not folder.quantization:
            model.to(device.torch_device)
    model.requires_grad_(False)
    model.eval()
    _keep_quantized_layers_trainable(model)
    return model


def outline_base(settings: SessionSettings, dtype: torch.dtype | None = None) -> Any:
    """The base's modules on the meta device: names and shapes without memory."""
    folder = inspect_base(settings.base, weights=False)
    config, kind = read_config(folder, settings.media, embeds=bool(settings.pooling))
    stretch(config, folder, settings.rope_scaling)
    with torch.device("meta"), foreign_errors(partial(unreadable, folder)):
        return kind.from_config(config, dtype=dtype, trust_remote_code=False, **_OWN_IMPLEMENTATIONS)


def read_config(folder: BaseFolder, media: str = "", embeds: bool = False) -> tuple[Any, Any]:
    """The base's config as transformers reads it, and the Auto class that opens it.

    `media` is the kind of files that rows have; a base that `embeds` is opened without its head. Raises ModelError
    for a type that is not trained here.
    """
    if folder.model_type not in transformers.CONFIG_MAPPING:
        raise unknown_type(folder, transformers.__version__)
    with foreign_errors(partial(unreadable, folder)):
        config = transformers.AutoConfig.from_pretrained(
            folder.path, trust_remote_code=False, local_files_only=True
        )
    for part in (config, config.get_text_config()):
        named = getattr(part, "pad_token_id", None)
        if padding_without_row(named, getattr(part, "vocab_size", None)):
            part.pad_token_id = named if folder.model_type in POSITIONS_BEHIND_PADDING else None
    if embeds:
        check_embedding(folder, config)
        return config, transformers.AutoModel
    check_kind(folder, config, media)
    return config, auto_class(config, media)


def stretch(config: Any, folder: BaseFolder, scaling: RopeScaling | None) -> None:
    """Stretch the positions of a base that is yet to be opened. Raises ModelError where they cannot be."""
    if scaling is None:
        return
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", 0)
    parameters = getattr(text, "rope_parameters", None)
    text.rope_parameters = scaling.of(parameters, longest, str(folder.path / "config.json"))


def is_linear(module: torch.nn.Module) -> bool:
    """Whether an adapter can sit on the module: nn.Linear with its quantized forms, and GPT-2's Conv1D.

    A grouped linear (DeepSeek V4) is none: every group of its inputs has a matrix of its own.
    """
    return isinstance(module, torch.nn.Linear | Conv1D) and not type(module).__name__.endswith(
        "GroupedLinear"
    )


def describe_model(model: Any, wrappers: Mapping[str, str]) -> BaseDescription:
    """The structure of a model without adapters; `wrappers` names what stands around some of its linears."""
    modules: list[Module] = []
    linears = [name for name, module in model.named_modules() if is_linear(module)]
    lasts = {name.rpartition(".")[2] for name in linears}
    taken, refused = names_of_experts(model, lasts), refused_names(model, lasts)
    for name, module in model.named_modules():
        if is_linear(module) and name.rpartition(".")[2] not in refused:
            sides, last = _sides(module), name.rpartition(".")[2]
            modules.append(Module(name, *sides, reached_as=wrappers.get(name, ""), by_weight=last in taken))
        modules += expert_weights(name, module)
    config = model.config.get_text_config()
    return BaseDescription(
        model_type=model.config.model_type,
        modules=tuple(modules),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        vocabulary_size=config.vocab_size,
        other_weights=_other_weights(model, {module.name for module in modules}),
        layer_settings=layer_settings(config.to_dict()),
    )


def _other_weights(model: Any, listed: set[str]) -> tuple[str, ...]:
    """The parameters of two dimensions or more that no adapter can sit on, biases aside."""
    matrices = [name for name, weight in model.named_parameters() if weight.dim() > 1 and name not in listed]
    names = (name.removesuffix(".weight") for name in matrices)
    return tuple(name for name in names if name not in listed and not name.endswith("bias"))


def _sides(module: Any) -> tuple[int, int]:
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    return module.out_features, module.in_features


def _quantization(asked: str, folder: BaseFolder, device: Device) -> dict[str, Any]:
    """Keyword arguments that load the base in 4 or 8 bits through bitsandbytes."""
    if folder.quantization == "mlx":
        raise ModelError(
            "mlx-quantized-base",
            "the base is quantized in MLX's own format, which torch cannot read",
            where=str(folder.path),
            help="use the plain base, or run with --backend mlx.",
        )
    if asked == "none":
        return {}
    if folder.quantization:
        raise ModelError(
            "already-quantized",
            f"the base is already quantized ({folder.quantization}) and `quantization: {asked}` asks for it again",
            where="training.quantization",
            help="remove `training.quantization`, or name the plain base.",
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "bitsandbytes-missing",
            f"`{asked}` needs bitsandbytes, which is not installed",
            where="training.quantization",
            help='pip install "soup-xb[torch,quantization]"',
        )
    if asked == "8bit":
        config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=device.dtype,
        )
    return {"quantization_config": config, "device_map": {"": device.torch_device}}


def _keep_quantized_layers_trainable(model: Any) -> None:
    """Leave bitsandbytes' layers in training mode.

    In evaluation mode on a CPU they repack their weight for an inference kernel that passes no gradient on.
    """
    for module in model.modules():
        if type(module).__module__.startswith("bitsandbytes"):
            module.training = True


def check_loading(folder: BaseFolder, model: Any, report: Any) -> None:
    """Raise ModelError where the files are not the model's: weights missing, of another shape, or of another model."""
    # The pooler of a BERT is read by no loss here, and many encoders are saved without one.
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    mismatched = sorted(str(key) for key in report["mismatched_keys"])
    foreign = [] if folder.quantization else _foreign(folder, model, report["unexpected_keys"])
    if missing or mismatched or foreign:
        first = (missing or mismatched or foreign)[0]
        raise ModelError(
            "incomplete-weights",
            f"{len(missing)} weights are missing, {len(mismatched)} have another shape and {len(foreign)} have no "
            f"place in the model's layers, first `{first}`",
            where=str(folder.path),
            help="download the base again: config and weights do not belong together, and transformers would leave "
            "weights out, or fill them with random numbers.",
        )
    # transformers leaves a head alone that is another than the embedding to which the config ties it.
    untied = (
        model.get_expanded_tied_weights_keys(all_submodels=True).keys() - model.all_tied_weights_keys.keys()
    )
    if untied:
        raise untied_head(folder, min(untied))


def _foreign(folder: BaseFolder, model: Any, unread: Iterable[str]) -> list[str]:
    """What was not read of a layer that the model has not, or of one of its linears, norms and embeddings.

    Towers, further heads and buffers beside those take no part in what the model computes.
    """
    modules = dict(model.named_modules())
    # Behind the model's layers lie those that predict tokens further on.
    ahead = any("nextn" in key or "mtp" in key for part in _configs(folder.config) for key in part)
    found = []
    for name in sorted(unread):
        parts = name.split(".")
        owners = (".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1))
        owner = modules.get(next((owner for owner in owners if owner in modules), ""))
        if isinstance(owner, torch.nn.ModuleList):
            foreign = not ahead
        else:
            foreign = (
                owner is not None and not any(owner.children()) and any(True for _ in owner.parameters())
            )
        if foreign and parts[-1] not in ("inv_freq", "position_ids"):
            found.append(name)
    return found


def _configs(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield config
    yield from (part for part in config.values() if isinstance(part, dict))


def is_tied(config: Any, kind: Any) -> bool:
    """Whether the config ties the output head of what this Auto class opens to its embedding."""
    opened = kind._model_mapping[type(config)]
    opened = opened[0] if isinstance(opened, tuple) else opened
    own = config if opened.config_class is type(config) else config.get_text_config()
    return bool(getattr(own, "tie_word_embeddings", False))


def unreadable(folder: BaseFolder, reason: str) -> ModelError:
    """The error about a base that transformers cannot open."""
    if "ignore_mismatched_sizes" in reason:
        return ModelError(
            "incomplete-weights",
            "the weights have other shapes than config.json says",
            where=str(folder.path),
            help="download the base again: config and weights do not belong together.",
        )
    return ModelError(
        "unreadable-base",
        f"transformers cannot open it: {reason}",
        where=str(folder.path),
        help="check that the folder is a language model that this transformers version knows.",
    )


def load_sharded(settings: SessionSettings, device: Device, processes: Processes) -> Any:
    """The base cut over all processes, frozen, in evaluation mode: the same model as `load_base` gives.

    transformers reads a weight that is cut already by its slices, expert by expert where experts lie apart in the
    file. Raises ModelError for a quantized base and for what `load_base` refuses.
    """
    folder = inspect_base(settings.base)
    if folder.quantization:
        raise _quantized(folder)
    config, kind = read_config(folder, settings.media, embeds=bool(settings.pooling))
    if is_tied(config, kind) and not settings.pooling:
        check_tied_head(folder)
    give_freed_memory_back()
    model = outline_base(settings, device.dtype)
    _keep_float32(model, device.dtype)
    mesh = mesh_of(device, processes)
    shard_blocks(model, mesh, settings.cpu_offload, shard_vocabulary(model, mesh))
    place = torch.device("cpu") if settings.cpu_offload else device.torch_device
    with memory_guard("loading the base"), foreign_errors(partial(unreadable, folder)):
        report = _read(model, folder, device.dtype, place)
        if settings.cpu_offload:
            # FSDP moves parameters to the device that computes, and leaves buffers to the model's owner.
            for module in model.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    module._buffers[name] = buffer.to(device.torch_device)
    check_loading(folder, model, report)
    model.requires_grad_(False)
    model.eval()
    return model


def sharding_notices(settings: SessionSettings, processes: Processes) -> tuple[Problem, ...]:
    """How the base lies on the processes, where the config asks for it to be cut."""
    if settings.sharding != "fsdp":
        return ()
    if not processes.many:
        offload = ", and `cpu_offload` moves none of it" if settings.cpu_offload else ""
        text = (
            f"one process holds the whole base{offload}; several share it under a launcher such as torchrun"
        )
        return (Problem("sharding", f"fsdp: {text}"),)
    place = ", in CPU memory between its uses" if settings.cpu_offload else ""
    text = f"each of {processes.processes} processes holds its rows of every weight of the base{place}"
    return (Problem("sharding", f"fsdp: {text}"),)


def _read(model: Any, folder: BaseFolder, dtype: torch.dtype, place: torch.device) -> Any:
    """What transformers does in `from_pretrained` once the model is built: read, compute buffers, tie."""
    load = LoadStateDictConfig(
        pretrained_model_name_or_path=str(folder.path),
        device_map={"": place},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=get_model_conversion_mapping(model, None, None),
        use_safetensors=True,
    )
    with _slices(folder) as state:
        info, _ = model._load_pretrained_model(model, state, None, load)
    return model._finalize_model_loading(model, load, info).to_dict()


@contextmanager
def _slices(folder: BaseFolder) -> Iterator[dict[str, Any]]:
    """Every tensor of the files by name, none of them read yet."""
    with ExitStack() as files:
        state: dict[str, Any] = {}
        for path in weight_files(folder.path):
            # Mapped into memory, a file would count as this process's with every page near one that is read.
            file = files.enter_context(safe_open(str(path), framework="pt", device="cpu", backend="pread"))
            state |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        yield state


def _keep_float32(model: Any, dtype: torch.dtype) -> None:
    """Give the few weights that transformers keeps in float32 that format before they are cut."""
    kept = model._get_dtype_plan(dtype)
    for name, parameter in model.named_parameters():
        if any(pattern in name for pattern in kept):
            parameter.data = parameter.data.float()


def _quantized(folder: BaseFolder) -> ModelError:
    return ModelError(
        "sharded-quantized-base",
        f"the base is quantized ({folder.quantization}), and its packed weights cannot be cut by rows",
        where="training.sharding",
        help="name the plain base, or use `sharding: none`.",
    )
