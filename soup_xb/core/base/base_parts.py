"""The parts of a mixture-of-experts base, and which of them are adapted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from attrs import frozen

from soup_xb.core.base.layers import Place
from soup_xb.core.base.layout import Layout, Reach
from soup_xb.core.base.modules import Module, is_decoder_linear
from soup_xb.core.run.session import BaseDescription

EXPERTS, SHARED, DENSE, ROUTERS = "experts", "shared experts", "dense layers", "routers"

_ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate)(\.|$)")
_SHARED = re.compile(r"(^|\.)shared_(experts?|mlp)(\.|$)")
_EXPERTS = re.compile(r"(^|\.)experts(\.|$)")
_ATTENTION = re.compile(r"attn|attention")
_MLP = re.compile(r"(^|\.)(mlps?|feed_forward|ffn?|block_sparse_moe|moe)\.")
# In a stack whose blocks are all called alike (`mixer`), the projections' names tell an MLP.
_MLP_PROJECTION = re.compile(r"^[a-z]+\.(gate_proj|up_proj|down_proj|gate_up_proj|w[123]|fc[12])$")


@frozen
class Part:
    """One part of a base with experts: what of it is adapted and what is not.

    `experts` is the number of experts in a layer (0 where there are none or it is not known), `parameters` the
    entries of the part's weights as far as they are known, `adaptable` whether an adapter can sit on each of them.
    """

    name: str
    adapted: tuple[Reach, ...]
    left: tuple[Reach, ...]
    experts: int = 0
    parameters: int = 0
    adaptable: bool = True

    @property
    def adapted_count(self) -> int:
        """Weights of the part that are adapted."""
        return sum(reach.count for reach in self.adapted)

    @property
    def count(self) -> int:
        """Weights of the part."""
        return self.adapted_count + sum(reach.count for reach in self.left)


def parts_of(base: BaseDescription, adapted: frozenset[str], layout: Layout) -> list[Part]:
    """Experts, shared experts, dense layers and routers of a base; empty for a base without experts."""
    found = part_names(base, layout)
    parts = []
    for part in (EXPERTS, SHARED, DENSE, ROUTERS):
        names = [name for name, own in found.items() if own == part]
        if not names:
            continue
        ours = [name for name in names if name in adapted]
        left = [name for name in names if name not in adapted]
        modules = [module for module in base.modules if found.get(module.name) == part]
        parts.append(
            Part(
                name=part,
                adapted=layout.reach(ours, {}),
                left=layout.reach(left, {}),
                experts=_experts_a_layer(modules, layout),
                parameters=sum(
                    max(1, module.experts) * module.out_features * module.in_features for module in modules
                ),
                adaptable=len(modules) == len(names),
            )
        )
    return parts


def part_names(base: BaseDescription, layout: Layout) -> dict[str, str]:
    """Weight -> the part it belongs to, in a base with experts; attention and everything else is in none.

    What is called an MLP is a shared one where its layer has experts beside it, and a dense layer elsewhere.
    """
    listed = {module.name: module.experts for module in base.modules}
    text = {stack: is_decoder_linear(f"{stack}.0.linear") for stack, _ in layout.holds}
    inside = {name: place for name, place in layout.places.items() if text[place.stack]}
    parts = {name: _named_part(place.kind, listed.get(name, 0)) for name, place in inside.items()}
    routed = _layers_with(ROUTERS, parts, inside)
    for name, place in inside.items():
        # A weight that is no linear layer, beside a router: experts in a form of their own.
        if not parts[name] and name not in listed and _is_mlp(place.kind) and _layer(place) in routed:
            parts[name] = EXPERTS
    with_experts = _layers_with(EXPERTS, parts, inside)
    if not with_experts:
        return {}
    for name, place in inside.items():
        if not parts[name] and name in listed and _is_mlp(place.kind):
            parts[name] = SHARED if _layer(place) in with_experts else DENSE
    return {name: part for name, part in parts.items() if part}


def _named_part(kind: str, experts: int) -> str:
    """The part that the name alone tells; empty where it does not."""
    if _ROUTER.search(kind) and (_EXPERTS.search(kind) or not _ATTENTION.search(kind)):
        return ROUTERS
    if _SHARED.search(kind):
        return SHARED
    return EXPERTS if experts or _EXPERTS.search(kind) else ""


def _is_mlp(kind: str) -> bool:
    return bool(_MLP.search(kind) or _MLP_PROJECTION.search(kind))


def _layer(place: Place) -> tuple[str, int]:
    return place.stack, place.layer


def _layers_with(part: str, parts: Mapping[str, str], places: Mapping[str, Place]) -> set[tuple[str, int]]:
    return {_layer(places[name]) for name, own in parts.items() if own == part}


def _experts_a_layer(modules: Sequence[Module], layout: Layout) -> int:
    """From 3-D parameters; where each expert is a module of its own, from the modules of one kind in one layer."""
    stacked = max((module.experts for module in modules), default=0)
    counts = Counter(place for module in modules if ".*." in (place := layout.places[module.name]).kind)
    return stacked or max(counts.values(), default=0)
