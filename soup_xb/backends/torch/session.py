"""The torch backend's Session: transformers models, PEFT layers, torch's optimizers and processes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
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
from soup_xb.backends.torch.base_kind import pooling_for, text_alone
from soup_xb.backends.torch.device import Device, choose_device, memory_guard, peak_memory_bytes
from soup_xb.backends.torch.embedding_task import embed
from soup_xb.backends.torch.generation import continue_prompt, sample
from soup_xb.backends.torch.injection import Factors
from soup_xb.backends.torch.load import (
    describe_model,
    load_base,
    load_sharded,
    outline_base,
    sharding_notices,
)
from soup_xb.backends.torch.merge import write_merged
from soup_xb.backends.torch.optimizer import Optimizer
from soup_xb.backends.torch.patches.expert_dropout import expert_dropout
from soup_xb.backends.torch.patches.gemma4_clippable import clippable_linears
from soup_xb.backends.torch.preference_task import log_probabilities
from soup_xb.backends.torch.probe import base_outputs, live_addition
from soup_xb.backends.torch.processes import Processes, join_processes
from soup_xb.backends.torch.reward_task import RewardTask, check_scorable
from soup_xb.backends.torch.router_balance import RouterBalance, check_router
from soup_xb.backends.torch.sharding import is_sharded
from soup_xb.backends.torch.starts import weight_starts
from soup_xb.backends.torch.task_loss import TaskLoss
from soup_xb.backends.torch.task_state import (
    load_parameters,
    load_task_state,
    save_parameters,
    save_task_state,
)
from soup_xb.backends.torch.tasks import Surroundings, task_loss
from soup_xb.backends.torch.vera import VeraAdapters
from soup_xb.core.adapter.peft_file import HEAD, check_factors
from soup_xb.core.adapter.plan import AdapterPlan
from soup_xb.core.adapter.probe import LayerDelta
from soup_xb.core.base.modules import AdapterModule
from soup_xb.core.errors import Problem
from soup_xb.core.objectives.settings import Embedding
from soup_xb.core.random_numbers import step_seed
from soup_xb.core.rows.batches import MicroBatch
from soup_xb.core.run.session import (
    BaseDescription,
    GenerationSettings,
    LossSum,
    RestartResult,
    RestartSettings,
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
    # How texts become vectors; empty where the base was not opened for embeddings.
    pooling = ""

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
        self._optimizer: Optimizer | None = None
        objective = settings.objective
        if isinstance(objective, Embedding):
            pooling, reason = pooling_for(objective.pooling, settings.base, model)
            self._patch_notices.append(Problem("pooling", f"{pooling}: {reason}"))
            self.pooling, objective = pooling, evolve(objective, pooling=pooling)
        surroundings = Surroundings(
            processes,
            device.torch_device,
            lambda: self._with_adapter(False),
            self._description.hidden_size,
            settings.seed,
        )
        self._loss: TaskLoss = task_loss(objective, surroundings)
        # What a reward model's head is asked of, whatever stands before it.
        self._judge = self._loss if isinstance(self._loss, RewardTask) else None
        if settings.router_aux_loss_coef is not None:
            check_router(model)
            self._loss = RouterBalance(
                self._loss, settings.router_aux_loss_coef, processes, device.torch_device
            )
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
            if self._judge is not None:
                check_scorable(self.model, plan)
            trained = {**self._adapters.parameters(), **self._loss.parameters()}
            self._optimizer = Optimizer(trained, self.settings.optimizer, self.settings.media)

    def train_step(self, micro_batches: Sequence[MicroBatch], step: StepSettings) -> StepResult:
        """One update; dropout masks are a function of seed, step and process."""
        optimizer = self._trained(self._optimizer)
        adapters = self._trained(self._adapters)
        divisor = self._loss.divisor(step)
        with memory_guard("training"):
            self._loss.begin(self.model, micro_batches)
        torch.manual_seed(step_seed(self.settings.seed, "dropout", step.step, self.process))
        total = torch.zeros((), dtype=torch.float64, device=self._device.torch_device)
        optimizer.zero_grad()
        adapters.train(True)
        try:
            with memory_guard("training"):
                for batch in micro_batches:
                    loss = self._loss.summed(self.model, batch)
                    # Adapters in towers alone have no part in rows without files.
                    if loss.requires_grad:
                        (loss / divisor).backward()
                    total += loss.detach()
        finally:
            adapters.train(False)
        self._processes.sum_([total])
        self._processes.sum_(optimizer.gradients())
        mean = total.item() / divisor
        _, means = self._loss.finish(training=True)
        if not math.isfinite(mean):
            return StepResult(mean, math.nan, applied=False)
        norm, applied = optimizer.step(step.learning_rate)
        optimizer.zero_grad()
        return StepResult(mean, norm, applied, means)

    def evaluate(self, micro_batches: Sequence[MicroBatch], adapter: bool = True) -> LossSum:
        """Loss without dropout; every process evaluates its share."""
        totals = torch.zeros(2, dtype=torch.float64, device=self._device.torch_device)
        with torch.no_grad(), self._with_adapter(adapter), memory_guard("evaluating"):
            self._loss.begin(self.model, micro_batches)
            for batch in micro_batches:
                totals[0] += self._loss.summed(self.model, batch)
                totals[1] += batch.target_tokens
        self._processes.sum_([totals])
        examples, means = self._loss.finish(training=False)
        return LossSum(float(totals[0].item()), int(totals[1].item()), examples, means)

    def log_probabilities(self, shares: Sequence[tuple[Array, MicroBatch]], count: int) -> Array:
        """Log-probability of each row's targets under the true base."""
        found = torch.zeros(count, dtype=torch.float64, device=self._device.torch_device)
        with torch.no_grad(), self._with_adapter(False), memory_guard("asking the base about the answers"):
            for places, batch in shares:
                values = log_probabilities(self.model, batch, self._device.torch_device)
                found[torch.from_numpy(places).to(found.device)] = values.double()
        self._processes.sum_([found])
        result: Array = found.cpu().numpy()
        return result

    def embeddings(self, batch: MicroBatch, adapter: bool = True) -> Array:
        """A unit vector for each row."""
        with torch.no_grad(), self._with_adapter(adapter), memory_guard("embedding texts"):
            vectors = embed(self.model, batch, self.pooling, self._device.torch_device)
            result: Array = torch.nn.functional.normalize(vectors, dim=-1).cpu().numpy()
        return result

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
        save_task_state(self._loss.state(), folder)
        save_parameters(self._loss.parameters(), folder)

    def load_state(self, folder: Path, optimizer: bool = True) -> None:
        """Read back what `save_state` wrote."""
        load_adapters(self._trained(self._adapters), folder)
        self._measure_merges()
        load_parameters(self._loss.parameters(), folder)
        if optimizer:
            self._trained(self._optimizer).load(folder)
            self._loss.load(load_task_state(self._loss.state(), folder))

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

    def head(self) -> Array:
        """The reward model's head, a copy."""
        result: Array = self._reward_task().head.detach().cpu().numpy().copy()
        return result

    def load_head(self, head: Array) -> None:
        """Set the reward model's head."""
        task = self._reward_task()
        check_factors({HEAD: tuple(task.head.shape)}, {HEAD: head})
        with torch.no_grad():
            task.head.copy_(torch.from_numpy(head))

    def scores(self, batch: MicroBatch) -> Array:
        """What the reward model thinks of each row of this process's batch."""
        with torch.no_grad(), memory_guard("scoring answers"):
            scores = self._reward_task().scores(self.model, batch)
        result: Array = scores[: len(batch.lengths)].cpu().numpy()
        return result

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

    def sample(self, prompts: Sequence[Array], chances: Array, settings: GenerationSettings) -> list[Array]:
        """Continue each prompt, with the tokens that `chances` choose."""
        with memory_guard("sampling answers"):
            return sample(self.model, prompts, chances, settings)

    def save_merged(self, folder: Path) -> None:
        """Write the base with the adapter folded in."""
        write_merged(self.model, self._trained(self._adapters), folder)

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

    def _measure_merges(self) -> None:
        # Every process is here, and at the end of a run the first one alone asks for them.
        if self._true_outputs and is_sharded(self.model):
            self._merged_outputs = base_outputs(self._trained(self._adapters))

    def _with_adapter(self, adapter: bool) -> Any:
        if adapter or self._adapters is None:
            return nullcontext()
        return self._adapters.switched_off()

    def _checkpoint_activations(self) -> None:
        # The second name is that of transformers before 5.20.
        enable = getattr(self.model, "activation_checkpointing_enable", None)
        (enable or self.model.gradient_checkpointing_enable)({"use_reentrant": False})
        # transformers checkpoints only layers in training mode; the flag is set on these alone, so that the
        # base's own dropout inside them stays off.
        for module in self.model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True

    def _reward_task(self) -> RewardTask:
        if self._judge is None:
            raise RuntimeError("open the session for the task that trains a reward model")
        return self._judge

    @staticmethod
    def _trained(part: Any) -> Any:
        if part is None:
            raise RuntimeError("attach adapters before training, saving or loading them")
        return part
