"""VeRA layers on a transformers model: PEFT's layers, core's projections and starts (see core.adapter.vera)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft import VeraConfig, VeraModel
from peft.tuners.vera.layer import VeraLayer
from transformers.pytorch_utils import Conv1D

from soup_xb.backends.torch.injection import ADAPTER, Factors, bypassed, check_reach
from soup_xb.backends.torch.sharding import compute_device
from soup_xb.core.adapter.peft_file import check_factors
from soup_xb.core.adapter.pieces import Piece
from soup_xb.core.adapter.plan import AdapterPlan
from soup_xb.core.adapter.vera import LAMBDA_START, SHARED, first_factors, lora_pair

_LAMBDAS = ("vera_lambda_d", "vera_lambda_b")
_PROJECTIONS = ("vera_A", "vera_B")

Array = np.ndarray[Any, Any]


class VeraAdapters:
    """The VeRA adapters of one model, by module name; the two projections are one pair for all of them."""

    def __init__(self, model: Any, plan: AdapterPlan) -> None:
        """Wrap the planned modules. Only their vectors require a gradient; everything is float32."""
        self.plan = plan
        _inject(model, plan)
        self.layers: dict[str, Any] = {
            name: module for name, module in model.named_modules() if isinstance(module, VeraLayer)
        }
        check_reach(model, plan, self.layers)
        first = first_factors(plan.modules, plan.seed)
        for adapter in plan.modules:
            self._start(adapter.name, first[adapter.name])
        self._project(first[SHARED])

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The trained vectors as `module.factor` -> parameter, in the plan's order."""
        return {
            f"{adapter.name}.{factor}": getattr(self.layers[adapter.name], factor)[ADAPTER]
            for adapter in self.plan.modules
            for factor in _LAMBDAS
        }

    def factors(self) -> dict[str, dict[str, Array]]:
        """The vectors of each module, d (rank,) and b (out_features,), and the projections under `SHARED`."""
        vectors = {adapter.name: self._vectors(adapter.name) for adapter in self.plan.modules}
        return {**vectors, SHARED: self._projections()}

    def live_piece(self, name: str) -> Piece:
        """What the adapter adds to a module, as a plain LoRA of scale 1."""
        return Piece(*lora_pair(self._vectors(name), self._projections(), self.layers[name].in_features))

    def delta(self, name: str, piece: Piece) -> torch.Tensor:
        """What a piece adds to a module's weight, float32, in its shape."""
        place = self.layers[name].vera_lambda_d[ADAPTER].device
        product = torch.from_numpy(piece.b).to(place) @ torch.from_numpy(piece.a).to(place)
        return product.T if isinstance(self.layers[name].get_base_layer(), Conv1D) else product

    def load(self, factors: Factors) -> None:
        """Set vectors and projections. Raises ModelError when names or shapes do not fit."""
        mine = {
            f"{name}.{factor}": array.shape
            for name, arrays in self.factors().items()
            for factor, array in arrays.items()
        }
        given = {
            f"{name}.{factor}": array for name, arrays in factors.items() for factor, array in arrays.items()
        }
        check_factors(mine, given)
        with torch.no_grad():
            for name, parameter in self.parameters().items():
                parameter.copy_(torch.from_numpy(np.ascontiguousarray(given[name])))
        self._project(factors[SHARED])

    def train(self, training: bool) -> None:
        """Switch the adapters' dropout on or off; the base stays in evaluation mode."""
        for layer in self.layers.values():
            layer.vera_dropout.train(training)

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """Inside, the model is the base, exact to the bit."""
        with bypassed(self.layers, self.parameters()):
            yield

    def _start(self, name: str, arrays: Mapping[str, Array]) -> None:
        layer = self.layers[name]
        place = compute_device(layer.get_base_layer().weight)
        for factor in _LAMBDAS:
            vector = torch.from_numpy(arrays[factor]).to(place)
            getattr(layer, factor)[ADAPTER] = torch.nn.Parameter(vector, requires_grad=True)

    def _vectors(self, name: str) -> dict[str, Array]:
        layer = self.layers[name]
        return {factor: getattr(layer, factor)[ADAPTER].detach().cpu().numpy().copy() for factor in _LAMBDAS}

    def _projections(self) -> dict[str, Array]:
        layer = next(iter(self.layers.values()))
        return {name: getattr(layer, name)[ADAPTER].cpu().numpy().copy() for name in _PROJECTIONS}

    def _project(self, arrays: Mapping[str, Array]) -> None:
        """Put the projections into the one dictionary that all layers share."""
        layer = next(iter(self.layers.values()))
        place = compute_device(layer.get_base_layer().weight)
        for name in _PROJECTIONS:
            getattr(layer, name)[ADAPTER] = torch.from_numpy(np.ascontiguousarray(arrays[name])).to(place)


def _inject(model: Any, plan: AdapterPlan) -> None:
    config = VeraConfig(
        r=plan.modules[0].rank,
        target_modules=[adapter.name for adapter in plan.modules],
        vera_dropout=plan.dropout,
        d_initial=LAMBDA_START,
        save_projection=True,
        bias="none",
        fan_in_fan_out=any(isinstance(model.get_submodule(adapter.name), Conv1D) for adapter in plan.modules),
        init_weights=True,
    )
    with warnings.catch_warnings():
        # PEFT switches fan_in_fan_out by itself where a model mixes both kinds of layer, and warns of it, and of a head
        # that shares its weight, which a merge here parts from the embedding.
        for message in ("fan_in_fan_out", "Model has `tie_word_embeddings=True`"):
            warnings.filterwarnings("ignore", message=message)
        VeraModel(model, config, ADAPTER)
