"""LoRA layers on a transformers model: PEFT's layers, core's decisions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers.pytorch_utils import Conv1D

from soup_xb.backends.torch.experts import add_piece, base_weight, is_stored_transposed
from soup_xb.backends.torch.factor_layers import DownFactor, DropoutBeside, UpFactor
from soup_xb.backends.torch.injection import inject
from soup_xb.backends.torch.sharding import compute_device, own_part
from soup_xb.core.adapter.peft_file import check_factors
from soup_xb.core.adapter.pieces import Piece, difference, joined
from soup_xb.core.adapter.plan import AdapterPlan
from soup_xb.core.adapter.starts import Start, random_factor
from soup_xb.core.base.modules import AdapterModule
from soup_xb.core.errors import ModelError

ADAPTER = "default"
Factors = Mapping[str, Mapping[str, np.ndarray[Any, Any]]]


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


@contextmanager
def bypassed(layers: Mapping[str, Any], parameters: Mapping[str, torch.nn.Parameter]) -> Iterator[None]:
    """Inside, PEFT's layers pass their input to the base alone; `parameters`, which PEFT freezes then, train again."""
    for layer in layers.values():
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers.values():
            layer.enable_adapters(True)
        for parameter in parameters.values():
            parameter.requires_grad_(True)


def check_reach(model: Any, plan: AdapterPlan, layers: Mapping[str, Any]) -> None:
    """Raise ModelError where PEFT wrapped other modules than the planned ones."""
    planned = {adapter.name for adapter in plan.modules}
    if planned != set(layers):
        odd = sorted(planned.symmetric_difference(layers))
        raise ModelError(
            "adapters-astray",
            f"PEFT put adapters elsewhere than planned on `{model.config.model_type}`, first at `{odd[0]}`",
            where="training.lora.target_modules",
            help="name the modules with a pattern that leaves these out, and report this model.",
        )


def _pair(layer: Any) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    return layer.lora_A[ADAPTER].trained, layer.lora_B[ADAPTER].trained


def _factors(layer: Any) -> dict[str, torch.nn.Parameter]:
    factors = dict(zip(("lora_A", "lora_B"), _pair(layer), strict=True))
    if ADAPTER in layer.lora_magnitude_vector:
        factors["lora_magnitude_vector"] = layer.lora_magnitude_vector[ADAPTER].weight
    return factors
