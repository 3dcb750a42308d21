"""Where a module sits in its base: which stack of layers, which layer, and which kind of module it is there."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from attrs import frozen

from soup_xb.core.base.modules import is_decoder_linear

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
