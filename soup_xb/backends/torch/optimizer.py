"""The optimizer on the adapter's tensors, with every setting said aloud and its state in safetensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from soup_xb.core.base.towers import is_unseen
from soup_xb.core.errors import CheckpointError
from soup_xb.core.run.checkpoint import grouped, read_tensors
from soup_xb.core.run.session import OptimizerSettings

STATE_FILE = "optimizer.safetensors"


class Optimizer:
    """AdamW (arXiv:1711.05101) or plain SGD over named parameters."""

    def __init__(
        self, parameters: Mapping[str, torch.nn.Parameter], settings: OptimizerSettings, media: str = ""
    ) -> None:
        """Make the optimizer; the learning rate comes with each step. `media` is the kind that rows hold."""
        self.parameters = dict(parameters)
        self.settings = settings
        self.optimizer = _make(_groups(self.parameters, settings.weight_decay, media), settings)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def gradients(self) -> list[torch.Tensor]:
        """One gradient for each parameter, zeros where none was computed."""
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]

    def step(self, learning_rate: float) -> tuple[float, bool]:
        """Clip and update. Returns the gradient norm before clipping, and whether it was finite.

        With a norm that is not finite nothing is updated.
        """
        gradients = self.gradients()
        norm = torch.nn.utils.get_total_norm(gradients)
        if not math.isfinite(norm.item()):
            return norm.item(), False
        limit = self.settings.max_grad_norm
        if limit > 0:
            torch.nn.utils.clip_grads_with_norm_(list(self.parameters.values()), limit, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        return norm.item(), True

    def reset(self, names: Iterable[str]) -> None:
        """Start the state of these parameters afresh, step counter included, as if they had never been stepped."""
        for name in names:
            for value in self.optimizer.state[self.parameters[name]].values():
                value.zero_()

    def save(self, folder: Path) -> None:
        """Write every state tensor, named `parameter/state`."""
        tensors = {
            f"{name}/{key}": value.detach().cpu().contiguous()
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state[parameter].items()
            if isinstance(value, torch.Tensor)
        }
        save_file(tensors, folder / STATE_FILE)

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote. Raises CheckpointError when it does not fit the parameters."""
        file = folder / STATE_FILE
        states = grouped(read_tensors(file), "/")
        expected = set() if self.settings.name == "sgd" else set(self.parameters)
        if set(states) != expected:
            odd = sorted(expected.symmetric_difference(states))
            raise CheckpointError(
                "foreign-checkpoint",
                f"optimizer state does not fit the adapter, first `{odd[0]}`",
                where=str(file),
            )
        for name, state in states.items():
            parameter = self.parameters[name]
            shapes = {key: value.shape for key, value in state.items()}
            side = tuple(parameter.shape)
            if shapes != {"step": (), "exp_avg": side, "exp_avg_sq": side}:
                raise CheckpointError(
                    "foreign-checkpoint",
                    f"optimizer state does not fit the adapter, first `{name}`",
                    where=str(file),
                )
            self.optimizer.state[parameter] = {
                key: torch.tensor(value, device=None if key == "step" else parameter.device)
                for key, value in state.items()
            }


def _groups(
    parameters: Mapping[str, torch.nn.Parameter], weight_decay: float, media: str
) -> list[dict[str, Any]]:
    """The parameters with their decay: none in towers that no row runs through, where no gradient holds against it."""
    text = [parameter for name, parameter in parameters.items() if not is_unseen(name, media)]
    towers = [parameter for name, parameter in parameters.items() if is_unseen(name, media)]
    groups = [{"params": text, "weight_decay": weight_decay}, {"params": towers, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _make(groups: list[dict[str, Any]], settings: OptimizerSettings) -> torch.optim.Optimizer:
    if settings.name == "sgd":
        return torch.optim.SGD(
            groups,
            lr=0.0,
            momentum=0.0,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            fused=True,
        )
    return torch.optim.AdamW(
        groups,
        lr=0.0,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        amsgrad=False,
        maximize=False,
        fused=True,
    )
