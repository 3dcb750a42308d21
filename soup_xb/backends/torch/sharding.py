"""FSDP2 of a base that is frozen: its blocks are cut over the processes, and each is whole only while it computes.

Factors stay plain tensors beside it, the same on every process, and their gradients are summed once a step. They are
a hundredth of the base; held whole they need no message of their own in a micro-batch, a prune counts over whole
tensors as it always does, and a checkpoint has the same bytes whatever it was trained on.

Embedding and output head, a model's largest matrices, are never whole: FSDP would gather all rows for every forward. A
micro-batch looks up a few of them, which their owners send; the head multiplies with a slice of every process's rows at
a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
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


# What is gathered of the head at a time, over all processes.
SLICE_BYTES = 2**22


def shard_vocabulary(model: Any, mesh: DeviceMesh) -> set[torch.nn.Parameter]:
    """Cut the rows of embedding and head of a model without values; returns the parameters that this replaced.

    A head that shares the embedding's weight goes on sharing it. Another kind of module than a plain embedding and a
    plain linear layer is left to FSDP.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    cut: dict[int, torch.nn.Parameter] = {}
    for module, kind, forward in (
        (embedding, torch.nn.Embedding, _look_up),
        (head, torch.nn.Linear, _multiply),
    ):
        if not isinstance(module, kind):
            continue
        own = module.weight
        module.weight = cut.setdefault(id(own), rows_on_mesh(own, mesh))
        module.forward = partial(forward, module)
    return set(cut.values())


def rows_of(weight: DTensor, ids: torch.Tensor) -> torch.Tensor:
    """The rows (n, hidden) of `ids` (n,), asked of the processes that hold them."""
    mesh, group = weight.device_mesh, weight.device_mesh.get_group()
    mine, rows = own_part(weight)
    owners = torch.div(ids, rows_each(len(weight), mesh), rounding_mode="floor")
    order = torch.argsort(owners, stable=True)
    asked = torch.bincount(owners, minlength=mesh.size())
    wanted = torch.empty_like(asked)
    dist.all_to_all_single(wanted, asked, group=group)
    ask, answer = asked.tolist(), wanted.tolist()
    theirs = ids.new_empty(sum(answer))
    dist.all_to_all_single(theirs, ids[order], answer, ask, group=group)
    found = mine[(theirs - rows.start).to(mine.device)].to(ids.device)
    sorted_rows = torch.empty((len(ids), weight.shape[1]), dtype=weight.dtype, device=ids.device)
    dist.all_to_all_single(sorted_rows, found, ask, answer, group=group)
    result = torch.empty_like(sorted_rows)
    result[order] = sorted_rows
    return result


def _look_up(module: Any, ids: torch.Tensor) -> torch.Tensor:
    """The embedding's own forward on the rows that it needs, whatever else it does to them."""
    weight, padding = module.weight, module.padding_idx
    if not isinstance(weight, DTensor):
        return type(module).forward(module, ids)
    needed, places = torch.unique(ids, return_inverse=True)
    # An attribute of the object is found before its parameters are looked at.
    module.__dict__["weight"] = rows_of(weight, needed)
    # It keeps a gradient off one row, and here no row gets one.
    module.padding_idx = None
    try:
        found: torch.Tensor = type(module).forward(module, places)
        return found
    finally:
        del module.__dict__["weight"]
        module.padding_idx = padding


def _multiply(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = _SlicedProduct.apply(hidden, module.weight)
    return product if module.bias is None else product + module.bias


class _SlicedProduct(torch.autograd.Function):
    """hidden (…, in) @ weight.T -> (…, rows), slice by slice; the weight is frozen and has no gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: DTensor) -> torch.Tensor:
        ctx.weight = weight
        product = hidden.new_empty((*hidden.shape[:-1], len(weight)))
        for first, part in _row_slices(weight):
            product[..., first : first + len(part)] = hidden @ part.T
        return product

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        result = gradient.new_zeros((*gradient.shape[:-1], ctx.weight.shape[1]))
        for first, part in _row_slices(ctx.weight):
            result += gradient[..., first : first + len(part)] @ part
        return result, None


def _row_slices(weight: DTensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Pieces of a weight with their first rows, the same on every process and in the same order.

    Each message brings the next rows of every process's part.
    """
    mesh, place = weight.device_mesh, compute_device(weight)
    each, (mine, _) = rows_each(len(weight), mesh), own_part(weight)
    width = weight.shape[1] * weight.element_size() * mesh.size()
    step = max(1, min(each, SLICE_BYTES // width))
    for start in range(0, each, step):
        rows = min(step, each - start)
        sent = mine[start : start + rows].to(place)
        if len(sent) < rows:
            sent = torch.cat([sent, sent.new_zeros(rows - len(sent), weight.shape[1])])
        gathered = sent.new_empty((mesh.size() * rows, weight.shape[1]))
        parts = gathered.split(rows)
        dist.all_gather(list(parts), sent.contiguous(), group=mesh.get_group())
        for process, part in enumerate(parts):
            first = process * each + start
            real = min(rows, each - start, max(0, len(weight) - first))
            if real:
                yield first, part[:real]
