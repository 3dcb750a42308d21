"""What a model is asked for: log-probabilities, answers, vectors of texts, and a reward model's scores."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from attrs import frozen
from safetensors.torch import save_file
from torch import Tensor

from soup_xb.backends.torch.base_kind import is_encoder
from soup_xb.backends.torch.device import memory_guard
from soup_xb.backends.torch.generation import sample
from soup_xb.backends.torch.head import BatchTensors, head_on_positions, token_logps
from soup_xb.backends.torch.processes import Processes
from soup_xb.core.adapter.extras import head_start, pooling_for
from soup_xb.core.adapter.peft_file import HEAD, check_factors
from soup_xb.core.adapter.plan import AdapterPlan
from soup_xb.core.errors import CheckpointError, ModelError, Problem
from soup_xb.core.rows.batches import MicroBatch, score_places
from soup_xb.core.run.checkpoint import read_tensors
from soup_xb.core.run.session import GenerationSettings, SessionSettings

Array = np.ndarray[Any, Any]
HEAD_FILE = "task.safetensors"


@frozen(eq=False)
class OpenBase:
    """A base on a device: `model()` gives it, and inside `with_adapter(False)` it is without its adapter."""

    model: Callable[[], Any]
    processes: Processes
    place: torch.device
    with_adapter: Callable[[bool], AbstractContextManager[Any]]


@frozen(eq=False)
class Outputs:
    """What an opened base can be asked for; what it cannot give is None."""

    base: OpenBase
    scorer: TorchScorer | None = None
    sampler: TorchSampler | None = None
    embedder: TorchEmbedder | None = None
    judge: ScoreHead | None = None
    temperature: float = 1.0
    notices: tuple[Problem, ...] = ()

    @classmethod
    def of(cls, base: OpenBase, settings: SessionSettings, width: int) -> Outputs:
        """Vectors of a base that was opened without its head, else words and scores; `width` is its hidden size."""
        if settings.pooling:
            pooling, reason = pooling_for(settings.pooling, settings.base, is_encoder(base.model()))
            told = Problem("pooling", f"{pooling}: {reason}")
            return cls(base, embedder=TorchEmbedder(base, pooling), notices=(told,))
        scored = settings.objective.outputs == "scores"
        judge = ScoreHead(base, width, settings.seed) if scored else None
        temperature = settings.objective.temperature
        return cls(base, TorchScorer(base), TorchSampler(base), judge=judge, temperature=temperature)

    def compute(self, batch: MicroBatch) -> Any:
        """What the objective asks of the model for a batch."""
        if self.embedder is not None:
            return self.embedder.compared(batch)
        if self.judge is not None:
            return self.judge.of(batch)
        return token_logps(self.base.model(), BatchTensors.of(batch, self.base.place), self.temperature)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """What is trained beside the adapter, by name."""
        return {} if self.judge is None else {HEAD: self.judge.weight}


class TorchScorer:
    """See soup_xb.core.objectives.objective.Scorer."""

    def __init__(self, base: OpenBase) -> None:
        """Ask the model of `base`."""
        self._base = base

    def token_logps(self, batch: MicroBatch, temperature: float = 1.0, adapter: bool = True) -> Array:
        """Log-probability of each target."""
        with torch.no_grad(), self._base.with_adapter(adapter), memory_guard("scoring answers"):
            tensors = BatchTensors.of(batch, self._base.place)
            result: Array = token_logps(self._base.model(), tensors, temperature).cpu().numpy()
        return result

    def sum(self, values: Array) -> Array:
        """Values summed over all processes."""
        # Metal has no float64.
        precise = torch.float32 if self._base.place.type == "mps" else torch.float64
        shared = torch.from_numpy(np.asarray(values)).to(self._base.place, precise)
        self._base.processes.sum_([shared])
        result: Array = shared.cpu().double().numpy()
        return result


class TorchSampler:
    """See soup_xb.core.run.session.Sampler. Prompts are padded on the left, and padding is masked."""

    def __init__(self, base: OpenBase) -> None:
        """Sample from the model as it is."""
        self._base = base

    def sample(
        self, prompts: Sequence[Array], chances: Array, settings: GenerationSettings, adapter: bool = True
    ) -> list[Array]:
        """Continue each prompt, with the tokens that `chances` choose."""
        with self._base.with_adapter(adapter), memory_guard("sampling answers"):
            return sample(self._base.model(), prompts, chances, settings)


class TorchEmbedder:
    """See soup_xb.core.run.session.Embedder."""

    def __init__(self, base: OpenBase, pooling: str) -> None:
        """Pool the hidden states of the model of `base`."""
        self.pooling, self._base = pooling, base

    def embeddings(self, batch: MicroBatch, adapter: bool = True) -> Array:
        """A unit vector for each row."""
        with torch.no_grad(), self._base.with_adapter(adapter), memory_guard("embedding texts"):
            vectors = embed(self._base.model(), batch, self.pooling, self._base.place)
            result: Array = torch.nn.functional.normalize(vectors, dim=-1).cpu().numpy()
        return result

    def compared(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """The anchors of a batch (rows, width), and the candidates of all processes (count, width)."""
        if batch.beside is None:
            raise RuntimeError("an embedding task needs batches of anchors with their candidates")
        anchors = embed(self._base.model(), batch, self.pooling, self._base.place)
        own = embed(self._base.model(), batch.beside, self.pooling, self._base.place)
        places = torch.from_numpy(batch.constants["places"]).to(self._base.place)
        count = int(batch.constants["count"])
        candidates: Tensor = _OfAllProcesses.apply(own[: len(places)], places, count, self._base.processes)
        return anchors, candidates


def embed(model: Any, batch: MicroBatch, pooling: str, place: torch.device) -> Tensor:
    """The pooled hidden states of each row of a batch, float32 (rows, width): mean, cls (the first) or last."""
    lengths = torch.from_numpy(np.maximum(batch.lengths, 1)).to(place)
    ids = torch.from_numpy(batch.tokens.astype(np.int64)).to(place)
    real = torch.arange(ids.shape[1], device=place) < lengths.unsqueeze(1)
    # Encoders look both ways, so padding must be hidden from them.
    settings = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    hidden = model(input_ids=ids, attention_mask=real.long(), **settings).last_hidden_state.float()
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        return hidden[torch.arange(len(ids), device=place), lengths - 1]
    return torch.where(real.unsqueeze(-1), hidden, 0.0).sum(1) / lengths.unsqueeze(1)


class _OfAllProcesses(torch.autograd.Function):
    """Vectors (own, width) of this process -> (count, width) of all, each at its place; gradients come back summed."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, places: Tensor, count: int, processes: Processes) -> Tensor:
        ctx.save_for_backward(places)
        ctx.processes = processes
        whole = own.new_zeros(count, own.shape[1])
        whole[places] = own
        processes.sum_([whole])
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (places,) = ctx.saved_tensors
        whole = gradient.clone()
        ctx.processes.sum_([whole])
        return whole[places], None, None, None


class ScoreHead:
    """See soup_xb.core.run.session.Judge. The head is float32, and trained with the adapter."""

    def __init__(self, base: OpenBase, width: int, seed: int) -> None:
        """Make the head for hidden states of `width` numbers, from core's start for `seed`."""
        self._base = base
        self.weight = torch.nn.Parameter(torch.from_numpy(head_start(width, seed)).to(base.place))

    def head(self) -> Array:
        """The head's weight, a copy."""
        result: Array = self.weight.detach().cpu().numpy().copy()
        return result

    def load_head(self, head: Array) -> None:
        """Set the head's weight."""
        check_factors({HEAD: tuple(self.weight.shape)}, {HEAD: head})
        with torch.no_grad():
            self.weight.copy_(torch.from_numpy(head))

    def scores(self, batch: MicroBatch) -> Array:
        """The score of each row."""
        with torch.no_grad():
            result: Array = self.of(batch).cpu().numpy()
        return result

    def save(self, folder: Path) -> None:
        """Write the head's weight into a checkpoint."""
        save_file({HEAD: self.weight.detach().cpu().contiguous()}, folder / HEAD_FILE)

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote. Raises CheckpointError where it does not fit."""
        file = folder / HEAD_FILE
        found = read_tensors(file)
        if {name: array.shape for name, array in found.items()} != {HEAD: tuple(self.weight.shape)}:
            raise CheckpointError("foreign-checkpoint", "is not the state of this task", where=str(file))
        self.load_head(found[HEAD])

    def of(self, batch: MicroBatch) -> Tensor:
        """The score of each row, float32 (rows,): the head on the hidden state where stock transformers reads it."""
        tokens = BatchTensors.of(batch, self._base.place).tokens
        # Causal attention keeps the padding on the right out of every real token's sight.
        places = score_places(batch, self._base.model().config.get_text_config().pad_token_id)
        positions = torch.from_numpy(places + np.arange(len(tokens)) * tokens.shape[1]).to(self._base.place)
        with (
            head_on_positions(self._base.model(), positions),
            _inputs_of(self._base.model().get_output_embeddings()) as hidden,
        ):
            self._base.model()(input_ids=tokens, use_cache=False)
        scores: Tensor = (hidden[0][0].float() @ self.weight.T)[:, 0]
        return scores


@contextmanager
def _inputs_of(module: torch.nn.Module) -> Iterator[list[Tensor]]:
    """Inside, the inputs of the module are put into the list."""
    seen: list[Tensor] = []

    def keep(_module: Any, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])

    handle = module.register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


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
