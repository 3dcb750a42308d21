"""PiSSA and OLoRA starts of a model's modules, from its weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from peft.utils.integrations import dequantize_module_weight
from transformers.pytorch_utils import Conv1D

from soup_xb.backends.torch.expert_layers import expert_matrices
from soup_xb.backends.torch.processes import Processes
from soup_xb.core.errors import ModelError
from soup_xb.core.modules import AdapterModule
from soup_xb.core.session import AdapterPlan
from soup_xb.core.starts import Start, stacked_start, weight_start

# Each holds a float32 copy of the weight that it works on.
_MOST_WORKERS = 8


class TorchAlgebra:
    """See soup_xb.core.starts.Algebra."""

    def __init__(self, device: torch.device) -> None:
        """Compute on `device`."""
        self.device = device

    def array(self, values: np.ndarray[Any, Any]) -> torch.Tensor:
        """A NumPy array on the device."""
        return torch.from_numpy(values).to(self.device)

    def numpy(self, matrix: torch.Tensor) -> np.ndarray[Any, Any]:
        """A NumPy array of a tensor."""
        array: np.ndarray[Any, Any] = matrix.cpu().numpy()
        return array

    def orthonormal(self, matrix: torch.Tensor) -> torch.Tensor:
        """Q of the thin QR."""
        return torch.linalg.qr(matrix)[0]

    def eigh(self, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ascending eigenvalues and eigenvectors."""
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors

    def columns(self, blocks: list[torch.Tensor]) -> torch.Tensor:
        """Side by side."""
        return torch.cat(blocks, dim=1)


def weight_starts(model: Any, plan: AdapterPlan, processes: Processes) -> dict[str, Start]:
    """The start of each planned module by name, empty for the random strategy; equal on every process.

    Each process does its share of the modules. Raises ModelError for weights that cannot be read as a matrix.
    """
    if plan.init_strategy == "random":
        return {}
    _check_format(model, plan)
    mine = plan.modules[processes.process :: processes.processes]
    # eigh and thin QR hardly gain from threads inside, so the modules are spread over them. bitsandbytes moves a
    # layer's state about while it dequantizes, which only one thread may do.
    threads = torch.get_num_threads()
    algebra = TorchAlgebra(torch.device("cpu") if model.device.type == "mps" else model.device)
    workers = 1 if getattr(model, "is_quantized", False) else min(threads, _MOST_WORKERS, len(mine) or 1)

    def start(adapter: AdapterModule) -> Start:
        weights = _weights(model, adapter)
        if adapter.experts:
            return stacked_start(plan.init_strategy, weights, adapter, algebra)
        return weight_start(plan.init_strategy, next(weights), adapter, algebra)

    # The number of threads is a setting of each thread.
    with ThreadPoolExecutor(workers, initializer=lambda: torch.set_num_threads(threads // workers)) as pool:
        starts = dict(zip((adapter.name for adapter in mine), pool.map(start, mine), strict=True))
    return _shared(starts, plan, processes, model.device) if processes.many else starts


def _weights(model: Any, adapter: AdapterModule) -> Iterator[torch.Tensor]:
    """The weight of a module, float32 (out_features, in_features), or that of each of its experts."""
    if adapter.experts:
        path, _, leaf = adapter.name.rpartition(".")
        matrices = expert_matrices(model.get_submodule(path), leaf)
    else:
        matrices = iter([_matrix(model.get_submodule(adapter.name))])
    for matrix in matrices:
        # Metal has neither QR nor eigh.
        weight = matrix.float().cpu() if matrix.device.type == "mps" else matrix.float()
        _check(weight, adapter)
        yield weight


def _matrix(module: Any) -> torch.Tensor:
    with torch.no_grad():
        weight: torch.Tensor = dequantize_module_weight(module).detach()
        return weight.T if isinstance(module, Conv1D) else weight


def _check(weight: torch.Tensor, adapter: AdapterModule) -> None:
    if tuple(weight.shape) != (adapter.out_features, adapter.in_features):
        raise ModelError(
            "no-matrix",
            f"the weight of `{adapter.name}` is {tuple(weight.shape)}, not a matrix of "
            f"{adapter.out_features} x {adapter.in_features}",
            where="training.lora.init_strategy",
            help="leave this module out of `target_modules`, or use `init_strategy: random`.",
        )
    # A sum is finite where every value is, and makes no second tensor as large as the weight.
    if not math.isfinite(weight.sum().item()):
        raise ModelError(
            "non-finite-base",
            f"the weight of `{adapter.name}` has values that are not finite",
            help="the base is damaged: download it again.",
        )


def _check_format(model: Any, plan: AdapterPlan) -> None:
    method = str(getattr(getattr(model, "quantization_method", None), "value", ""))
    if getattr(model, "is_quantized", False) and not method.startswith("bitsandbytes"):
        raise ModelError(
            "no-matrix",
            f"the base is quantized ({method or 'in a format of its own'}), and its weights cannot be read back",
            where="training.lora.init_strategy",
            help=f"use `init_strategy: random`, or the plain base: {plan.init_strategy} starts from the weights.",
        )


def _shared(
    starts: dict[str, Start], plan: AdapterPlan, processes: Processes, device: torch.device
) -> dict[str, Start]:
    """Everyone's starts: each process adds its own to zeros."""
    tensors = []
    for adapter in plan.modules:
        start = starts.get(adapter.name)
        for array, shape in (
            (start and start.a, adapter.a_shape),
            (start and start.b, adapter.b_shape),
        ):
            mine = torch.zeros(shape) if array is None else torch.from_numpy(array)
            tensors.append(mine.to(device))
    processes.sum_(tensors)
    arrays = [tensor.cpu().numpy() for tensor in tensors]
    return {
        adapter.name: Start(arrays[2 * index], arrays[2 * index + 1])
        for index, adapter in enumerate(plan.modules)
    }
