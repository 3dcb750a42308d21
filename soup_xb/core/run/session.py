"""What a backend offers to the loop: a protocol, and the plain values that cross it.

A protocol and not a base class, so that no inherited default can look like support.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from attrs import field, frozen

from soup_xb.core.adapter.plan import AdapterPlan
from soup_xb.core.adapter.probe import LayerDelta
from soup_xb.core.base.modules import AdapterModule, Module
from soup_xb.core.base.rope import RopeScaling
from soup_xb.core.errors import Problem
from soup_xb.core.objectives.objective import Objective, Scorer, TokenObjective
from soup_xb.core.rows.batches import MicroBatch

Array = np.ndarray[Any, Any]


@frozen
class OptimizerSettings:
    """Every setting of the optimizer, so that no library default takes part."""

    name: str
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    max_grad_norm: float


@frozen
class SessionSettings:
    """How to open a base. `base` is a local folder; `weights=False` gives its structure alone.

    `objective` is what is optimized; it keeps state, so that each session has its own. `pooling` says which tokens a
    text's vector is made of, for a base that is opened for embeddings; empty for all others.
    `router_aux_loss_coef` weighs the load-balancing loss of a router beside it, None for none. `sharding` is how
    several processes hold the base (see the config), `process_timeout` the seconds that one waits for the others.
    `rope_scaling` stretches the base's positions.
    `media` is the kind of files that rows have, image or audio: the base is then opened whole, with the towers that
    take them.
    """

    base: Path
    precision: str
    quantization: str
    gradient_checkpointing: bool
    optimizer: OptimizerSettings
    seed: int
    weights: bool = True
    objective: Objective = field(factory=TokenObjective)
    pooling: str = ""
    router_aux_loss_coef: float | None = None
    sharding: str = "none"
    cpu_offload: bool = False
    process_timeout: int = 1800
    rope_scaling: RopeScaling | None = None
    media: str = ""


@frozen
class BaseDescription:
    """The base's structure: `modules` that can carry an adapter, in the model's order, and its sizes.

    `other_weights` names the matrices that no adapter can sit on (many routers), `layer_settings` are the keys of
    its config that say how layers differ.
    """

    model_type: str
    modules: tuple[Module, ...]
    parameters: int
    layers: int
    hidden_size: int
    intermediate_size: int
    vocabulary_size: int
    other_weights: tuple[str, ...] = ()
    layer_settings: Mapping[str, Any] = field(factory=dict)


@frozen
class RestartSettings:
    """One ReLoRA restart at the end of `step`.

    `mode` is prune or merge; `ratio` and `reset_optimizer` are for a prune, a merge always resets.
    """

    step: int
    mode: str
    ratio: float
    reset_optimizer: bool


@frozen
class RestartResult:
    """What a restart did: `pruned` of the factors' `entries` went, none in a merge."""

    entries: int
    pruned: int


@frozen
class StepSettings:
    """What one optimizer update needs to know.

    `target_tokens` counts the targets of the whole step, over all micro-batches and processes, and `target_weight` is
    the sum of their weights, None where each weighs 1: the loss is the sum over targets divided by it, for an objective
    over tokens. `examples` counts its rows, which the losses of other objectives are divided by.
    """

    step: int
    learning_rate: float
    target_tokens: int
    examples: int = 0
    target_weight: float | None = None

    @property
    def weight(self) -> float:
        """What the sum over the targets is divided by."""
        return self.target_tokens if self.target_weight is None else self.target_weight


@frozen
class StepResult:
    """Mean loss over the step's targets and the gradient's norm before clipping, the same on every process.

    `applied` is False when either is not finite; nothing was updated then. `means` are further means of the step.
    `sampled_tokens` counts the answers' tokens where the step sampled some: targets that no plan knows.
    """

    loss: float
    grad_norm: float
    applied: bool
    means: Mapping[str, float] = field(factory=dict)
    sampled_tokens: int = 0


@frozen
class LossSum:
    """A sum of losses over `target_tokens` targets, over all processes.

    With `examples` it is a sum over so many pairs or judged answers, and `means` are further means over them.
    `target_weight` is the sum of the targets' weights, None where each weighs 1.
    """

    total: float
    target_tokens: int
    examples: int = 0
    means: Mapping[str, float] = field(factory=dict)
    target_weight: float | None = None

    @property
    def mean(self) -> float:
        """Mean loss over the targets, or over the examples of a preference task."""
        targets = self.target_tokens if self.target_weight is None else self.target_weight
        return self.total / (self.examples or targets)


@frozen
class GenerationSettings:
    """How to continue a prompt. `temperature` 0 is greedy decoding."""

    max_new_tokens: int
    temperature: float
    end_ids: tuple[int, ...]
    seed: int = 0

    def filler(self, rows: int) -> int:
        """The id that fills what is short in a batch: an end id among the `rows` that the base's embedding has."""
        return next((token for token in self.end_ids if token < rows), 0)


class Sampler(Protocol):
    """The model sampled from."""

    def sample(
        self, prompts: Sequence[Array], chances: Array, settings: GenerationSettings, adapter: bool = True
    ) -> Sequence[Array]:
        """Continue each int32 (length,) prompt, all in one batch, without dropout: int32 ids, an end id included.

        chances, float64 (prompts, max_new_tokens) in [0, 1), choose the tokens: by them alone, no generator has a part.
        `adapter=False` asks the true base.
        """


class Embedder(Protocol):
    """A model without its output head, as an embedding model."""

    pooling: str

    def embeddings(self, batch: MicroBatch, adapter: bool = True) -> Array:
        """A unit vector for each row of the batch, float32 (rows, width)."""


class Judge(Protocol):
    """A reward model's scalar head."""

    def head(self) -> Array:
        """The head's weight, float32 (1, hidden size)."""

    def load_head(self, head: Array) -> None:
        """Set the head's weight. Raises ModelError where it does not fit the base."""

    def scores(self, batch: MicroBatch) -> Array:
        """The score of each row of this process's batch, float32 (rows,)."""


class TrainingSession(Protocol):
    """What the training loop asks of a session, or of what stands before one (see core.run.rollouts)."""

    process: int
    processes: int

    def train_step(self, micro_batches: Sequence[MicroBatch], step: StepSettings) -> StepResult:
        """One optimizer update over this process's micro-batches."""

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> LossSum:
        """Loss without dropout and without touching any training state."""

    def restart(self, settings: RestartSettings) -> RestartResult:
        """Restart the adapters (ReLoRA).

        See core.adapter.pieces for what a prune takes, core.adapter.pieces for what a merge leaves.
        """

    def agree(self, value: int) -> int:
        """The largest value over all processes, the same on each; it waits for all of them."""


class Session(TrainingSession, Protocol):
    """One opened base with, later, adapters on it; what it cannot do is None."""

    backend: str
    device: str
    precision: str

    @property
    def scorer(self) -> Scorer | None:
        """Asks the model for log-probabilities; None for a base that was opened without its head."""

    @property
    def sampler(self) -> Sampler | None:
        """Samples answers while the model is trained."""

    @property
    def embedder(self) -> Embedder | None:
        """Makes vectors of texts, for a base that was opened for embeddings."""

    @property
    def judge(self) -> Judge | None:
        """The scalar head of a reward model, for a session that was opened to train or use one."""

    def notices(self) -> tuple[Problem, ...]:
        """What opening decided, with its reasons: device, precision, patches."""

    def describe(self) -> BaseDescription:
        """The base's structure."""

    def attach(self, plan: AdapterPlan) -> None:
        """Put adapters on the base and make them, and nothing else, trainable."""

    def evaluate(self, micro_batches: Sequence[MicroBatch], adapter: bool = True) -> LossSum:
        """Loss without dropout and without touching any training state; `adapter=False` is the true base."""

    def save_state(self, folder: Path) -> None:
        """Write factors and optimizer state, all that an exact resume needs, as safetensors and JSON."""

    def load_state(self, folder: Path, optimizer: bool = True) -> None:
        """Read back what `save_state` of either backend wrote; without `optimizer` its state stays fresh.

        Raises CheckpointError when it does not fit the adapters.
        """

    def factors(self) -> Mapping[str, Mapping[str, Array]]:
        """The adapter as a plain LoRA on the untouched base: module name -> {"lora_A": …, "lora_B": …}, float32.

        Those of expert weights are stacks, the expert first. With DoRA also "lora_magnitude_vector" (out_features,).
        VeRA's factors are its own: see core.adapter.vera.
        """

    def addition(self, adapter: AdapterModule, factors: Mapping[str, Array]) -> LayerDelta:
        """What the live layer adds for the inputs of core.adapter.probe, on this process alone.

        `adapter` and `factors` are a saved adapter's; they decide nothing but which layer it is, and DoRA's norms.
        """

    def load_factors(self, factors: Mapping[str, Mapping[str, Array]]) -> None:
        """Set the attached adapter's factors. Raises ModelError when names or shapes do not fit."""

    def logits(self, tokens: Array, adapter: bool = True) -> Array:
        """Float32 (rows, length, vocabulary) for int tokens (rows, length) without padding."""

    def generate(self, prompt: Array, settings: GenerationSettings, adapter: bool = True) -> Array:
        """Token ids that continue the int32 (length,) prompt, the end token not included."""

    def save_merged(self, folder: Path) -> None:
        """Write the base with the adapter folded in, in the base's own format."""

    def peak_memory_bytes(self) -> int:
        """The most memory this process held: on the accelerator if it runs on one, else resident."""

    def close(self) -> None:
        """Undo every patch and give the memory back."""
