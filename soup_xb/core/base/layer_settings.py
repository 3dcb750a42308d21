"""Why layers differ: the keys of a base's config that say which layer holds what."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

from attrs import frozen

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
