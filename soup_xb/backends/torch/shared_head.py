"""Which processes compute the head of a model together, and what they have to agree on before they do it in chunks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from attrs import frozen
from torch.distributed.tensor import DTensor

from soup_xb.backends.torch.sharding import compute_device, is_sharded


@frozen(eq=False)
class SharingProcesses:
    """The processes of `group`, or this one alone. `can_chunk`: their head runs as often as it likes by itself."""

    group: Any
    place: torch.device
    can_chunk: bool

    def largest(self, value: int) -> int:
        """The largest value over all of them, the same on each; it waits for all of them."""
        if self.group is None:
            return value
        shared = torch.tensor([value], dtype=torch.int64, device=self.place)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self.group)
        return int(shared.item())


def sharing_processes(model: Any) -> SharingProcesses:
    """Those that hold parts of the model.

    A head whose rows are cut multiplies slice by slice (see vocabulary); any other, and a bias, would have to be
    gathered with the model.
    """
    if not is_sharded(model):
        return SharingProcesses(None, torch.device("cpu"), can_chunk=True)
    cut = next(weight for weight in model.parameters() if isinstance(weight, DTensor))
    head = model.get_output_embeddings()
    plain = isinstance(head, torch.nn.Linear) and "forward" in vars(head) and head.bias is None
    return SharingProcesses(cut.device_mesh.get_group(), compute_device(cut), can_chunk=plain)
