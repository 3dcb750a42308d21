"""Embedding and output head of a sharded base: the vocabulary's matrices, a model's largest, are never whole.

FSDP would gather all rows for every forward. A micro-batch looks up a few of them, which their owners send; the head
multiplies with a slice of every process's rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from soup_xb.backends.torch.sharding import compute_device, own_part, rows_each, rows_on_mesh

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
        for first, part in _slices(weight):
            product[..., first : first + len(part)] = hidden @ part.T
        return product

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        result = gradient.new_zeros((*gradient.shape[:-1], ctx.weight.shape[1]))
        for first, part in _slices(ctx.weight):
            result += gradient[..., first : first + len(part)] @ part
        return result, None


def _slices(weight: DTensor) -> Iterator[tuple[int, torch.Tensor]]:
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
