"""Experts as 3-D weights: which parameters they are, and LoRA on a stack of them.

The sum is made for the whole stack before each forward, as PEFT does it: that is right whatever the module does with
its weight. PEFT keeps A and B flat; here they are stacks (see core.adapter.peft_file).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper

from soup_xb.backends.torch.sharding import compute_device, whole
from soup_xb.core.adapter.pieces import Piece
from soup_xb.core.base.modules import AdapterModule, Module

_FORMATS = (torch.float32, torch.bfloat16, torch.float16)


def expert_weights(name: str, module: torch.nn.Module) -> Iterator[Module]:
    """The expert weights that a module named `name` holds itself, in its own order.

    By a rule that holds for every model type of transformers: a parameter (experts, …, …) of a class whose name ends in
    `Experts`. Convolutions, biases and tables of position have other classes or fewer dimensions. A single expert is
    no stack to PEFT.

    The last dimension is the input's, unless the class says that it `is_transposed`. Llama 4 stores the transposed
    matrices and does not say so: there PEFT, and so every adapter, takes the outputs for the inputs, which is as
    good a pair of sides for a low-rank sum.
    """
    if not type(module).__name__.endswith("Experts"):
        return
    for leaf, parameter in module.named_parameters(recurse=False):
        if parameter.ndim != 3 or len(parameter) < 2 or parameter.dtype not in _FORMATS:
            continue
        experts, first, second = parameter.shape
        sides = (second, first) if _is_transposed(module) else (first, second)
        yield Module(f"{name}.{leaf}", *sides, experts=experts)


def layer_name(name: str, layer: Any) -> str:
    """What core calls the thing that a layer of PEFT's adapts; wrappers of several weights are nested."""
    if not isinstance(layer, ParamWrapper):
        return name
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return f"{name}.{layer.parameter_name}"


def base_weight(layer: Any) -> torch.nn.Parameter:
    """The weight under a LoRA layer, a matrix or a stack."""
    weight: torch.nn.Parameter = (
        layer.get_param() if isinstance(layer, ParamWrapper) else layer.get_base_layer().weight
    )
    return weight


def expert_matrices(module: Any, leaf: str) -> Iterator[torch.Tensor]:
    """The weight (out_features, in_features) of each expert in turn."""
    for weight in whole(getattr(module, leaf).detach()):
        yield weight.T if _is_transposed(module) else weight


def is_stored_transposed(layer: Any) -> bool:
    """Whether a wrapped stack is (experts, in_features, out_features)."""
    return isinstance(layer, ParamWrapper) and _is_transposed(layer.get_base_layer())


def add_piece(
    weight: torch.Tensor, piece: Piece, delta: Callable[[Piece], torch.Tensor], rows: slice = slice(None)
) -> None:
    """Add a piece to a weight in place, in float32, rounded once to its own format; `delta` gives what it adds.

    `rows` are those of a larger weight that the given one is, of a stack its experts.

    Experts are taken one after the other: a float32 copy of their whole stack can be larger than all else.
    """
    if piece.a.ndim == 3:
        for matrix, a, b in zip(weight, piece.a[rows], piece.b[rows], strict=True):
            add_piece(matrix, Piece(a, b), delta)
        return
    weight.copy_((weight.float() + delta(piece)[rows]).to(weight.dtype))


class StackedFactor(torch.nn.Module):
    """A or B of a stack of experts, float32 in core's shape: `a_shape` or `b_shape`.

    `start` is where pissa or olora put it, `instead` replaces all of it for a while.
    """

    start: torch.Tensor | None
    instead: torch.Tensor | None

    def __init__(self, shape: tuple[int, ...], place: torch.device) -> None:
        """Make room; the values are set later."""
        super().__init__()
        self.trained = torch.nn.Parameter(torch.empty(shape, dtype=torch.float32, device=place))
        self.register_buffer("start", None, persistent=False)
        self.register_buffer("instead", None, persistent=False)


class ExpertLayer(ParamWrapper):
    """PEFT's wrapper of one expert weight, whose sum stands beside the parameter for the length of a forward.

    PEFT registers a parametrization in every forward, which makes a class and computes the sum more than once.
    """

    def take_over(self, adapter: AdapterModule, name: str) -> None:
        """Put stacked factors, not yet set, in the place of PEFT's flat ones."""
        place = compute_device(self.get_param())
        self.lora_A[name] = StackedFactor(adapter.a_shape, place)
        self.lora_B[name] = StackedFactor(adapter.b_shape, place)

    def forward(self, *inputs: Any, **settings: Any) -> Any:
        """What the module gives with the adapted weight, or with its own while the adapters are off."""
        if self.disable_adapters:
            return self.base_layer(*inputs, **settings)
        module, leaf = self.get_base_layer(), self.parameter_name
        # An attribute of the object is found before its parameters are looked at.
        module.__dict__[leaf] = self.adapted_weight()
        try:
            return self.base_layer(*inputs, **settings)
        finally:
            del module.__dict__[leaf]

    def adapted_weight(self) -> torch.Tensor:
        """The weight with scale * B A in it, in its own format and order; beside a start with the difference alone."""
        weight = self.get_param()
        (name,) = self.active_adapters
        a, b = self._factors(self.lora_A[name], self.lora_B[name])
        left, right = (a.mT, b.mT) if is_stored_transposed(self) else (b, a)
        summed: torch.Tensor = torch.baddbmm(
            weight, left.to(weight.dtype), right.to(weight.dtype), alpha=self.scaling[name]
        )
        return summed

    @staticmethod
    def _factors(down: StackedFactor, up: StackedFactor) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = down.trained, up.trained
        if down.instead is not None and up.instead is not None:
            return down.instead, up.instead
        if down.start is None or up.start is None:
            return a, b
        return torch.cat([a, a - down.start], dim=-2), torch.cat([b - up.start, up.start], dim=-1)


def _is_transposed(module: Any) -> bool:
    return bool(getattr(module, "is_transposed", False))
