"""FSDP2 of a base that is frozen: its blocks are cut over the processes, and each is whole only while it computes.

Factors stay plain tensors beside it, the same on every process, and their gradients are summed once a step. They are
a hundredth of the base; held whole they need no message of their own in a micro-batch, a prune counts over whole
tensors as it always does, and a checkpoint has the same bytes whatever it was trained on.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers.modeling_layers import GradientCheckpointingLayer

from soup_xb.backends.torch.device import Device
from soup_xb.backends.torch.processes import Processes
from soup_xb.core.errors import ModelError


def mesh_of(device: Device, processes: Processes) -> DeviceMesh:
    """All processes in one row."""
    return init_device_mesh(device.torch_device.type, (processes.processes,))


def shard_blocks(model: Any, mesh: DeviceMesh, offload: bool, apart: set[torch.nn.Parameter]) -> None:
    """Cut the decoder blocks, each a unit, and what is left of the model as one more; `apart` is left alone.

    Nothing is cast on the way: the weights are read in the run's precision and the factors, which are summed in
    float32, are no part of it. Raises ModelError for a model whose blocks are not known.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=None, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
    )
    place: OffloadPolicy = OffloadPolicy()
    if offload:
        place = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise ModelError(
            "no-blocks",
            f"the blocks of `{model.config.model_type}` are not marked, so that it cannot be cut into them",
            where="training.sharding",
            help="use `sharding: none`.",
        )
    # A block inside another one is cut first.
    for module in (*reversed(blocks), model):
        fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=True,
            mp_policy=policy,
            offload_policy=place,
            ignored_params=apart,
        )
        if mesh.device_type == "cpu":
            # Gathering the block that comes next beside this one hides no time where the same cores do both. One that
            # prefetches itself, which is there already, prefetches nothing.
            module.set_modules_to_backward_prefetch([module])


def rows_on_mesh(weight: torch.Tensor, mesh: DeviceMesh) -> torch.nn.Parameter:
    """A weight without values, as this process's rows of it: the rows are cut as `torch.chunk` cuts them."""
    first, last = own_rows(len(weight), mesh)
    local = torch.empty((last - first, *weight.shape[1:]), dtype=weight.dtype, device="meta")
    cut = DTensor.from_local(
        local, mesh, [Shard(0)], run_check=False, shape=weight.shape, stride=weight.stride()
    )
    return torch.nn.Parameter(cut, requires_grad=False)


def rows_each(rows: int, mesh: DeviceMesh) -> int:
    """The rows that a process holds of a weight; the last ones may hold fewer."""
    return -(-rows // mesh.size())


def own_rows(rows: int, mesh: DeviceMesh) -> tuple[int, int]:
    """The first row of this process and the one behind its last."""
    each, mine = rows_each(rows, mesh), mesh.get_local_rank()
    return min(mine * each, rows), min((mine + 1) * each, rows)


def own_part(weight: torch.Tensor) -> tuple[torch.Tensor, slice]:
    """What this process holds of a weight, to be changed in place, and which of its rows they are."""
    if not isinstance(weight, DTensor):
        return weight, slice(None)
    return weight.to_local(), slice(*own_rows(len(weight), weight.device_mesh))


def whole(weight: torch.Tensor) -> torch.Tensor:
    """A weight with all its rows, on the device that computes; every process has to ask for it at the same time."""
    if not isinstance(weight, DTensor):
        return weight
    mesh, place = weight.device_mesh, compute_device(weight)
    each = rows_each(len(weight), mesh)
    mine, rows = own_part(weight)
    padded = torch.zeros((each, *weight.shape[1:]), dtype=weight.dtype, device=place)
    padded[: rows.stop - rows.start] = mine
    gathered = torch.empty((each * mesh.size(), *weight.shape[1:]), dtype=weight.dtype, device=place)
    dist.all_gather(list(gathered.split(each)), padded, group=mesh.get_group())
    return gathered[: len(weight)]


def compute_device(weight: torch.Tensor) -> torch.device:
    """Where a layer computes with this weight; offloaded rows lie elsewhere meanwhile."""
    if not isinstance(weight, DTensor):
        return weight.device
    kind = weight.device_mesh.device_type
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def is_cut(weight: torch.Tensor) -> bool:
    """Whether this process holds only some rows of the weight."""
    return isinstance(weight, DTensor)


def is_sharded(model: Any) -> bool:
    """Whether every process has to take part wherever the model runs."""
    return any(map(is_cut, model.parameters()))
