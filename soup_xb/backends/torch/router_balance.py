"""The auxiliary loss that keeps a router's choices spread over the experts, beside a task's loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from soup_xb.backends.torch.head import BatchTensors, pass_through
from soup_xb.backends.torch.processes import Processes
from soup_xb.core.errors import ConfigError
from soup_xb.core.rows.batches import MicroBatch

METRIC = "router_aux_loss"


def check_router(model: Any) -> None:
    """Raise ConfigError for a base that has no router, or one that is balanced in another way."""
    # transformers gives both to the causal models that it has a balancing loss for.
    if hasattr(model, "router_aux_loss_coef") and hasattr(model, "num_experts_per_tok"):
        return
    raise ConfigError(
        "no-router",
        f"`{model.config.model_type}` has no router that is trained with a load-balancing loss",
        where="training.router_aux_loss_coef",
        help="remove the key: it is for mixtures of experts such as OLMoE, Mixtral, Qwen 3 MoE and GPT-OSS.",
    )


class RouterBalance:
    """A task's loss plus `coefficient` times the load-balancing loss (Switch Transformer, arXiv:2101.03961, 4 to 6).

    E sum_e f_e P_e over E experts: f_e is how often a token chose expert e, P_e the mean probability that the router
    gave it. As in transformers both are means over all layers; here they are over the real tokens of the whole step,
    all micro-batches and processes. Gradients pass through P alone, so the sum splits exactly once f is known: a step
    of several micro-batches counts the choices in a forward beforehand, without gradients and dropout.
    """

    def __init__(self, coefficient: float, processes: Processes, place: torch.device) -> None:
        """Weigh the loss with `coefficient`, with sums over all processes."""
        self._coefficient = coefficient
        self._processes, self._place = processes, place
        # (3, experts): choices, probabilities, and the tokens of all layers, summed over what was seen.
        self._seen: Tensor | None = None
        self._chosen: Tensor | None = None

    def begin(self, model: Any, batches: Sequence[MicroBatch], training: bool) -> None:
        """Count the choices of a training step whose micro-batches are computed one after the other."""
        self._seen = self._chosen = None
        if not training or len(batches) < 2:
            return
        with torch.no_grad():
            for batch in batches:
                with router_logits(model) as layers:
                    pass_through(model, BatchTensors.of(batch, self._place))
                self._add(_routed(layers, batch, model.num_experts_per_tok))
        self._chosen, self._seen = self._shared(self._seen), None

    def beside(self, model: Any, batch: MicroBatch, divisor: float, summed: Callable[[], Tensor]) -> Tensor:
        """What `summed` computes by a forward of the model, plus the micro-batch's part of this loss times `divisor`.

        The part is added in training alone.
        """
        with router_logits(model) as layers:
            loss = summed()
        routed = _routed(layers, batch, model.num_experts_per_tok)
        self._add(routed.detach())
        if not torch.is_grad_enabled():
            return loss
        if self._chosen is None:
            self._chosen = self._shared(routed.detach())
        return loss + self._coefficient * divisor * _balance(self._chosen, routed)

    def means(self) -> dict[str, float]:
        """The balancing loss itself: 1 is perfect balance, the number of experts the worst."""
        if self._seen is None:
            return {}
        seen = self._shared(self._seen)
        return {METRIC: _balance(seen, seen).item()}

    def _add(self, routed: Tensor) -> None:
        self._seen = routed if self._seen is None else self._seen + routed

    def _shared(self, sums: Tensor | None) -> Tensor:
        assert sums is not None
        total = sums.clone()
        self._processes.sum_([total])
        return total


@contextmanager
def router_logits(model: Any) -> Iterator[list[Tensor]]:
    """Inside, a forward of the model fills the list: its routers' logits, (rows * length, experts) for each layer."""
    layers: list[Tensor] = []

    def ask(_model: Any, inputs: Any, settings: dict[str, Any]) -> Any:
        return inputs, {**settings, "output_router_logits": True}

    def take(_model: Any, _inputs: Any, output: Any) -> None:
        layers.extend(output.router_logits)

    handles = (
        model.register_forward_pre_hook(ask, with_kwargs=True),
        model.register_forward_hook(take),
    )
    try:
        yield layers
    finally:
        for handle in handles:
            handle.remove()


def _routed(layers: Sequence[Tensor], batch: MicroBatch, choices: int) -> Tensor:
    """(3, experts), float32: each expert's choices and probabilities, and the tokens, over real tokens and layers."""
    length = batch.tokens.shape[1]
    lengths = torch.from_numpy(batch.lengths)
    real = (torch.arange(length) < lengths.unsqueeze(1)).reshape(-1).to(layers[0].device)
    sums = []
    for logits in layers:
        shares = logits.float().softmax(-1)[real]
        chosen = torch.zeros_like(shares).scatter(1, shares.topk(choices, dim=-1).indices, 1.0)
        sums.append(
            torch.stack([chosen.sum(0), shares.sum(0), shares.new_full((shares.shape[1],), len(shares))])
        )
    return torch.stack(sums).sum(0)


def _balance(whole: Tensor, part: Tensor) -> Tensor:
    """E sum_e f_e P_e with the choices and tokens of the whole step and the probabilities of a part of it."""
    chosen, _, tokens = whole.double() if whole.device.type != "mps" else whole
    return len(chosen) * ((chosen / tokens) * (part[1] / tokens)).sum()
