"""What this machine offers: packages, devices and the libraries that do the arithmetic."""

from __future__ import annotations

import os
import platform
import sys
from typing import Any

from soup_xb.backends import is_installed
from soup_xb.runs.writer import versions

_MLX_BACKENDS = ("ring", "mpi", "nccl", "jaccl")


def examine() -> dict[str, Any]:
    """Everything that a bug report or a choice of backend needs; a backend that is not installed is None."""
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "versions": versions(),
        "torch": _torch() if is_installed("torch") else None,
        "mlx": _mlx() if is_installed("mlx") else None,
        "bitsandbytes": is_installed("bitsandbytes"),
    }


def _torch() -> dict[str, Any]:
    import torch

    from soup_xb.backends.torch.device import choose_device
    from soup_xb.backends.torch.processes import Processes

    return {
        "device": choose_device("auto", Processes()).reason,
        "cuda_devices": torch.cuda.device_count(),
        "cuda_names": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "mps": torch.backends.mps.is_available(),
        "distributed": _torch_backends(),
        "threads": torch.get_num_threads(),
        "gflops_float32": round(_torch_gflops(), 1),
    }


def _torch_backends() -> list[str]:
    """What several processes can talk through; NCCL is compiled in where it needs devices that may be missing."""
    import torch.distributed as dist

    if not dist.is_available():
        return []
    found = {
        "gloo": dist.is_gloo_available(),
        "nccl": dist.is_nccl_available(),
        "mpi": dist.is_mpi_available(),
    }
    return [name for name, there in found.items() if there]


def _torch_gflops(size: int = 1024, repeats: int = 5) -> float:
    import time

    import torch

    left, right = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best / 1e9


def _mlx() -> dict[str, Any]:
    from soup_xb.backends.mlx.blas import blas_in_use, measure_gflops

    blas = blas_in_use()
    import mlx.core as mx

    return {
        "device": str(mx.default_device()),
        "distributed": [name for name in _MLX_BACKENDS if mx.distributed.is_available(name)],
        "blas": blas.name,
        "blas_reason": blas.reason,
        "gflops_float32": round(measure_gflops(), 1),
    }
