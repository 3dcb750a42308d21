"""The optimizer on the adapter's tensors: torch's formulas and order of operations, its state in safetensors.

mlx.optimizers.AdamW computes its bias corrections in float32, where 1 - 0.999 is off by 1e-5 of itself; here
they are Python numbers, so that both engines take the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from safetensors.numpy import save_file

from soup_xb.backends.mlx.adapters import factor_from_numpy, factor_to_numpy
from soup_xb.core.errors import CheckpointError
from soup_xb.core.run.checkpoint import read_tensors
from soup_xb.core.run.session import OptimizerSettings

STATE_FILE = "optimizer.safetensors"
_STATES = ("exp_avg", "exp_avg_sq")
Arrays = dict[str, mx.array]


class Optimizer:
    """AdamW (arXiv:1711.05101) or plain SGD over named arrays."""

    def __init__(self, values: Mapping[str, mx.array], settings: OptimizerSettings) -> None:
        """Start with empty moments; the learning rate comes with each step."""
        self.settings = settings
        self.steps = 0
        moments = () if settings.name == "sgd" else _STATES
        self.moments: dict[str, Arrays] = {
            state: {name: mx.zeros(value.shape, mx.float32) for name, value in values.items()}
            for state in moments
        }
        self._shapes = {name: value.shape for name, value in values.items()}
        self._update = mx.compile(self._sgd if settings.name == "sgd" else self._adamw)

    def step(self, values: Arrays, gradients: Arrays, learning_rate: float) -> tuple[float, Arrays | None]:
        """Clip and update. Returns the gradient norm before clipping, and the new values.

        With a norm that is not finite nothing is updated, and the values are None.
        """
        norm = _global_norm(gradients)
        if not math.isfinite(norm):
            return norm, None
        updated, moments = self._update(
            values, gradients, self.moments, mx.array(self._scalars(norm, learning_rate), mx.float32)
        )
        mx.eval(updated, moments)
        self.moments, self.steps = moments, self.steps + 1
        return norm, updated

    def save(self, folder: Path) -> None:
        """Write every state tensor, named `parameter/state`, in the shapes of PEFT's factors."""
        tensors = {
            f"{name}/{state}": factor_to_numpy(array)
            for state, arrays in self.moments.items()
            for name, array in arrays.items()
        }
        for name in self._shapes if self.moments else ():
            tensors[f"{name}/step"] = np.array(self.steps, dtype=np.float32)
        save_file(tensors, folder / STATE_FILE)

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote. Raises CheckpointError when it does not fit the parameters."""
        file = folder / STATE_FILE
        tensors = read_tensors(file)
        states = (*self.moments, "step") if self.moments else ()
        expected = {f"{name}/{state}" for name in self._shapes for state in states}
        if set(tensors) != expected:
            raise _foreign(file, sorted(expected.symmetric_difference(tensors))[0])
        moments = {
            state: {name: factor_from_numpy(tensors[f"{name}/{state}"]) for name in self._shapes}
            for state in self.moments
        }
        for state, arrays in moments.items():
            odd = next((name for name, array in arrays.items() if array.shape != self._shapes[name]), None)
            if odd is not None:
                raise _foreign(file, f"{odd}/{state}")
        counts = {int(tensors[f"{name}/step"]) for name in self._shapes} if self.moments else {0}
        if len(counts) != 1:
            raise _foreign(file, f"{next(iter(self._shapes))}/step")
        self.moments, self.steps = moments, counts.pop()

    def _scalars(self, norm: float, learning_rate: float) -> list[float]:
        """Clip factor, weight decay factor, step size, and the second moment's correction."""
        limit = self.settings.max_grad_norm
        clip = min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0
        decay = 1.0 - learning_rate * self.settings.weight_decay
        if self.settings.name == "sgd":
            return [clip, self.settings.weight_decay, learning_rate]
        count = self.steps + 1
        step_size = learning_rate / (1.0 - self.settings.beta1**count)
        return [clip, decay, step_size, math.sqrt(1.0 - self.settings.beta2**count)]

    def _adamw(self, values: Arrays, gradients: Arrays, moments: Any, scalars: mx.array) -> Any:
        clip, decay, step_size, correction = (scalars[index] for index in range(4))
        beta1, beta2, epsilon = self.settings.beta1, self.settings.beta2, self.settings.epsilon
        new: dict[str, Arrays] = {state: {} for state in _STATES}
        updated = {}
        for name, value in values.items():
            gradient = gradients[name] * clip
            first = moments["exp_avg"][name]
            first = first + (gradient - first) * (1.0 - beta1)
            second = moments["exp_avg_sq"][name] * beta2 + (1.0 - beta2) * gradient * gradient
            updated[name] = value * decay - step_size * first / (mx.sqrt(second) / correction + epsilon)
            new["exp_avg"][name], new["exp_avg_sq"][name] = first, second
        return updated, new

    def _sgd(self, values: Arrays, gradients: Arrays, moments: Any, scalars: mx.array) -> Any:
        clip, decay, learning_rate = (scalars[index] for index in range(3))
        updated = {
            name: value - learning_rate * (gradients[name] * clip + decay * value)
            for name, value in values.items()
        }
        return updated, moments


def _global_norm(gradients: Arrays) -> float:
    squares = np.array(mx.stack([mx.sum(mx.square(gradient)) for gradient in gradients.values()]))
    return math.sqrt(float(squares.astype(np.float64).sum()))


def _foreign(file: Path, first: str) -> CheckpointError:
    return CheckpointError(
        "foreign-checkpoint",
        f"optimizer state does not fit the adapter, first `{first}`",
        where=str(file),
    )
