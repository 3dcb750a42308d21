"""Factors of 3-D expert weights in PEFT's file: flat tensors, nested names.

A module that holds several expert weights is wrapped once for each, the first weight innermost: with `gate_up_proj`
and `down_proj` the keys are `experts.base_layer.lora_A.weight` and `experts.lora_A.weight`, and say of neither whose
they are. `target_parameters` does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from soup_xb.core.adapter.adapter_settings import pattern_values
from soup_xb.core.base.modules import AdapterModule

Array = np.ndarray[Any, Any]
Factors = Mapping[str, Mapping[str, Array]]

_NESTED = re.compile(r"(\.base_layer)+$")


def flat_factors(a: Array, b: Array) -> tuple[Array, Array]:
    """A (experts, rank, in) as (experts * rank, in), and B (experts, out, rank) as (out, rank * experts).

    A's rows run over the experts first, B's columns over the rank first: column k belongs to expert k % experts.
    """
    experts, rank, width = a.shape
    return a.reshape(experts * rank, width), b.transpose(1, 2, 0).reshape(b.shape[1], rank * experts)


def stacked_factors(a: Array, b: Array, rank: int) -> tuple[Array, Array]:
    """The way back from `flat_factors`, for a rank that divides the rows of A."""
    experts = a.shape[0] // rank
    return a.reshape(experts, rank, a.shape[1]), b.reshape(b.shape[0], rank, experts).transpose(2, 0, 1)


def nested_paths(names: Sequence[str]) -> dict[str, str]:
    """The path that stands before `.lora_A` for each expert weight; names of one module in the module's own order.

    >>> nested_paths(["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    {'mlp.experts.gate_up_proj': 'mlp.experts.base_layer', 'mlp.experts.down_proj': 'mlp.experts'}
    """
    paths: dict[str, str] = {}
    around: dict[str, int] = {}
    for name in reversed(names):
        module = name.rpartition(".")[0]
        depth = around.get(module, 0)
        paths[name] = module + ".base_layer" * depth
        around[module] = depth + 1
    return {name: paths[name] for name in names}


def weight_names(paths: Iterable[str], settings: Mapping[str, Any]) -> dict[str, str]:
    """The way back: the parameter behind each path, for those that the settings file's `target_parameters` reaches.

    Raises ValueError for a module with more or fewer wrappers than parameters.

    >>> targets = {"target_modules": ["q_proj"], "target_parameters": ["down_proj", "experts.gate_up_proj"]}
    >>> weight_names(["mlp.experts", "mlp.experts.base_layer", "q_proj"], targets)
    {'mlp.experts.base_layer': 'mlp.experts.gate_up_proj', 'mlp.experts': 'mlp.experts.down_proj'}
    """
    targets, linears = _names(settings, "target_parameters"), _names(settings, "target_modules")
    levels: dict[str, list[str]] = {}
    for path in paths:
        levels.setdefault(_NESTED.sub("", path), []).append(path)
    found: dict[str, str] = {}
    for module, nested in levels.items():
        leaves = [] if any(_ends_with(module, linear) for linear in linears) else _leaves(module, targets)
        if nested == [module] and not leaves:
            continue
        nested.sort(key=len, reverse=True)
        if nested != [module + ".base_layer" * depth for depth in reversed(range(len(leaves)))]:
            raise ValueError(
                f"`{module}` has {len(nested)} adapters for {len(leaves)} of `target_parameters`"
            )
        found |= {path: f"{module}.{leaf}" for path, leaf in zip(nested, leaves, strict=True)}
    return found


def file_factors(factors: Factors, modules: Sequence[AdapterModule]) -> dict[str, Mapping[str, Array]]:
    """Factors by the path that stands in the file's keys, those of experts flat; `modules` are in the base's order."""
    paths = nested_paths([adapter.name for adapter in modules if adapter.experts])
    found: dict[str, Mapping[str, Array]] = {}
    for name, arrays in factors.items():
        if name in paths:
            a, b = flat_factors(arrays["lora_A"], arrays["lora_B"])
            found[paths[name]] = {"lora_A": a, "lora_B": b}
        else:
            found[name] = arrays
    return found


def named_factors(factors: Factors, settings: Mapping[str, Any]) -> dict[str, dict[str, Array]]:
    """Factors by module name, those of experts as stacks, out of the factors by path in a file.

    Raises ValueError for factors that the settings do not explain.
    """
    names = weight_names(factors, settings)
    patterns = settings.get("rank_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError("`rank_pattern` must be an object")
    ranks = pattern_values(patterns, list(names.values()))
    found: dict[str, dict[str, Array]] = {}
    for path, arrays in factors.items():
        name = names.get(path, path)
        rank = ranks.get(name, settings.get("r", 8))
        if path not in names or _is_matrix(name, arrays, rank):
            found[path] = dict(arrays)
        else:
            found[name] = _stack(name, arrays, rank)
    return found


def by_weight_names(names: Iterable[str], settings: Mapping[str, Any]) -> set[str]:
    """The linear layers that PEFT reaches by their weight."""
    weights = set(_names(settings, "target_parameters"))
    return {name for name in names if f"{name}.weight" in weights}


def _is_matrix(name: str, arrays: Mapping[str, Array], rank: Any) -> bool:
    """Whether it is a linear layer that PEFT reaches by its weight."""
    return name.endswith(".weight") and len(arrays.get("lora_A", ())) == rank


def _stack(name: str, arrays: Mapping[str, Array], rank: Any) -> dict[str, Array]:
    a, b = arrays.get("lora_A"), arrays.get("lora_B")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"the rank of `{name}` must be a positive integer, got {rank!r}")
    if a is None or b is None or a.ndim != 2 or b.ndim != 2 or len(a) % rank or a.shape[0] != b.shape[1]:
        raise ValueError(f"the factors of `{name}` are no stacks of rank {rank}")
    a, b = stacked_factors(a, b, rank)
    return {"lora_A": a, "lora_B": np.ascontiguousarray(b)}


def _leaves(module: str, targets: Sequence[str]) -> list[str]:
    """The parameters of a module that PEFT adapts, in the order in which the module has them.

    A list from PEFT is in no order. Every module of transformers that holds experts has the projection down last,
    and gate before up.
    """
    split = (target.rpartition(".") for target in targets)
    reached = {leaf for path, _, leaf in split if not path or _ends_with(module, path)}
    return sorted(reached, key=lambda leaf: (leaf.startswith("down"), leaf))


def _ends_with(module: str, path: str) -> bool:
    return module == path or module.endswith(f".{path}")


def _names(settings: Mapping[str, Any], key: str) -> list[str]:
    names = settings.get(key) or []
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
