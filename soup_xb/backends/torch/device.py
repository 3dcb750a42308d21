"""Where a torch run computes and in which precision, each with its reason."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from attrs import frozen

from soup_xb.backends.torch.processes import Processes, lost_process
from soup_xb.core.errors import ConfigError, ResourceError

# glibc's number for the setting, and the bytes from which a block is large.
_MMAP_THRESHOLD, _LARGE = -3, 2**17
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@frozen
class Device:
    """A device and a precision (fp32 or bf16), with the sentence that the run prints about them."""

    torch_device: torch.device
    precision: str
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the base's weights and activations; adapter factors are always float32."""
        return _DTYPES[self.precision]


def choose_device(precision: str, processes: Processes) -> Device:
    """CUDA, else Metal, else the CPU; `auto` is bf16 on an accelerator that has it and float32 elsewhere.

    Raises ConfigError for bf16 on a device without it.
    """
    if torch.cuda.is_available():
        place = torch.device("cuda", processes.local)
        name, has_bf16 = torch.cuda.get_device_name(place), torch.cuda.is_bf16_supported()
    elif torch.backends.mps.is_available():
        place, name, has_bf16 = torch.device("mps"), "Metal", True
    else:
        place, name, has_bf16 = torch.device("cpu"), "CPU", True
    if precision == "bf16" and not has_bf16:
        raise ConfigError(
            "no-bf16",
            f"{name} has no bf16 arithmetic",
            where="training.precision",
            help="use `precision: fp32`, or `auto`, which chooses what the device has.",
        )
    asked = precision != "auto"
    if not asked:
        precision = "bf16" if place.type != "cpu" and has_bf16 else "fp32"
    because = "as the config says" if asked else f"`auto` on {'a CPU' if place.type == 'cpu' else name}"
    found = "" if place.type != "cpu" else ", no CUDA or Metal device found"
    return Device(place, precision, f"{name}{found}; {precision}, {because}")


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: allocated on CUDA, else this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def give_freed_memory_back() -> None:
    """Let glibc return large blocks of memory to the system when they are freed, from here to the process's end.

    Left to itself it raises the size from which it does so to that of what is freed, and weights that come and go
    leave a heap of holes behind as large as the base. Other systems do not have the setting.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(_MMAP_THRESHOLD, _LARGE)


@contextmanager
def memory_guard(doing: str) -> Iterator[None]:
    """Turn a lack of memory, and of the other processes, into a message with the ways out. Raises ResourceError."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(doing) from error
    except RuntimeError as error:
        if "allocate memory" in str(error) or "out of memory" in str(error):
            raise _out_of_memory(doing) from error
        if lost := lost_process(error):
            raise lost from error
        raise


def _out_of_memory(doing: str) -> ResourceError:
    return ResourceError(
        "out-of-memory",
        f"out of memory while {doing}",
        help="lower `training.batch_size` (raise `gradient_accumulation_steps` to keep the step) or "
        "`data.max_length`, set `training.gradient_checkpointing: true`, or `training.quantization: 4bit`.",
    )
