"""What the targets and patterns of a config reached in a base, by layer and kind of expert, and what they left out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from attrs import frozen

from soup_xb.core.base.layers import Layers, Layout, Place, Reach, layers_text, layout_of
from soup_xb.core.base.modules import AdapterModule, Module, is_decoder_linear, reachable_names
from soup_xb.core.base.patterns import matching_names
from soup_xb.core.config.schema import AUTOMATIC, LoraConfig
from soup_xb.core.errors import Problem
from soup_xb.core.run.session import BaseDescription

_ANY_DIGIT = re.compile(r"(\\d|\[0-9\])(?![+*{?])")
# Digits that name no layer: any digit, a repetition's bounds, and those in a name such as `w1`.
_OTHER_DIGITS = re.compile(r"\[0-9\]|\{[\d,]*\}|(?<![\\])[A-Za-z_]\d+")


@frozen
class PatternReach:
    """What one target, or one key of `rank_pattern` or `alpha_pattern` with its `value`, decided."""

    key: str
    pattern: str
    value: int | None
    reached: tuple[Reach, ...]

    @property
    def count(self) -> int:
        """Modules that it decided."""
        return sum(reach.count for reach in self.reached)


@frozen
class Coverage:
    """What of a base is adapted.

    `parts` are those of a base with experts, empty for any other. `left_out` is what `auto` leaves out besides.
    `without_adapter` are the text decoder's layers that carry none. `base_parameters` are all of the base's.
    """

    patterns: tuple[PatternReach, ...]
    parts: tuple[Part, ...]
    left_out: tuple[Reach, ...]
    without_adapter: tuple[int, ...]
    base_parameters: int
    warnings: tuple[Problem, ...]


def cover(
    base: BaseDescription, adapters: Sequence[AdapterModule], lora: LoraConfig, written: Mapping[str, str]
) -> Coverage:
    """The coverage of the adapters that `resolve_adapters` decided; `written` is as there."""
    layout = layout_of(base)
    adapted = frozenset(adapter.name for adapter in adapters)
    patterns = _target_reaches(base, adapted, lora, layout)
    for key, values in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        patterns += _value_reaches(base, adapted, key, values, layout)
    left_out: tuple[Reach, ...] = ()
    if lora.target_modules in AUTOMATIC:
        counted = adapted | part_names(base, layout).keys()
        rest = [module.name for module in base.modules if module.name not in counted]
        left_out = layout.reach([name for name in rest if layout.places[name].stack], {})
    ours = {place.layer for name in adapted if (place := layout.places[name]).stack == layout.text}
    return Coverage(
        patterns=tuple(patterns),
        parts=tuple(parts_of(base, adapted, layout)),
        left_out=left_out,
        without_adapter=tuple(layer for layer in layout.all_layers(layout.text) if layer not in ours),
        base_parameters=base.parameters,
        warnings=(*_partly_reached(patterns, written), *_without_reason(base, adapters, layout)),
    )


def names_layers(pattern: str) -> bool:
    r"""Whether the pattern has numbers of layers in it, so that reaching some layers alone is meant.

    >>> names_layers(r"layers\.[0-7]\..*"), names_layers(r"layers\.\d\.mlp\.w1"), names_layers("layers.1.q_proj")
    (True, False, True)
    """
    return bool(re.search(r"\d", _OTHER_DIGITS.sub("", pattern)))


def _target_reaches(
    base: BaseDescription, adapted: frozenset[str], lora: LoraConfig, layout: Layout
) -> list[PatternReach]:
    modules = [module for module in base.modules if module.name in adapted]
    missed = layout.missed(adapted)
    targets = (lora.target_modules,) if isinstance(lora.target_modules, str) else lora.target_modules
    found = []
    for target in targets:
        names = [module.name for module in modules] if target in AUTOMATIC else _reached(target, modules)
        found.append(PatternReach("target_modules", target, None, layout.reach(names, missed)))
    return found


def _value_reaches(
    base: BaseDescription, adapted: frozenset[str], key: str, values: Mapping[str, int], layout: Layout
) -> list[PatternReach]:
    """The modules that each key decides: those that it reaches and no earlier key does."""
    free = [module for module in base.modules if module.name in adapted]
    found: list[tuple[str, int, list[str]]] = []
    for pattern, value in values.items():
        names = _reached(pattern, free)
        taken = set(names)
        free = [module for module in free if module.name not in taken]
        found.append((pattern, value, names))
    everything = layout.kinds(adapted)
    decided = layout.kinds(name for _, _, names in found for name in names)
    missed = {kind: rest for kind, layers in decided.items() if (rest := everything[kind] - layers)}
    return [
        PatternReach(key, pattern, value, layout.reach(names, {} if names_layers(pattern) else missed))
        for pattern, value, names in found
    ]


def _reached(pattern: str, modules: Sequence[Module]) -> list[str]:
    names = set(matching_names(pattern, reachable_names(modules)))
    return [module.name for module in modules if module.name in names or module.reached_as in names]


def _partly_reached(patterns: Sequence[PatternReach], written: Mapping[str, str]) -> list[Problem]:
    """A warning for each pattern that reaches a kind in some of its layers, where no pattern names layers."""
    meant = {
        (pattern.key, reach.stack, kind)
        for pattern in patterns
        if names_layers(pattern.pattern)
        for reach in pattern.reached
        for kind in reach.kinds
    }
    problems = []
    for pattern in patterns:
        for reach in pattern.reached:
            if reach.missed and not any((pattern.key, reach.stack, kind) in meant for kind in reach.kinds):
                problems.append(_partly(pattern, reach, written))
    return problems


def _partly(pattern: PatternReach, reach: Reach, written: Mapping[str, str]) -> Problem:
    cure = "write a pattern for all of them, or name the layers if this is meant."
    digit = _ANY_DIGIT.search(pattern.pattern)
    if digit:
        cure = f"`{digit[0]}` is one digit alone; `{digit[0]}+` is any number. {cure[0].upper()}{cure[1:]}"
    key = f"training.lora.{pattern.key}"
    return Problem(
        "layers-left-out",
        f"`{pattern.pattern}` reaches {', '.join(reach.names)} in {layers_text(reach.layers)}, and not in "
        f"{layers_text(reach.missed)}",
        written.get(f"{key}.{pattern.pattern}") or written.get(key, key),
        cure,
    )


def _without_reason(
    base: BaseDescription, adapters: Sequence[AdapterModule], layout: Layout
) -> list[Problem]:
    """A warning for adapted kinds that only some layers of the text decoder hold, with no word of it in the config."""
    every = frozenset(layout.all_layers(layout.text))
    odd: dict[Layers, list[str]] = {}
    for kind in layout.kinds(adapter.name for adapter in adapters):
        holds = layout.holds[kind]
        if kind[0] == layout.text and layout.text and holds != every and kind not in layout.reasons:
            odd.setdefault(holds, []).append(layout.names[kind])
    return [
        Problem(
            "layers-differ",
            f"{', '.join(names)} {'are' if len(names) > 1 else 'is'} in {layers_text(holds)} of the base alone, not in "
            f"{layers_text(every - holds)}, and nothing in its config says why",
            base.model_type,
            "the other layers are trained through what they have; check that the base is the one you mean.",
        )
        for holds, names in odd.items()
    ]


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
