"""Token ids that go on, through transformers' generate: one prompt, or a batch whose tokens are chosen from outside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers
from transformers.modeling_layers import GradientCheckpointingLayer

from soup_xb.core.run.session import GenerationSettings

Array = np.ndarray[Any, Any]


class ChosenTokens(transformers.LogitsProcessor):
    """Leaves of each row's distribution the one token that a number chooses.

    It is the first that lifts the sum of the shares up to it above the number: uniform numbers make that a sample.
    """

    def __init__(self, chances: torch.Tensor, temperature: float, prompt: int) -> None:
        """`chances` (rows, tokens) in [0, 1), for prompts of `prompt` tokens with their padding."""
        self._chances, self._temperature, self._prompt = chances, temperature, prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (rows, vocabulary), of which one is 0 and all others are minus infinity."""
        place = input_ids.shape[1] - self._prompt
        shares = (scores.float() / self._temperature).softmax(-1)
        sums = shares.to(self._chances.dtype).cumsum(-1)
        wanted = self._chances[:, place : place + 1] * sums[:, -1:]
        token = torch.searchsorted(sums, wanted, right=True).clamp(max=sums.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def sample(model: Any, prompts: Sequence[Array], chances: Array, settings: GenerationSettings) -> list[Array]:
    """See soup_xb.core.run.session.Sampler. Prompts are padded on the left, and padding is masked."""
    length = max(map(len, prompts))
    ids = np.full((len(prompts), length), _filler(model, settings), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = 1
    place = model.device
    # Metal has no float64; its sums over a vocabulary are off by rounding.
    precise = torch.float32 if place.type == "mps" else torch.float64
    chooser = ChosenTokens(torch.from_numpy(chances).to(place, precise), settings.temperature, length)
    new = continued(
        model, torch.from_numpy(ids).to(place), torch.from_numpy(mask).to(place), settings, [chooser]
    )
    return [_to_the_end(row, settings.end_ids, including=True) for row in new]


def _filler(model: Any, settings: GenerationSettings) -> int:
    return settings.filler(model.get_input_embeddings().weight.shape[0])


def continue_prompt(model: Any, prompt: Array, settings: GenerationSettings) -> Array:
    """Ids that go on after one prompt, without the end id; sampled by torch's generator, greedily at temperature 0."""
    ids = torch.from_numpy(np.asarray(prompt, dtype=np.int64)).unsqueeze(0).to(model.device)
    [new] = continued(model, ids, torch.ones_like(ids), settings)
    return _to_the_end(new, settings.end_ids, including=False)


def continued(
    model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor,
    settings: GenerationSettings,
    processors: Sequence[transformers.LogitsProcessor] = (),
) -> Array:
    """New ids int32 (rows, tokens) after ids and mask (rows, length); after a row's end they are padding.

    Processors choose the tokens themselves; without them the settings' temperature does.
    """
    sampling: dict[str, Any] = {"do_sample": settings.temperature > 0 and not processors}
    if sampling["do_sample"]:
        sampling |= {"temperature": settings.temperature, "top_p": 1.0, "top_k": 0}
    config = transformers.GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=list(settings.end_ids),
        pad_token_id=_filler(model, settings),
        **sampling,
    )
    with torch.no_grad(), _as_it_is(model):
        output = model.generate(
            ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=transformers.LogitsProcessorList(processors),
        )
    new: Array = output[:, ids.shape[1] :].cpu().numpy().astype(np.int32)
    return new


@contextmanager
def _as_it_is(model: Any) -> Iterator[None]:
    """Inside, neither the base's generation settings nor the recomputing of activations has a part.

    The base's own generation_config would add its temperature and penalties to ours in silence, and layers that
    recompute activations keep no cache of keys and values.
    """
    own, model.generation_config = model.generation_config, transformers.GenerationConfig()
    layers = [
        module
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) and module.training
    ]
    for layer in layers:
        layer.training = False
    try:
        yield
    finally:
        model.generation_config = own
        for layer in layers:
            layer.training = True


def _to_the_end(row: Array, end_ids: Sequence[int], including: bool) -> Array:
    ends = np.flatnonzero(np.isin(row, end_ids))
    return row[: ends[0] + including] if ends.size else row
