"""The processes of a run: joining them, and sums over all of them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from attrs import frozen
from torch.distributed.rendezvous import rendezvous

from soup_xb.core.errors import ConfigError, ResourceError

_TIMED_OUT = re.compile(r"(?i)timed? ?out.*?(\d+) ?ms")
_CLOSED = re.compile(r"(?i)connection (was )?(closed|reset|refused)|broken pipe|remote process exited")
_GO_ON = "the last checkpoint is whole: start all of them again with `--resume`."


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
        with peer_guard():
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
        with peer_guard():
            dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return int(shared.item())

    def leave(self) -> None:
        """End the conversation."""
        if self.many and dist.is_initialized():
            dist.destroy_process_group()


def join_processes(timeout: int) -> Processes:
    """Join the processes that a launcher started, over NCCL on CUDA and gloo elsewhere.

    From then on one that waits `timeout` seconds for another gives up. Raises ConfigError where they do not find
    each other.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Processes()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        try:
            _meet("nccl" if torch.cuda.is_available() else "gloo", timedelta(seconds=timeout))
        except (ValueError, RuntimeError) as error:
            raise ConfigError(
                "launch-failed",
                f"the processes do not find each other: {str(error).splitlines()[0]}",
                where="environment",
                help="launch with `torchrun --nproc-per-node N -m soup_xb train FILE`.",
            ) from error
    return Processes(dist.get_rank(), dist.get_world_size(), local)


def _meet(backend: str, timeout: timedelta) -> None:
    """Find the others in the launcher's store, under the number of this start.

    torchrun keeps one store through its restarts, where processes would find the addresses of those that have ended.
    """
    store, process, processes = next(rendezvous("env://", timeout=timeout))
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(f"start-{start}", store),
        rank=process,
        world_size=processes,
        timeout=timeout,
    )


@contextmanager
def peer_guard() -> Iterator[None]:
    """Turn the silence or the end of another process into a message. Raises ResourceError."""
    try:
        yield
    except RuntimeError as error:
        lost = lost_process(error)
        if lost is None:
            raise
        raise lost from error


def lost_process(error: RuntimeError) -> ResourceError | None:
    """What to say of an error that comes from another process's silence or end, None for any other."""
    text = str(error)
    waited = _TIMED_OUT.search(text)
    if waited:
        message = (
            f"another process did not answer within {int(waited[1]) / 1000:g} s, so that this one gave up"
        )
        cure = f"look at what the others say; {_GO_ON} A longer wait is `training.process_timeout`."
        return ResourceError("process-silent", message, where="training.process_timeout", help=cure)
    if _CLOSED.search(text):
        message = (
            "the connection to another process is closed: it was killed, or ended by an error of its own"
        )
        return ResourceError("process-lost", message, help=f"look at what the others say; {_GO_ON}")
    return None


def _message_device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"
