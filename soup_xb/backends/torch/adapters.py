"""LoRA layers on a transformers model, in a checkpoint and at ReLoRA restarts: PEFT's layers, core's decisions.

PiSSA and OLoRA freeze W - scale B0 A0 and train B A beside it. Here W itself stays, and the layer adds
scale (B A - B0 A0): the same function and the same gradients, and the base is untouched to the bit, in any
format, quantized ones too. Written as (B - B0) A + B0 (A - A0) it is exactly zero at the start.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from safetensors.numpy import save_file
from transformers.pytorch_utils import Conv1D

from soup_xb.backends.torch.experts import add_piece, base_weight, is_stored_transposed
from soup_xb.backends.torch.injection import ADAPTER, Factors, bypassed, check_reach, inject
from soup_xb.backends.torch.sharding import compute_device, own_part
from soup_xb.backends.torch.vera import VeraAdapters
from soup_xb.core.adapter.peft_file import check_factors
from soup_xb.core.adapter.pieces import Piece, difference, joined, prune
from soup_xb.core.adapter.plan import AdapterPlan
from soup_xb.core.adapter.starts import Start, random_factor
from soup_xb.core.base.modules import AdapterModule
from soup_xb.core.errors import CheckpointError, ModelError
from soup_xb.core.run.checkpoint import check_pairs, grouped, read_tensors
from soup_xb.core.run.session import RestartResult, RestartSettings


class Adapters:
    """The adapters of one model, by module name."""

    def __init__(self, model: Any, plan: AdapterPlan, starts: Mapping[str, Start]) -> None:
        """Wrap the planned modules. Only factors require a gradient.

        A module in `starts` begins there, any other with core's random A and a B of zero.
        """
        self.plan = plan
        self.starts = dict(starts)
        # What merges left behind, in their order: it is in the base's weights, and not the base's.
        self.pieces: dict[str, list[Piece]] = {adapter.name: [] for adapter in plan.modules}
        self.layers: dict[str, Any] = inject(model, plan, ADAPTER)
        check_reach(model, plan, self.layers)
        for adapter in plan.modules:
            self._start(adapter)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The trained tensors as `module.factor` -> parameter, in the plan's order."""
        return {
            f"{adapter.name}.{factor}": parameter
            for adapter in self.plan.modules
            for factor, parameter in _factors(self.layers[adapter.name]).items()
        }

    def factors(self) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
        """The adapter as a plain LoRA on the untouched base, float32: A (rank, in), B (out, rank), experts stacked."""
        plain = self.trained()
        for name, arrays in plain.items():
            piece = joined([self.live_piece(name), *self.pieces[name]])
            arrays["lora_A"], arrays["lora_B"] = piece.a, piece.b
        return plain

    def live_piece(self, name: str) -> Piece:
        """What the trained factors of a module add, without earlier merges."""
        layer = self.layers[name]
        a, b = (tensor.detach().float().cpu().numpy().copy() for tensor in _pair(layer))
        return difference(a, b, self.starts.get(name))

    def trained(self) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
        """Copies of the tensors that are trained, float32."""
        return {
            adapter.name: {
                factor: parameter.detach().float().cpu().numpy().copy()
                for factor, parameter in _factors(self.layers[adapter.name]).items()
            }
            for adapter in self.plan.modules
        }

    def load(self, factors: Factors) -> None:
        """Set the trained tensors. Raises ModelError when names or shapes do not fit."""
        mine = self.parameters()
        given = {
            f"{name}.{factor}": array for name, arrays in factors.items() for factor, array in arrays.items()
        }
        check_factors({name: tuple(tensor.shape) for name, tensor in mine.items()}, given)
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(torch.from_numpy(np.ascontiguousarray(given[name])))

    def train(self, training: bool) -> None:
        """Switch the adapters' dropout on or off; the base stays in evaluation mode."""
        for layer in self.layers.values():
            layer.lora_dropout.train(training)

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """Inside, the model is the true base.

        Without merges the layers are bypassed, and the base is exact to the bit. What merges added to its weights
        is taken off again beside them, which costs rounding and no second copy of the weights.
        """
        if any(self.pieces.values()):
            with self._merges_taken_off():
                yield
            return
        with bypassed(self.layers, self.parameters()):
            yield

    def delta(self, name: str, piece: Piece) -> torch.Tensor:
        """What a piece adds to a module's weight, float32, in its shape."""
        layer = self.layers[name]
        place = _pair(layer)[0].device
        product = torch.from_numpy(piece.b).to(place) @ torch.from_numpy(piece.a).to(place)
        transposed = isinstance(layer.get_base_layer(), Conv1D) or is_stored_transposed(layer)
        return layer.scaling[ADAPTER] * (product.mT if transposed else product)

    def fold(self, name: str, piece: Piece) -> None:
        """Add a piece to the base's own weight, and remember it."""
        with torch.no_grad():
            mine, rows = own_part(base_weight(self.layers[name]))
            add_piece(mine, piece, partial(self.delta, name), rows)
        self.pieces[name].append(piece)

    def begin(self, name: str, a: np.ndarray[Any, Any], b: np.ndarray[Any, Any], start: Start | None) -> None:
        """Set the factors of a module and what they start from."""
        layer = self.layers[name]
        with torch.no_grad():
            for tensor, array in zip(_pair(layer), (a, b), strict=True):
                tensor.copy_(torch.from_numpy(array))
        down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        down.start = None if start is None else torch.from_numpy(start.a).to(down.trained.device)
        up.start = None if start is None else torch.from_numpy(start.b).to(up.trained.device)
        self.starts.pop(name, None)
        if start is not None:
            self.starts[name] = start

    @contextmanager
    def _merges_taken_off(self) -> Iterator[None]:
        try:
            for name, pieces in self.pieces.items():
                down, up = self.layers[name].lora_A[ADAPTER], self.layers[name].lora_B[ADAPTER]
                merged = joined(pieces)
                down.instead = torch.from_numpy(merged.a).to(down.trained.device)
                up.instead = torch.from_numpy(-merged.b).to(up.trained.device)
            yield
        finally:
            for layer in self.layers.values():
                layer.lora_A[ADAPTER].instead = layer.lora_B[ADAPTER].instead = None

    def _start(self, adapter: AdapterModule) -> None:
        layer = self.layers[adapter.name]
        layer.scaling[ADAPTER] = adapter.scale
        if adapter.experts:
            layer.take_over(adapter, ADAPTER)
        else:
            place = compute_device(base_weight(layer))
            layer.lora_A[ADAPTER] = DownFactor(adapter.a_shape, place)
            layer.lora_B[ADAPTER] = UpFactor(adapter.b_shape, place)
        start = self.starts.get(adapter.name)
        if start is not None and self.plan.dropout > 0 and not adapter.experts:
            layer.lora_dropout[ADAPTER] = DropoutBeside(self.plan.dropout)
        for parameter in _factors(layer).values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        first = start or Start(random_factor(adapter, self.plan.seed), np.zeros(adapter.b_shape, np.float32))
        self.begin(adapter.name, first.a, first.b, start)


def _pair(layer: Any) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    return layer.lora_A[ADAPTER].trained, layer.lora_B[ADAPTER].trained


def _factors(layer: Any) -> dict[str, torch.nn.Parameter]:
    factors = dict(zip(("lora_A", "lora_B"), _pair(layer), strict=True))
    if ADAPTER in layer.lora_magnitude_vector:
        factors["lora_magnitude_vector"] = layer.lora_magnitude_vector[ADAPTER].weight
    return factors


class _Factor(torch.nn.Linear):
    """A trained factor, what it started from where that is base weight, and what replaces both for a while."""

    start: torch.Tensor | None
    instead: torch.Tensor | None

    def __init__(self, shape: tuple[int, ...], place: torch.device) -> None:
        """Make room for a weight of that shape, float32, which is set later."""
        super().__init__(shape[1], shape[0], bias=False, device="meta", dtype=torch.float32)
        self.to_empty(device=place)
        self.register_buffer("start", None, persistent=False)
        self.register_buffer("instead", None, persistent=False)

    @property
    def trained(self) -> torch.nn.Parameter:
        """The factor itself."""
        return self.weight


class DownFactor(_Factor):
    """A (rank, in_features), stacked under a start A0 with A - A0."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(…, in_features) -> (…, rank), or twice the rank with a start.

        In training with dropout the input is `DropoutBeside`'s: then B0 A0 sees all of it, as the residual would.
        """
        if self.instead is not None:
            return functional.linear(input, self.instead)
        dropped = input[..., : self.in_features]
        if self.start is None:
            return functional.linear(dropped, self.weight)
        if input.shape[-1] == self.in_features:
            return functional.linear(input, torch.cat([self.weight, self.weight - self.start]))
        down = functional.linear(dropped, self.weight)
        whole = functional.linear(input[..., self.in_features :], self.start)
        return torch.cat([down, down - whole], dim=-1)


class UpFactor(_Factor):
    """B (out_features, rank); beside a start B0, [B - B0, B0]."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """What `DownFactor` gave -> (…, out_features)."""
        if self.instead is not None:
            return functional.linear(input, self.instead)
        if self.start is None:
            return functional.linear(input, self.weight)
        return functional.linear(input, torch.cat([self.weight - self.start, self.start], dim=1))


class DropoutBeside(torch.nn.Dropout):
    """Dropout that keeps the undropped input beside the dropped one, (…, n) -> (…, 2 n) in training."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The input as it is outside training."""
        return torch.cat([super().forward(input), input], dim=-1) if self.training else input


FACTORS_FILE = "factors.safetensors"
Arrays = dict[str, np.ndarray[Any, Any]]


def save_adapters(adapters: Adapters | VeraAdapters, folder: Path) -> None:
    """Write `module.factor` tensors: `lora_A`, `start_A` (pissa, olora), `piece0_A` (merges), and B likewise.

    Of VeRA the vectors and, without a module's name, the projections.
    """
    modules = adapters.factors() if isinstance(adapters, VeraAdapters) else _lora_modules(adapters)
    flat = {f"{name}.{part}": array for name, arrays in modules.items() for part, array in arrays.items()}
    save_file(flat, folder / FACTORS_FILE)


def load_adapters(adapters: Adapters | VeraAdapters, folder: Path) -> None:
    """Bring freshly attached adapters, and the base under them, to the state that was saved.

    Starts are read, not computed again, and pieces are folded in one after the other, as they were: the weights
    come out with the same bytes. Raises CheckpointError for a file that does not fit.
    """
    if isinstance(adapters, VeraAdapters):
        adapters.load(grouped(read_tensors(folder / FACTORS_FILE), "."))
        return
    if any(adapters.pieces.values()):
        raise RuntimeError("a checkpoint is loaded onto a base without merges; open it anew")
    modules = grouped(read_tensors(folder / FACTORS_FILE), ".")
    trained = {
        name: {factor: array for factor, array in arrays.items() if re.match("lora_", factor)}
        for name, arrays in modules.items()
    }
    adapters.load(trained)
    for name in trained:
        check_pairs(modules[name], folder / FACTORS_FILE)
        pieces = _pieces(modules[name])
        start = _start(modules[name])
        if start is None and not pieces and name in adapters.starts:
            raise _foreign(folder, f"`{name}` has no start")
        for piece in pieces:
            adapters.fold(name, piece)
        adapters.begin(name, trained[name]["lora_A"], trained[name]["lora_B"], start)


def _lora_modules(adapters: Adapters) -> dict[str, Arrays]:
    modules = adapters.trained()
    for name, arrays in modules.items():
        if start := adapters.starts.get(name):
            arrays |= {"start_A": start.a, "start_B": start.b}
        for index, piece in enumerate(adapters.pieces[name]):
            arrays |= {f"piece{index}_A": piece.a, f"piece{index}_B": piece.b}
    return modules


def _start(arrays: Arrays) -> Start | None:
    return Start(arrays["start_A"], arrays["start_B"]) if "start_A" in arrays else None


def _pieces(arrays: Arrays) -> list[Piece]:
    pieces: list[Piece] = []
    while f"piece{len(pieces)}_A" in arrays:
        index = len(pieces)
        pieces.append(Piece(arrays[f"piece{index}_A"], arrays[f"piece{index}_B"]))
    return pieces


def _foreign(folder: Path, message: str) -> CheckpointError:
    return CheckpointError("foreign-checkpoint", message, where=str(folder / FACTORS_FILE))


def restart_adapters(adapters: Adapters, settings: RestartSettings) -> RestartResult:
    """Prune the factors, or merge them into the base and begin new ones; the optimizer is the caller's.

    Every process holds the same factors, so that every process prunes the same entries.
    """
    if settings.mode == "merge":
        return _merge(adapters, settings.step)
    return _prune(adapters, settings.ratio)


def factor_names(adapters: Adapters) -> list[str]:
    """The trained tensors that a restart touches: A and B of each module, not DoRA's magnitudes."""
    return [
        f"{adapter.name}.{factor}" for adapter in adapters.plan.modules for factor in ("lora_A", "lora_B")
    ]


def check_mergeable(model: Any, plan: AdapterPlan) -> None:
    """Raise ModelError for a base whose weights cannot take an adapter in, before anything is trained."""
    if not plan.merges:
        return
    if getattr(model, "is_quantized", False):
        raise _unmergeable(
            "the base is quantized, and a merged weight does not fit into its format",
            "name the plain base, or use `relora_mode: prune`.",
        )
    planned = {adapter.name for adapter in plan.modules}
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        # An expert weight is planned by its own name, a linear layer's by the layer's.
        module = name if name in planned else name.rpartition(".")[0]
        other = owners.setdefault(id(parameter), module)
        if other != module and {other, module} & planned:
            raise _unmergeable(
                f"`{other}` and `{module}` share one weight, so that merging into one would change both",
                "leave the module out of `target_modules`, or use `relora_mode: prune`.",
            )


def _unmergeable(message: str, help: str) -> ModelError:
    return ModelError("merge-not-possible", message, where="training.relora_mode", help=help)


def _prune(adapters: Adapters, ratio: float) -> RestartResult:
    entries = pruned = 0
    parameters = adapters.parameters()
    for adapter in adapters.plan.modules:
        start = adapters.starts.get(adapter.name)
        for factor, first in (("lora_A", start.a if start else None), ("lora_B", start.b if start else None)):
            parameter = parameters[f"{adapter.name}.{factor}"]
            values, count = prune(parameter.detach().cpu().numpy(), ratio, first)
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(values))
            entries, pruned = entries + parameter.numel(), pruned + count
    return RestartResult(entries, pruned)


def _merge(adapters: Adapters, step: int) -> RestartResult:
    for adapter in adapters.plan.modules:
        adapters.fold(adapter.name, adapters.live_piece(adapter.name))
        zeros = np.zeros(adapter.b_shape, np.float32)
        adapters.begin(adapter.name, random_factor(adapter, adapters.plan.seed, step), zeros, None)
    factors = sum(adapter.parameters for adapter in adapters.plan.modules)
    return RestartResult(factors, 0)
