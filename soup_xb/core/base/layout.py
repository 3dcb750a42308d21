"""A base's modules by kind and layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from attrs import frozen

from soup_xb.core.base.layer_settings import layer_reason, layer_rules
from soup_xb.core.base.layers import Place, place_of, short_names, text_stack
from soup_xb.core.run.session import BaseDescription

# A stack of layers with what stands behind a layer's number.
Kind = tuple[str, str]
Layers = frozenset[int]


@frozen
class Reach:
    """Kinds of modules that were reached in the same layers.

    `names` are the kinds in short; `stack` is empty where they are the text decoder's. `missed` are layers that
    hold them too and were not reached; `reason` is what in the base's config makes the other layers hold none.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    stack: str
    layers: tuple[int, ...]
    count: int
    missed: tuple[int, ...] = ()
    reason: str = ""


@frozen(eq=False)
class Layout:
    """Where the modules and the other weights of a base are.

    `text` is the text decoder's stack, `holds` the layers that hold a kind, `reasons` why others do not, where
    the base's config says so.
    """

    places: Mapping[str, Place]
    text: str
    holds: Mapping[Kind, Layers]
    names: Mapping[Kind, str]
    reasons: Mapping[Kind, str]

    def kinds(self, names: Iterable[str]) -> dict[Kind, Layers]:
        """The layers in which the modules of each kind are."""
        found: dict[Kind, set[int]] = {}
        for name in names:
            place = self.places[name]
            found.setdefault((place.stack, place.kind), set()).add(place.layer)
        return {kind: frozenset(layers) for kind, layers in found.items()}

    def missed(self, names: Iterable[str]) -> dict[Kind, Layers]:
        """Of the kinds that the modules are: the layers that hold more of them."""
        rest = {kind: self.holds[kind] - layers for kind, layers in self.kinds(names).items()}
        return {kind: layers for kind, layers in rest.items() if layers}

    def all_layers(self, stack: str) -> range:
        """The layers of a stack."""
        return range(
            max((max(layers) for (own, _), layers in self.holds.items() if own == stack), default=-1) + 1
        )

    def reach(self, names: Iterable[str], missed: Mapping[Kind, Layers]) -> tuple[Reach, ...]:
        """Modules as kinds and layers, kinds alike together."""
        counts: dict[Kind, dict[int, int]] = {}
        for name in names:
            place = self.places[name]
            layers = counts.setdefault((place.stack, place.kind), {})
            layers[place.layer] = layers.get(place.layer, 0) + 1
        alike: dict[tuple[str, Layers, Layers, str], list[Kind]] = {}
        for kind, layers in counts.items():
            rest, reason = missed.get(kind, frozenset()), self.reasons.get(kind, "")
            alike.setdefault((kind[0], frozenset(layers), rest, reason), []).append(kind)
        return tuple(
            Reach(
                names=tuple(self.names[kind] for kind in kinds),
                kinds=tuple(kind for _, kind in kinds),
                stack="" if stack == self.text else stack,
                layers=tuple(sorted(layer for layer in holds if layer >= 0)),
                count=sum(sum(counts[kind].values()) for kind in kinds),
                missed=tuple(sorted(rest)),
                reason=reason,
            )
            for (stack, holds, rest, reason), kinds in alike.items()
        )


def layout_of(base: BaseDescription) -> Layout:
    """Where everything in the base is."""
    places = {module.name: place_of(module.name) for module in base.modules}
    text = text_stack(places.values())
    places |= {name: place_of(name) for name in base.other_weights}
    holds: dict[Kind, set[int]] = {}
    stacks: dict[str, dict[str, None]] = {}
    for place in places.values():
        holds.setdefault((place.stack, place.kind), set()).add(place.layer)
        stacks.setdefault(place.stack, {})[place.kind] = None
    names: dict[Kind, str] = {}
    for stack, kinds in stacks.items():
        short = short_names(list(kinds)) if stack else {}
        names |= {(stack, kind): short.get(kind, kind) for kind in kinds}
    all_holds = {kind: frozenset(layers) for kind, layers in holds.items()}
    return Layout(places, text, all_holds, names, _reasons(base, text, all_holds))


def _reasons(base: BaseDescription, text: str, holds: Mapping[Kind, Layers]) -> dict[Kind, str]:
    ours = {kind: layers for kind, layers in holds.items() if text and kind[0] == text}
    count = max((max(layers) for layers in ours.values()), default=-1) + 1
    rules = layer_rules(base.layer_settings, count)
    told = {layers: layer_reason(layers, rules) for layers in set(ours.values()) if len(layers) < count}
    return {kind: told[layers] for kind, layers in ours.items() if told.get(layers)}
