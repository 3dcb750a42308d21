"""Gemma 4's clippable linears: a pattern that names the wrapper reaches the linear inside its clamps.

transformers wraps the linears of the vision and audio towers in `Gemma4ClippableLinear`, which clamps what goes in
and what comes out. PEFT refuses the wrapper, and an adapter around the clamps could not be merged. Inside them it
sees what the linear sees, merges exactly, and the saved adapter names layers that stock PEFT adapts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from attrs import frozen

from soup_xb.core.base.towers import is_gemma4
from soup_xb.core.errors import Problem

WRAPPER = "Gemma4ClippableLinear"
_CLAMPS = ("input_min", "input_max", "output_min", "output_max")


@frozen
class ClippableLinears:
    """What the patch found: the name of each inner linear with the wrapper's name, and the line that tells of it."""

    wrappers: Mapping[str, str]
    notices: tuple[Problem, ...]


@contextmanager
def clippable_linears(model: Any, base: str) -> Iterator[ClippableLinears]:
    """Inside, adapters may sit on the inner linears; on exit every wrapper holds its own linear again.

    Nothing of the library is changed: names are all that it takes. Empty for a base that neither by its name nor by
    its config's model type is Gemma 4, or that has no such wrapper.
    """
    found = _wrappers(model) if is_gemma4(base, model.config.model_type) else {}
    own = {name: wrapper.linear for name, wrapper in found.items()}
    notices = (_notice(list(found.values())),) if found else ()
    try:
        yield ClippableLinears({f"{name}.linear": name for name in found}, notices)
    finally:
        for name, wrapper in found.items():
            wrapper.linear = own[name]


def _wrappers(model: Any) -> dict[str, Any]:
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ == WRAPPER and isinstance(getattr(module, "linear", None), torch.nn.Linear)
    }


def _notice(wrappers: list[Any]) -> Problem:
    clamps = [[getattr(wrapper, name, None) for name in _CLAMPS] for wrapper in wrappers]
    bounds = [[bound for bound in four if isinstance(bound, torch.Tensor)] for four in clamps]
    if any(bound.is_meta for four in bounds for bound in four):
        clamped, kind = sum(map(bool, bounds)), "clamps"
    else:
        clamped = sum(any(torch.isfinite(bound).all() for bound in four) for four in bounds)
        kind = "finite clamps"
    return Problem(
        "gemma4-clippable-linear",
        f"{len(wrappers)} clippable linears, {clamped} of them with {kind}, take adapters on their inner linear",
    )
