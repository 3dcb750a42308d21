"""What was proven of each model type on MLX: `proven.json`, which `make prove-families` writes.

For a type it says which fields of the config mlx-lm follows as transformers does, where the modules of transformers are
in mlx-lm, and what else was found equal. Nothing in it is written by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from attrs import field, frozen

FILE = Path(__file__).with_name("proven.json")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@frozen
class Part:
    """Where a module of transformers, or a share of its rows, is in mlx-lm.

    `place` has `*` for numbers. Of `of` equal shares this is number `index`, counted row by row where `interleaved`.
    With `turned` transformers keeps (in, out): of a matrix that is all, of a stack of experts PEFT does not know it, so
    that A and B change places. `heads` are the two halves of a latent attention's `kv_b_proj`, a matrix for each head:
    "keys" and "values".
    """

    place: str
    index: int = 0
    of: int = 1
    interleaved: bool = False
    turned: bool = False
    heads: str = ""


@frozen
class ProvenType:
    """One model type.

    `reads` are fields whose every value mlx-lm follows, `values` those that were equal with the given values alone.
    `ropes` are kinds of rotary embeddings, and `partial` where a share of a head may be turned. `parts` maps modules in
    transformers to those in mlx-lm where the names differ; `closed` are modules that take no adapter on MLX.
    `by_weight` are last names that PEFT takes for those of experts. `cached`: decoding with a cache is equal to
    decoding without. `scores`: transformers has a sequence
    classifier with a scalar head for it. `windows`: equal beyond a sliding window. `scaled`: mlx-lm keeps weights
    multiplied, and an adapter there has to be multiplied too.
    """

    name: str
    reads: frozenset[str]
    values: Mapping[str, list[Any]]
    ropes: tuple[str, ...]
    parts: Mapping[str, tuple[Part, ...]] = field(factory=dict)
    closed: tuple[str, ...] = ()
    by_weight: frozenset[str] = frozenset()
    cached: bool = False
    scores: bool = False
    windows: bool = False
    scaled: bool = False

    def parts_of(self, module: str) -> tuple[Part, ...]:
        """Where a module of transformers is in mlx-lm; empty for one that takes no adapter there."""
        pattern, numbers = _pattern(module)
        if pattern in self.closed:
            return ()
        found = self.parts.get(pattern, (Part(pattern),))
        return tuple(_numbered(part, numbers) for part in found)

    def is_moved(self, module: str) -> bool:
        """Whether a module of transformers is elsewhere in mlx-lm, or in several places."""
        return _pattern(module)[0] in self.parts

    def ordered(self, names: Iterable[str]) -> list[str]:
        """Modules with those of one parent in transformers' order, in which PEFT's wrappers of experts are nested."""
        ordered, ranks = list(names), {pattern: rank for rank, pattern in enumerate(self.parts)}
        siblings: dict[str, list[int]] = {}
        for index, name in enumerate(ordered):
            if _pattern(name)[0] in ranks:
                siblings.setdefault(name.rpartition(".")[0], []).append(index)
        for places in siblings.values():
            sorted_names = sorted(
                (ordered[index] for index in places), key=lambda name: ranks[_pattern(name)[0]]
            )
            for index, name in zip(places, sorted_names, strict=True):
                ordered[index] = name
        return ordered

    def module_at(self, place: str) -> tuple[str, Part] | None:
        """The module of transformers that is, or has a share, at a place in mlx-lm; None where it takes no adapter."""
        pattern, numbers = _pattern(place)
        for name, parts in self.parts.items():
            for part in parts:
                if part.place == pattern:
                    return _fill(name, numbers), _numbered(part, numbers)
        if pattern in self.closed or pattern in self.parts:
            return None
        return place, Part(place)


def _pattern(name: str) -> tuple[str, list[str]]:
    return _NUMBER.sub("*", name), _NUMBER.findall(name)


def _fill(pattern: str, numbers: list[str]) -> str:
    left: Iterator[str] = iter(numbers)
    return re.sub(r"\*", lambda _: next(left, "*"), pattern)


def _numbered(part: Part, numbers: list[str]) -> Part:
    return Part(_fill(part.place, numbers), part.index, part.of, part.interleaved, part.turned, part.heads)


@cache
def _content() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(FILE.read_text("utf-8"))
    return content


def proven_with() -> Mapping[str, str]:
    """The versions of the libraries that the proof was made with."""
    versions: Mapping[str, str] = _content()["versions"]
    return versions


def proven_types() -> tuple[str, ...]:
    """The model types that MLX opens, by name."""
    return tuple(_content()["types"])


def left_out() -> Mapping[str, str]:
    """The model types that both libraries know and MLX does not open, with the reason."""
    reasons: Mapping[str, str] = _content()["left_out"]
    return reasons


@cache
def proven_type(model_type: str) -> ProvenType | None:
    """What was proven of a type, None for one without proof."""
    row = _content()["types"].get(model_type)
    if row is None:
        return None
    parts = {
        name: tuple(Part(**part) if isinstance(part, dict) else Part(part) for part in each)
        for name, each in row.get("parts", {}).items()
    }
    return ProvenType(
        model_type,
        frozenset(row["reads"]),
        row["values"],
        tuple(row["ropes"]),
        parts,
        tuple(row.get("closed", ())),
        frozenset(row.get("by_weight", ())),
        cached=row["cached"],
        scores=row["scores"],
        windows=row["windows"],
        scaled=row.get("scaled", False),
    )
