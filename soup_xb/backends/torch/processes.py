"""The processes of a run: joining them, and sums over all of them."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from attrs import frozen

from soup_xb.core.errors import ConfigError


@frozen
class Processes:
    """The place of this process among all; one alone outside a launcher such as torchrun."""

    process: int = 0
    processes: int = 1
    local: int = 0

    @property
    def many(self) -> bool:
        """Whether there is anyone to talk to."""
        return self.processes > 1

    def sum_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over all processes; one message for all of them."""
        if not self.many or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        start = 0
        for tensor in tensors:
            tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
            start += tensor.numel()

    def largest(self, value: int) -> int:
        """The largest value over all processes."""
        if not self.many:
            return value
        shared = torch.tensor([value], dtype=torch.int64, device=_message_device())
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return int(shared.item())

    def leave(self) -> None:
        """End the conversation."""
        if self.many and dist.is_initialized():
            dist.destroy_process_group()


def join_processes() -> Processes:
    """Join the processes that a launcher started, over NCCL on CUDA and gloo elsewhere.

    Raises ConfigError where they do not find each other.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Processes()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        try:
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        except (ValueError, RuntimeError) as error:
            raise ConfigError(
                "launch-failed",
                f"the processes do not find each other: {str(error).splitlines()[0]}",
                where="environment",
                help="launch with `torchrun --nproc-per-node N -m soup_xb train FILE`.",
            ) from error
    return Processes(dist.get_rank(), dist.get_world_size(), local)


def _message_device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"
