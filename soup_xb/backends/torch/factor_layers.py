"""The two halves of a LoRA layer, for factors that start with base weight in them.

PiSSA and OLoRA freeze W - scale B0 A0 and train B A beside it. Here W itself stays, and the layer adds
scale (B A - B0 A0): the same function and the same gradients, and the base is untouched to the bit, in any
format, quantized ones too. Written as (B - B0) A + B0 (A - A0) it is exactly zero at the start.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional


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
