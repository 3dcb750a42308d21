"""PiSSA and OLoRA starts of a model's modules, from its weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from peft.utils.integrations import dequantize_module_weight
from transformers.pytorch_utils import Conv1D

from soup_xb.backends.torch.experts import expert_matrices
from soup_xb.backends.torch.processes import Processes
from soup_xb.backends.torch.sharding import compute_device, is_cut, is_sharded, whole
from soup_xb.core.adapter.plan import AdapterPlan
from soup_xb.core.adapter.starts import Start, stacked_start, weight_start
from soup_xb.core.base.modules import AdapterModule
from soup_xb.core.errors import ModelError

# Each holds a float32 copy of the weight that it works on.
_MOST_WORKERS = 8


class TorchAlgebra:
    """See soup_xb.core.adapter.starts.Algebra."""

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

    Each process does its share of the modules. Raises ModelError, on every process, for a weight that is no matrix or
    not finite.
    """
    if plan.init_strategy == "random":
        return {}
    _check_weights(model, plan)
    mine = plan.modules[processes.process :: processes.processes]
    # eigh and thin QR hardly gain from threads inside, so the modules are spread over them. bitsandbytes moves a
    # layer's state about while it dequantizes, which only one thread may do.
    threads = torch.get_num_threads()
    place = compute_device(next(model.parameters()))
    algebra = TorchAlgebra(torch.device("cpu") if place.type == "mps" else place)
    workers = 1 if getattr(model, "is_quantized", False) else min(threads, _MOST_WORKERS, len(mine) or 1)

    def start(adapter: AdapterModule, matrices: Iterable[torch.Tensor] | None = None) -> Start | None:
        weights = _finite(_matrices(model, adapter) if matrices is None else matrices)
        try:
            if adapter.experts:
                return stacked_start(plan.init_strategy, weights, adapter, algebra)
            return weight_start(plan.init_strategy, next(weights), adapter, algebra)
        except _NotFiniteError:
            return None

    if is_sharded(model):
        found = [start(adapter, matrices) for adapter, matrices in _gathered(model, plan, processes)]
    else:
        # The number of threads is a setting of each thread.
        with ThreadPoolExecutor(
            workers, initializer=lambda: torch.set_num_threads(threads // workers)
        ) as pool:
            found = list(pool.map(start, mine))
    # A process that stopped alone would leave the others waiting for its share.
    places = range(processes.process, len(plan.modules), processes.processes)
    broken = [place + 1 for place, one in zip(places, found, strict=True) if one is None]
    last = processes.largest(max(broken, default=0))
    if last:
        raise _not_finite(plan.modules[last - 1])
    starts = {adapter.name: one for adapter, one in zip(mine, found, strict=True) if one is not None}
    return _shared(starts, plan, processes, place) if processes.many else starts


class _NotFiniteError(Exception):
    """A weight has values that are not finite."""


def _matrices(model: Any, adapter: AdapterModule) -> Iterator[torch.Tensor]:
    """The weight of a module (out_features, in_features), or that of each of its experts."""
    if adapter.experts:
        path, _, leaf = adapter.name.rpartition(".")
        return expert_matrices(model.get_submodule(path), leaf)
    return iter([weight_matrix(model.get_submodule(adapter.name))])


def _gathered(
    model: Any, plan: AdapterPlan, processes: Processes
) -> Iterator[tuple[AdapterModule, list[torch.Tensor]]]:
    """The modules of this process with their weights, out of parts that lie on all of them.

    As many weights are gathered, one after the other, as there are processes, each of which keeps one to work on.
    """
    for first in range(0, len(plan.modules), processes.processes):
        kept = None
        for place, adapter in enumerate(plan.modules[first : first + processes.processes]):
            matrices = list(_matrices(model, adapter))
            if place == processes.process:
                kept = adapter, matrices
        if kept is not None:
            yield kept


def _finite(matrices: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The matrices in float32, where QR and eigh are to be had. Raises _NotFiniteError."""
    for matrix in matrices:
        # Metal has neither QR nor eigh.
        weight = matrix.float().cpu() if matrix.device.type == "mps" else matrix.float()
        # A sum is finite where every value is, and makes no second tensor as large as the weight.
        if not math.isfinite(weight.sum().item()):
            raise _NotFiniteError
        yield weight


def weight_matrix(module: Any) -> torch.Tensor:
    """The weight (out_features, in_features) of a linear layer, plain or quantized, in the format that it gives."""
    with torch.no_grad():
        weight = module.weight
        weight = whole(weight.detach()) if is_cut(weight) else dequantize_module_weight(module).detach()
        return weight.T if isinstance(module, Conv1D) else weight


def _not_finite(adapter: AdapterModule) -> ModelError:
    return ModelError(
        "non-finite-base",
        f"the weight of `{adapter.name}` has values that are not finite",
        help="the base is damaged: download it again.",
    )


def _check_weights(model: Any, plan: AdapterPlan) -> None:
    """Raise ModelError for a format that cannot be read back, and for a weight that is no matrix of its sides."""
    method = str(getattr(getattr(model, "quantization_method", None), "value", ""))
    if getattr(model, "is_quantized", False) and not method.startswith("bitsandbytes"):
        raise ModelError(
            "no-matrix",
            f"the base is quantized ({method or 'in a format of its own'}), and its weights cannot be read back",
            where="training.lora.init_strategy",
            help=f"use `init_strategy: random`, or the plain base: {plan.init_strategy} starts from the weights.",
        )
    for adapter in plan.modules:
        module = None if method or adapter.experts else model.get_submodule(adapter.name)
        sides = (adapter.out_features, adapter.in_features)
        if module is not None and tuple(module.weight.shape) != (
            sides[::-1] if isinstance(module, Conv1D) else sides
        ):
            raise ModelError(
                "no-matrix",
                f"the weight of `{adapter.name}` is {tuple(module.weight.shape)}, not a matrix of "
                f"{adapter.out_features} x {adapter.in_features}",
                where="training.lora.init_strategy",
                help="leave this module out of `target_modules`, or use `init_strategy: random`.",
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
