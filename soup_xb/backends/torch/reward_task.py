"""A reward model: a scalar head on the last token of each answer, trained so that the preferred one scores higher."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from soup_xb.backends.torch.head import BatchTensors, head_on_positions
from soup_xb.backends.torch.means import Means
from soup_xb.backends.torch.preference_losses import Pair
from soup_xb.backends.torch.processes import Processes
from soup_xb.backends.torch.reward_losses import reward
from soup_xb.core.adapter.extras import head_start
from soup_xb.core.adapter.peft_file import HEAD
from soup_xb.core.adapter.plan import AdapterPlan
from soup_xb.core.errors import ModelError
from soup_xb.core.rows.batches import MicroBatch
from soup_xb.core.run.session import StepSettings

_TOLD = {
    "accuracies": "reward_accuracy",
    "margins": "reward_margin",
    "chosen_rewards": "reward_chosen",
    "rejected_rewards": "reward_rejected",
}


class RewardTask:
    """The Bradley-Terry loss over pairs. The head is float32, and trained with the adapter."""

    def __init__(self, width: int, seed: int, processes: Processes, place: torch.device) -> None:
        """Make the head for hidden states of `width` numbers, from core's start for `seed`."""
        self._place = place
        self._means = Means(processes, place)
        self.head = torch.nn.Parameter(torch.from_numpy(head_start(width, seed)).to(place))

    def parameters(self) -> Mapping[str, torch.nn.Parameter]:
        """The head's weight (1, width)."""
        return {HEAD: self.head}

    def begin(self, model: Any, batches: Sequence[MicroBatch]) -> None:
        """There is nothing to know beforehand."""
        self._means.clear()

    def summed(self, model: Any, batch: MicroBatch) -> Tensor:
        """Sum over the pairs."""
        scores = self.scores(model, batch)
        if batch.comparison is None:
            # A process that has no row of this micro-batch.
            self._means.add(dict.fromkeys(_TOLD.values(), scores.detach()[:0]))
            return 0.0 * scores.sum()
        each, metrics = reward(Pair(*scores.chunk(2)))
        self._means.add({told: metrics[name] for name, told in _TOLD.items()})
        return each.sum()

    def scores(self, model: Any, batch: MicroBatch) -> Tensor:
        """The score of each row, float32 (rows,): the head on the hidden state where stock transformers reads it."""
        tokens = BatchTensors.of(batch, self._place).tokens
        # Causal attention keeps the padding on the right out of every real token's sight.
        places = score_places(batch, model.config.get_text_config().pad_token_id)
        positions = torch.from_numpy(places + np.arange(len(tokens)) * tokens.shape[1]).to(self._place)
        with head_on_positions(model, positions), seen_by(model.get_output_embeddings()) as hidden:
            model(input_ids=tokens, use_cache=False)
        scores: Tensor = (hidden[0][0].float() @ self.head.T)[:, 0]
        return scores

    def divisor(self, step: StepSettings) -> int:
        """The step's pairs."""
        return step.examples

    def finish(self, training: bool) -> tuple[int, Mapping[str, float]]:
        """The pairs that were judged, how often the preferred answer won, and by how much."""
        return self._means.told()

    def state(self) -> Mapping[str, float]:
        """Nothing is carried but the head, which is a parameter."""
        return {}

    def load(self, state: Mapping[str, float]) -> None:
        """Nothing was."""


@contextmanager
def seen_by(module: torch.nn.Module) -> Iterator[list[Tensor]]:
    """Inside, what the module is given is kept."""
    seen: list[Tensor] = []

    def keep(_module: Any, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])

    handle = module.register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def score_places(batch: MicroBatch, pad_id: int | None) -> np.ndarray[Any, Any]:
    """Where each row is scored, int64 (rows,): at its last token that is not the id the base's config pads with.

    It is the rule of transformers' sequence classification. A chat template may end turns with that id, and then the
    score is read one token earlier.
    """
    length = batch.tokens.shape[1]
    lengths = batch.lengths if len(batch.lengths) else np.ones(1, dtype=np.int64)
    places = np.arange(length)
    usable = places < lengths[:, None]
    if pad_id is not None:
        usable &= batch.tokens != pad_id
    return np.where(usable, places, 0).max(axis=1)


def check_scorable(model: Any, plan: AdapterPlan) -> None:
    """Raise ModelError where stock transformers could not score with what this base and adapter make."""
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    known = type(config) in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    names: set[str] = set()
    if known:
        with torch.device("meta"):
            stock = transformers.AutoModelForSequenceClassification.from_config(
                config, trust_remote_code=False
            )
        names = {name for name, _ in (*stock.named_modules(), *stock.named_parameters())}
    if HEAD not in names:
        raise ModelError(
            "no-score-head",
            f"transformers has no sequence classification with a `{HEAD}` head for `{config.model_type}`",
            where="task",
            help="take a base of another type, such as Llama, Qwen or Mistral.",
        )
    astray = next((adapter.name for adapter in plan.modules if adapter.name not in names), None)
    if astray is not None:
        raise ModelError(
            "no-score-head",
            f"`{astray}` is not part of the model that scores, which has no output head",
            where="training.lora.target_modules",
            help="use `target_modules: auto`.",
        )
