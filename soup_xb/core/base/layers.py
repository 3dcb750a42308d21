"""The modules of a base by kind and layer: where each sits, and which config keys say how layers differ."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

from attrs import frozen

from soup_xb.core.base.modules import is_decoder_linear
from soup_xb.core.run.session import BaseDescription

_LAYER = re.compile(r"(?:^|(?<=\.))(?:layers|h|blocks|block|layer)\.(\d+)\.")
_EXPERT = re.compile(r"(^|\.)(experts)\.\d+(?=\.)")
_SHOWN_RANGES = 8


@frozen
class Place:
    """A module's place.

    `stack` is what stands before the layer's number (`model.layers`), `kind` what stands behind it
    (`self_attn.q_proj`). Outside of the layers `stack` is empty, `layer` is -1 and `kind` is the whole name.
    """

    stack: str
    layer: int
    kind: str


def place_of(name: str) -> Place:
    """The place of a module; experts that are modules of their own are one kind.

    >>> place_of("model.layers.3.self_attn.q_proj")
    Place(stack='model.layers', layer=3, kind='self_attn.q_proj')
    >>> place_of("model.layers.3.block_sparse_moe.experts.7.w1").kind
    'block_sparse_moe.experts.*.w1'
    >>> place_of("lm_head")
    Place(stack='', layer=-1, kind='lm_head')
    """
    found = _LAYER.search(name)
    if found is None:
        return Place("", -1, name)
    stack = name[: found.start(1) - 1]
    return Place(stack, int(found[1]), _EXPERT.sub(r"\1\2.*", name[found.end() :]))


def text_stack(places: Iterable[Place]) -> str:
    """The text decoder's stack: the one with the most modules outside of the towers; empty where there is none."""
    counts: dict[str, int] = {}
    for place in places:
        if place.stack:
            counts[place.stack] = counts.get(place.stack, 0) + 1
    text = {stack: count for stack, count in counts.items() if is_decoder_linear(f"{stack}.0.linear")}
    return max(text, key=text.__getitem__, default="")


def layers_text(layers: Iterable[int]) -> str:
    """Layers as ranges, shortened in the middle where there are many.

    >>> layers_text([0, 1, 2, 5, 6, 7]), layers_text([4]), layers_text([])
    ('layers 0-2, 5-7', 'layer 4', 'no layer')
    """
    ranges: list[list[int]] = []
    wanted = sorted(set(layers))
    for layer in wanted:
        if ranges and ranges[-1][1] == layer - 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    texts = [f"{first}-{last}" if last > first else str(first) for first, last in ranges]
    if len(texts) > _SHOWN_RANGES:
        texts = [*texts[: _SHOWN_RANGES - 2], f"… {texts[-1]}"]
    if not texts:
        return "no layer"
    return f"layer{'s' * (len(wanted) > 1)} {', '.join(texts)}"


def short_names(kinds: Sequence[str]) -> Mapping[str, str]:
    """Each kind's shortest ending that is no other kind's and begins with a word.

    It is equally long for all that stand side by side.

    >>> sorted(short_names(["self_attn.q_proj", "mlp.up_proj", "mlp.shared_expert.up_proj"]).values())
    ['mlp.up_proj', 'q_proj', 'shared_expert.up_proj']
    """
    parts = {kind: kind.split(".") for kind in kinds}
    endings = Counter(".".join(own[start:]) for own in parts.values() for start in range(len(own)))
    depths: dict[tuple[str, ...], int] = {}
    for own in parts.values():
        depth = next((d for d in range(1, len(own)) if endings[".".join(own[-d:])] == 1), len(own))
        while depth < len(own) and not own[-depth][0].isalpha():
            depth += 1
        side = tuple(own[:-1])
        depths[side] = max(depth, depths.get(side, 1))
    return {kind: ".".join(own[-depths[tuple(own[:-1])] :]) for kind, own in parts.items()}


_LIST_KEY = re.compile(r"layer|block_types|_types$|_modes$|_idxs$|_freq$|_pattern$")
_LONGEST_LIST = 4096
# Three keys at most are looked at together, out of so many.
_MOST_RULES = 12
# A number that divides the layers in two: (layer, layers, value) -> on which side the layer is.
_NUMBERS: Mapping[str, Callable[[int, int, int], bool]] = {
    "first_k_dense_replace": lambda layer, _, first: layer < first,
    "num_dense_layers": lambda layer, _, first: layer < first,
    "num_kv_shared_layers": lambda layer, layers, shared: layer >= layers - shared,
    "decoder_sparse_step": lambda layer, _, step: (layer + 1) % step == 0,
    "interleave_moe_layer_step": lambda layer, _, step: (layer + 1) % step == 0,
    "moe_layer_freq": lambda layer, _, step: layer % step == 0,
    "moe_layer_interval": lambda layer, _, step: (layer + 1) % step == 0,
    "moe_layer_start_index": lambda layer, _, first: layer >= first,
    "moe_layer_end_index": lambda layer, _, last: layer <= last,
    "full_attention_interval": lambda layer, _, step: (layer + 1) % step == 0,
}
# A period and an offset are one rule.
_PERIODS = {
    "expert_layer_period": "expert_layer_offset",
    "attn_layer_period": "attn_layer_offset",
}
_STEPS = re.compile(r"_(step|freq|interval|period)$")
_NUMBER_KEYS = {*_NUMBERS, *_PERIODS, *_PERIODS.values()}


@frozen
class LayerRule:
    """One config key with what it says of each layer; `text` is the key, with its value where that is short."""

    text: str
    labels: tuple[Any, ...]


def layer_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a text model's config that say how its layers differ, as plain values.

    >>> layer_settings({"hidden_size": 64, "first_k_dense_replace": 1, "layer_types": ["full_attention"]})
    {'first_k_dense_replace': 1, 'layer_types': ['full_attention']}
    """
    return {
        key: list(value) if isinstance(value, list | tuple) else value
        for key, value in config.items()
        if (key in _NUMBER_KEYS and type(value) is int) or (_LIST_KEY.search(key) and _plain_list(value))
    }


def layer_rules(settings: Mapping[str, Any], layers: int) -> list[LayerRule]:
    """What each key of `layer_settings` says of the layers; a key that tells none apart is left out."""
    rules = []
    for key, value in settings.items():
        labels: Sequence[Any] = ()
        text = f"{key}: {value}"
        if isinstance(value, list):
            labels, text = _list_labels(value, layers), key
        elif key in _PERIODS and value > 0:
            offset = settings.get(_PERIODS[key], 0)
            labels = [layer % value == offset for layer in range(layers)]
        elif key in _NUMBERS and (value > 0 or not _STEPS.search(key)):
            labels = [_NUMBERS[key](layer, layers, value) for layer in range(layers)]
        if len(set(labels)) > 1:
            rules.append(LayerRule(text, tuple(labels)))
    return rules


def layer_reason(holds: frozenset[int], rules: Sequence[LayerRule]) -> str:
    """The keys, up to three, that set the layers `holds` apart from the others; empty where none do.

    >>> rules = layer_rules({"first_k_dense_replace": 1, "layer_types": ["linear", "full"] * 2}, layers=4)
    >>> layer_reason(frozenset({0}), rules), layer_reason(frozenset({1, 3}), rules)
    ('first_k_dense_replace: 1', 'layer_types: full')
    >>> layer_reason(frozenset({1, 2}), rules)
    ''
    """
    for count in (1, 2, 3):
        for chosen in combinations(rules[:_MOST_RULES], count):
            cells = list(zip(*(rule.labels for rule in chosen), strict=True))
            inside = {cells[layer] for layer in holds}
            if inside.isdisjoint(cell for layer, cell in enumerate(cells) if layer not in holds):
                return ", ".join(_told(rule, holds) for rule in chosen)
    return ""


def _told(rule: LayerRule, holds: frozenset[int]) -> str:
    labels = {rule.labels[layer] for layer in holds}
    if len(labels) == 1 and isinstance(label := next(iter(labels)), str):
        return f"{rule.text}: {label}"
    return rule.text


def _plain_list(value: Any) -> bool:
    if not isinstance(value, list | tuple) or not 0 < len(value) <= _LONGEST_LIST:
        return False
    return any(all(isinstance(entry, kind) for entry in value) for kind in (str, int))


def _list_labels(value: Sequence[Any], layers: int) -> list[Any]:
    """A label for each layer, out of a list of labels, a cycle of labels, or the numbers of some layers."""
    if all(isinstance(entry, str) for entry in value):
        return [value[layer % len(value)] for layer in range(layers)]
    few = len(set(value)) <= max(2, layers // 2)
    if len(value) == layers and few:
        return list(value)
    named = set(value)
    return [layer in named for layer in range(layers)] if max(named) < layers else []


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
