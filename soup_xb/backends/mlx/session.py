"""The MLX backend's Session: mlx-lm's models and LoRA layers, MLX's processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from soup_xb.backends.mlx.adapters import Adapters, Factors, load_adapters, save_adapters
from soup_xb.backends.mlx.device import Device, choose_device, memory_guard, peak_memory_bytes
from soup_xb.backends.mlx.generation import generate_tokens
from soup_xb.backends.mlx.load import CheckpointedBlocks, Opened, load_base, outline_base
from soup_xb.backends.mlx.merge import live_addition, write_merged
from soup_xb.backends.mlx.optimizer import Optimizer
from soup_xb.backends.mlx.outputs import MlxScorer, OpenBase, Outputs, check_scorable
from soup_xb.backends.mlx.processes import Processes, join_processes
from soup_xb.backends.mlx.starts import weight_starts
from soup_xb.backends.mlx.step import Step
from soup_xb.core.adapter.plan import AdapterPlan
from soup_xb.core.adapter.probe import LayerDelta
from soup_xb.core.base.model_config import write_config
from soup_xb.core.base.modules import AdapterModule
from soup_xb.core.config.support import feature_refusal
from soup_xb.core.errors import ConfigError, ModelError, Problem
from soup_xb.core.objectives.objective import StepState
from soup_xb.core.rows.batches import MicroBatch
from soup_xb.core.run.checkpoint import load_objective, save_objective
from soup_xb.core.run.session import (
    BaseDescription,
    GenerationSettings,
    LossSum,
    RestartResult,
    RestartSettings,
    Session,
    SessionSettings,
    StepResult,
    StepSettings,
)

Array = np.ndarray[Any, Any]


def open_session(settings: SessionSettings) -> MlxSession:
    """Join the processes, choose a precision, and open the base."""
    processes = join_processes()
    device = choose_device(settings.precision)
    opened = load_base(settings, device) if settings.weights else outline_base(settings)
    return MlxSession(opened, settings, device, processes)


class MlxSession:
    """See soup_xb.core.run.session.Session."""

    backend = "mlx"

    def __init__(
        self, opened: Opened, settings: SessionSettings, device: Device, processes: Processes
    ) -> None:
        """Take over an opened, frozen base."""
        self.model = opened.model
        self.settings = settings
        self.precision, self.device = device.precision, device.name
        self.process, self.processes = processes.process, processes.processes
        self._opened, self._device, self._processes = opened, device, processes
        self._adapters: Adapters | None = None
        self._is_base = False
        self._optimizer: Optimizer | None = None
        self._told: tuple[Problem, ...] = ()
        cached = opened.reading.proven.cached
        base = OpenBase(lambda: self.model, processes, self._with_adapter, self._check_length, cached)
        self._outputs = outputs = Outputs.of(base, settings, opened)
        self.scorer, self.sampler = outputs.scorer, outputs.sampler
        self.embedder, self.judge = outputs.embedder, outputs.judge
        self._state = StepState(settings.objective, MlxScorer(base))
        self._step = Step(self._state, outputs, None, settings.seed)
        self._checkpointed: CheckpointedBlocks | None = None
        if settings.gradient_checkpointing and settings.weights:
            self._checkpointed = CheckpointedBlocks(list(self.model.layers))

    def notices(self) -> tuple[Problem, ...]:
        """The device and the precision with their reason, how the base was read, and how texts become vectors."""
        told = (Problem("device", self._device.reason), *self._opened.notices, *self._outputs.notices)
        return (*told, *self._told)

    def describe(self) -> BaseDescription:
        """The base's structure."""
        return self._opened.description

    def attach(self, plan: AdapterPlan) -> None:
        """Wrap the planned modules with mlx-lm's LoRA layers and make an optimizer for their factors."""
        if self.judge is not None:
            check_scorable(self._opened, plan)
        with memory_guard("attaching the adapters"):
            places = self._opened.places
            starts = weight_starts(self.model, plan, places, self._processes)
            self._adapters = Adapters(self.model, plan, places, starts)
            self._told = self._adapters.without_dropout(self._opened.description.model_type)
            trained = {**self._adapters.values, **self._outputs.values()}
            self._optimizer = Optimizer(trained, self.settings.optimizer)
        self._step = Step(self._state, self._outputs, self._adapters, self.settings.seed)

    def train_step(self, micro_batches: Sequence[MicroBatch], step: StepSettings) -> StepResult:
        """One update; dropout masks are a function of seed, step and process."""
        return self._step.train(micro_batches, step, self._trained(self._optimizer))

    def evaluate(self, micro_batches: Sequence[MicroBatch], adapter: bool = True) -> LossSum:
        """Loss without dropout; every process evaluates its share."""
        with self._with_adapter(adapter):
            return self._step.evaluate(micro_batches)

    def restart(self, settings: RestartSettings) -> RestartResult:
        """ReLoRA is refused before a base is opened. Raises ConfigError."""
        refused = feature_refusal("training.relora_steps", self.backend)
        raise ConfigError.of([refused] if refused else [])

    def save_state(self, folder: Path) -> None:
        """Factors, what they started from, and optimizer state."""
        save_adapters(self._trained(self._adapters), folder)
        self._trained(self._optimizer).save(folder)
        save_objective(self.settings.objective.state(), folder)
        if self.judge is not None:
            self.judge.save(folder)

    def load_state(self, folder: Path, optimizer: bool = True) -> None:
        """Read back what `save_state` wrote."""
        adapters = self._trained(self._adapters)
        load_adapters(adapters, folder)
        # A compiled step keeps the starts that it was traced with.
        self._step = Step(self._state, self._outputs, adapters, self.settings.seed)
        if self.judge is not None:
            self.judge.load(folder)
        if optimizer:
            objective = self.settings.objective
            self._trained(self._optimizer).load(folder)
            objective.load(load_objective(objective.state(), folder))

    def factors(self) -> Mapping[str, Mapping[str, Array]]:
        """The adapter as a plain LoRA on the untouched base."""
        factors: Mapping[str, Mapping[str, Array]] = self._trained(self._adapters).factors()
        return factors

    def addition(self, adapter: AdapterModule, factors: Mapping[str, Array]) -> LayerDelta:
        """What the live layer adds to its base."""
        return live_addition(self._trained(self._adapters), adapter, factors)

    def load_factors(self, factors: Factors) -> None:
        """Set the adapter's factors."""
        self._trained(self._adapters).load(factors)

    def logits(self, tokens: Array, adapter: bool = True) -> Array:
        """Float32 logits (rows, length, vocabulary)."""
        self._check_length(np.asarray(tokens).shape[1])
        with self._with_adapter(adapter), memory_guard("computing logits"):
            ids = mx.array(np.asarray(tokens, dtype=np.int32))
            return np.array(self.model(ids).astype(mx.float32), copy=True)

    def generate(self, prompt: Array, settings: GenerationSettings, adapter: bool = True) -> Array:
        """Continue a prompt."""
        self._check_length(np.asarray(prompt).size + settings.max_new_tokens)
        with self._with_adapter(adapter), memory_guard("generating"):
            return generate_tokens(self.model, prompt, settings, self._opened.reading.proven.cached)

    def save_merged(self, folder: Path) -> None:
        """Write the base with the adapter folded in."""
        changes = write_merged(self._opened, self._trained(self._adapters), folder)
        write_config(folder, self.settings.base, changes)

    def peak_memory_bytes(self) -> int:
        """The most memory this process held."""
        return peak_memory_bytes(self._device)

    def agree(self, value: int) -> int:
        """The largest value over all processes."""
        return self._processes.largest(value)

    def close(self) -> None:
        """Give the blocks their class back and the memory to the system."""
        if self._checkpointed is not None:
            self._checkpointed.undo()
        self._optimizer = self._adapters = self._checkpointed = None
        self.model = self.scorer = self.sampler = self.embedder = self.judge = None
        mx.clear_cache()

    def _with_adapter(self, adapter: bool) -> Any:
        if adapter or self._adapters is None or self._is_base:
            return nullcontext()
        return self._switched_off(self._adapters)

    @contextmanager
    def _switched_off(self, adapters: Any) -> Iterator[None]:
        # An evaluation of the base asks it for its log-probabilities too: only the outer one gives the adapter back.
        self._is_base = True
        try:
            with adapters.switched_off():
                yield
        finally:
            self._is_base = False

    def _check_length(self, length: int) -> None:
        longest, because = self._opened.reading.longest
        if longest and length > longest:
            raise ModelError(
                "longer-than-mlx-reads",
                f"a row of {length} tokens; on MLX this base is exact up to {longest}: {because}",
                where="data.max_length",
                help=f"set `data.max_length: {longest}` or lower, or run with --backend torch.",
            )

    @staticmethod
    def _trained(part: Any) -> Any:
        if part is None:
            raise RuntimeError("attach adapters before training, saving or loading them")
        return part


# Whether it offers what the protocol asks for, for type checkers.
_: Callable[[SessionSettings], Session] = open_session
