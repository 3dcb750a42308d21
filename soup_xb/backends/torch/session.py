"""The torch backend's Session: transformers models, PEFT layers, torch's optimizers and processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from attrs import evolve
from transformers.modeling_layers import GradientCheckpointingLayer

from soup_xb.backends.torch.adapters import (
    Adapters,
    check_mergeable,
    factor_names,
    load_adapters,
    restart_adapters,
    save_adapters,
)
from soup_xb.backends.torch.base_kind import text_alone
from soup_xb.backends.torch.device import Device, choose_device, memory_guard, peak_memory_bytes
from soup_xb.backends.torch.generation import continue_prompt
from soup_xb.backends.torch.injection import Factors
from soup_xb.backends.torch.load import (
    describe_model,
    load_base,
    load_sharded,
    outline_base,
    sharding_notices,
)
from soup_xb.backends.torch.merge import base_outputs, live_addition, write_merged
from soup_xb.backends.torch.optimizer import Optimizer
from soup_xb.backends.torch.outputs import (
    OpenBase,
    Outputs,
    TorchScorer,
    check_scorable,
)
from soup_xb.backends.torch.patches.expert_dropout import expert_dropout
from soup_xb.backends.torch.patches.gemma4_clippable import clippable_linears
from soup_xb.backends.torch.processes import Processes, join_processes
from soup_xb.backends.torch.router_balance import RouterBalance, check_router
from soup_xb.backends.torch.sharding import is_sharded
from soup_xb.backends.torch.starts import weight_starts
from soup_xb.backends.torch.step import Step
from soup_xb.backends.torch.vera import VeraAdapters
from soup_xb.core.adapter.plan import AdapterPlan
from soup_xb.core.adapter.probe import LayerDelta
from soup_xb.core.base.folder import inspect_base
from soup_xb.core.base.model_config import write_config
from soup_xb.core.base.modules import AdapterModule
from soup_xb.core.errors import Problem
from soup_xb.core.objectives.objective import StepState
from soup_xb.core.random_numbers import step_seed
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


def open_session(settings: SessionSettings) -> TorchSession:
    """Join the processes, choose a device, and open the base on it."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    processes = join_processes(settings.process_timeout)
    device = choose_device(settings.precision, processes)
    if not settings.weights:
        return TorchSession(outline_base(settings), settings, device, processes)
    sharded = settings.sharding == "fsdp" and processes.many
    model = load_sharded(settings, device, processes) if sharded else load_base(settings, device)
    return TorchSession(model, settings, device, processes)


class TorchSession:
    """See soup_xb.core.run.session.Session."""

    backend = "torch"

    def __init__(self, model: Any, settings: SessionSettings, device: Device, processes: Processes) -> None:
        """Take over an opened, frozen base."""
        self.model = model
        self.settings = settings
        self.precision = device.precision
        self.device = device.torch_device.type
        self.process, self.processes = processes.process, processes.processes
        self._device, self._processes = device, processes
        # Everything that was changed for this session's sake, and is given back on close.
        self._patches = ExitStack()
        clippable = self._patches.enter_context(clippable_linears(model, str(settings.base)))
        self._patch_notices: list[Problem] = [*text_alone(model, settings.base), *clippable.notices]
        self._description = describe_model(model, clippable.wrappers)
        self._adapters: Adapters | VeraAdapters | None = None
        self._is_base = False
        self._optimizer: Optimizer | None = None
        base = OpenBase(lambda: self.model, processes, device.torch_device, self._with_adapter)
        self._outputs = outputs = Outputs.of(base, settings, self._description.hidden_size)
        self.scorer, self.sampler = outputs.scorer, outputs.sampler
        self.embedder, self.judge = outputs.embedder, outputs.judge
        self._patch_notices += outputs.notices
        router = None
        if settings.router_aux_loss_coef is not None:
            check_router(model)
            router = RouterBalance(settings.router_aux_loss_coef, processes, device.torch_device)
        state = StepState(settings.objective, TorchScorer(base))
        self._step = Step(state, outputs, router, settings.seed)
        # The layers' outputs before restarts fold adapters into their weights.
        self._true_outputs: Mapping[str, Array] = {}
        # The same after a restart, of a base of which this process holds a part.
        self._merged_outputs: Mapping[str, Array] = {}
        if settings.gradient_checkpointing and settings.weights:
            self._checkpoint_activations()

    def notices(self) -> tuple[Problem, ...]:
        """The device and the precision with their reason, what was opened, and what each patch did."""
        sharding = sharding_notices(self.settings, self._processes)
        return (Problem("device", self._device.reason), *sharding, *self._patch_notices)

    def describe(self) -> BaseDescription:
        """The base's structure."""
        return self._description

    def attach(self, plan: AdapterPlan) -> None:
        """Wrap the planned modules with PEFT's LoRA or VeRA layers and make an optimizer for their factors."""
        with memory_guard("attaching the adapters"):
            check_mergeable(self.model, plan)
            if plan.use_vera:
                self._adapters = VeraAdapters(self.model, plan)
            else:
                starts = weight_starts(self.model, plan, self._processes)
                with expert_dropout(plan, self._description.model_type) as notices:
                    self._adapters = Adapters(self.model, plan, starts)
                self._patch_notices += notices
                if plan.merges:
                    self._true_outputs = base_outputs(self._adapters)
            self._adapters.train(False)
            if self.judge is not None:
                check_scorable(self.model, plan)
            trained = {**self._adapters.parameters(), **self._outputs.parameters()}
            self._optimizer = Optimizer(trained, self.settings.optimizer, self.settings.media)

    def train_step(self, micro_batches: Sequence[MicroBatch], step: StepSettings) -> StepResult:
        """One update; dropout masks are a function of seed, step and process."""
        adapters, optimizer = self._trained(self._adapters), self._trained(self._optimizer)
        return self._step.train(micro_batches, step, adapters, optimizer)

    def evaluate(self, micro_batches: Sequence[MicroBatch], adapter: bool = True) -> LossSum:
        """Loss without dropout; every process evaluates its share."""
        with self._with_adapter(adapter):
            return self._step.evaluate(micro_batches)

    def restart(self, settings: RestartSettings) -> RestartResult:
        """Prune the factors, or merge them into the base and begin new ones."""
        adapters = self._trained(self._adapters)
        with memory_guard("restarting the adapters"):
            result = restart_adapters(adapters, settings)
            self._measure_merges()
        if settings.mode == "merge" or settings.reset_optimizer:
            self._trained(self._optimizer).reset(factor_names(adapters))
        return result

    def save_state(self, folder: Path) -> None:
        """Factors, what they started from, pieces of merges, and optimizer state."""
        save_adapters(self._trained(self._adapters), folder)
        self._trained(self._optimizer).save(folder)
        save_objective(self.settings.objective.state(), folder)
        if self.judge is not None:
            self.judge.save(folder)

    def load_state(self, folder: Path, optimizer: bool = True) -> None:
        """Read back what `save_state` wrote."""
        load_adapters(self._trained(self._adapters), folder)
        self._measure_merges()
        if self.judge is not None:
            self.judge.load(folder)
        if optimizer:
            objective = self.settings.objective
            self._trained(self._optimizer).load(folder)
            objective.load(load_objective(objective.state(), folder))

    def factors(self) -> Mapping[str, Mapping[str, Array]]:
        """The adapter as a plain LoRA on the untouched base, or VeRA's vectors and projections."""
        return self._trained(self._adapters).factors()

    def addition(self, adapter: AdapterModule, factors: Mapping[str, Array]) -> LayerDelta:
        """What the live layer adds to its true base."""
        adapters = self._trained(self._adapters)
        return live_addition(adapters, adapter, factors, self._true_outputs, self._merged_outputs)

    def load_factors(self, factors: Factors) -> None:
        """Set the adapter's factors."""
        self._trained(self._adapters).load(factors)

    def logits(self, tokens: Array, adapter: bool = True) -> Array:
        """Float32 logits (rows, length, vocabulary)."""
        ids = torch.from_numpy(np.asarray(tokens, dtype=np.int64)).to(self._device.torch_device)
        with torch.no_grad(), self._with_adapter(adapter), memory_guard("computing logits"):
            result: Array = self.model(input_ids=ids, use_cache=False).logits.float().cpu().numpy()
        return result

    def generate(self, prompt: Array, settings: GenerationSettings, adapter: bool = True) -> Array:
        """Continue a prompt with transformers' generate."""
        torch.manual_seed(step_seed(settings.seed, "generate"))
        with self._with_adapter(adapter), memory_guard("generating"):
            return continue_prompt(self.model, prompt, settings)

    def save_merged(self, folder: Path) -> None:
        """Write the base with the adapter folded in."""
        changes = write_merged(self.model, self._trained(self._adapters), folder)
        config, base = self.model.config, inspect_base(self.settings.base, weights=False)
        if self.settings.rope_scaling is not None:
            changes = evolve(changes, rope_parameters=config.get_text_config().rope_parameters)
        if config.model_type == base.model_type:
            changes = evolve(changes, instead=None)
        write_config(folder, base.path, changes)

    def peak_memory_bytes(self) -> int:
        """The most memory this process held."""
        return peak_memory_bytes(self._device.torch_device)

    def agree(self, value: int) -> int:
        """The largest value over all processes."""
        return self._processes.largest(value)

    def close(self) -> None:
        """Undo the patches, leave the other processes and drop the model."""
        self._patches.close()
        self._processes.leave()
        self._optimizer = self._adapters = self.model = None
        self.scorer = self.sampler = self.embedder = self.judge = None

    def _measure_merges(self) -> None:
        # Every process is here, and at the end of a run the first one alone asks for them.
        if self._true_outputs and is_sharded(self.model):
            self._merged_outputs = base_outputs(self._trained(self._adapters))

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

    def _checkpoint_activations(self) -> None:
        # The second name is that of transformers before 5.20.
        enable = getattr(self.model, "activation_checkpointing_enable", None)
        (enable or self.model.gradient_checkpointing_enable)({"use_reentrant": False})
        # transformers checkpoints only layers in training mode; the flag is set on these alone, so that the
        # base's own dropout inside them stays off.
        for module in self.model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True

    @staticmethod
    def _trained(part: Any) -> Any:
        if part is None:
            raise RuntimeError("attach adapters before training, saving or loading them")
        return part


# Whether it offers what the protocol asks for, for type checkers.
_: Callable[[SessionSettings], Session] = open_session
