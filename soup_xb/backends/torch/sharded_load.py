"""Reading a base shard by shard: every process reads its rows of each weight, and none ever holds the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from safetensors import safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_utils import LoadStateDictConfig

from soup_xb.backends.torch.device import Device, give_freed_memory_back, memory_guard
from soup_xb.backends.torch.load import check_loading, outline_base, unreadable
from soup_xb.backends.torch.processes import Processes
from soup_xb.backends.torch.sharding import mesh_of, shard_blocks
from soup_xb.backends.torch.vocabulary import shard_vocabulary
from soup_xb.core.base.folder import BaseFolder, inspect_base, weight_files
from soup_xb.core.disk import foreign_errors
from soup_xb.core.errors import ModelError, Problem
from soup_xb.core.run.session import SessionSettings


def load_sharded(settings: SessionSettings, device: Device, processes: Processes) -> Any:
    """The base cut over all processes, frozen, in evaluation mode: the same model as `load_base` gives.

    transformers reads a weight that is cut already by its slices, expert by expert where experts lie apart in the
    file. Raises ModelError for a quantized base and for what `load_base` refuses.
    """
    folder = inspect_base(settings.base)
    if folder.quantization:
        raise _quantized(folder)
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
    check_loading(folder, report)
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
