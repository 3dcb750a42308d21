"""A saved adapter in PEFT's layout, written and read: `adapter_config.json` and its factors, those of experts too."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import evolve, frozen

from soup_xb.core.adapter.foreign_settings import check_keys, check_peft_settings, damaged, read_settings
from soup_xb.core.adapter.pieces import saved_plan
from soup_xb.core.adapter.plan import AdapterPlan, adapter_settings, pattern_values, short_names
from soup_xb.core.adapter.readers import (
    LARGEST_GROWTH,
    NativeRanks,
    SavedForm,
    compact_form,
    growth,
    has_universal_form,
    native_factors,
    read_native,
    universal_form,
)
from soup_xb.core.adapter.tensors import read_tensors, write_tensors
from soup_xb.core.adapter.vera import (
    check_vera,
    plain_factors,
    plain_settings,
    split_vera_key,
    vera_key,
    vera_settings,
)
from soup_xb.core.base.modules import AdapterModule, Module, adapter_scale
from soup_xb.core.errors import ConfigError, ModelError

WEIGHTS = "adapter_model.safetensors"
SETTINGS = "adapter_config.json"
PREFIX = "base_model.model."
# What tells a folder that mlx-lm wrote, whose settings file has the same name.
MLX_LM_WEIGHTS = "adapters.safetensors"
MLX_LM_KEYS = frozenset({"lora_parameters", "fine_tune_type"})
# The scalar head of a reward model, by transformers' name for it.
HEAD = "score"
HEAD_KEY = f"{PREFIX}{HEAD}.weight"

Array = np.ndarray[Any, Any]
Factors = Mapping[str, Mapping[str, Array]]


@frozen(eq=False)
class SavedAdapter:
    """An adapter read from a folder: `factors` by module name, and the settings file as it is.

    `head` is that of a reward model, float32 (1, hidden size). With `native` the factors have the ranks and scales that
    they were trained with, which the settings file does not tell.
    """

    factors: Factors
    settings: Mapping[str, Any]
    head: Array | None = None
    native: NativeRanks | None = None

    @property
    def is_vera(self) -> bool:
        """Whether the factors are VeRA's (see core.adapter.vera) and not a plain LoRA."""
        return bool(self.settings["peft_type"] == "VERA")

    def plain(self, modules: Sequence[Module | AdapterModule], folder: Path) -> SavedAdapter:
        """The same adapter as a plain LoRA; `modules` tell the sides of VeRA's modules, which its file does not.

        Raises ModelError where they do not fit the adapter in `folder`.
        """
        if not self.is_vera:
            return self
        settings = plain_settings(self.settings, self.factors, modules)
        return SavedAdapter(plain_factors(self.factors, modules, folder / WEIGHTS), settings, self.head)


def write_adapter(folder: Path, saved: SavedForm, base: str, names: Sequence[str]) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` as PEFT does.

    `names` are the names of the base's linear modules: `target_modules` is written in its short form (`q_proj`)
    only where that reaches the adapted modules and no other.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plan = saved.plan
    tensors = {
        _key(name, factor): array
        for name, arrays in file_factors(saved.factors, plan.modules).items()
        for factor, array in arrays.items()
    }
    write_tensors(folder / WEIGHTS, tensors, saved.metadata)
    if plan.use_vera:
        settings = vera_settings(plan, base, short_names([adapter.name for adapter in plan.modules], names))
    else:
        settings = adapter_settings(plan, base, names)
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")


def saved_form(plan: AdapterPlan, factors: Factors, form: str = "auto") -> SavedForm:
    """The adapter in the form in which it is written: `universal` (see core.adapter.readers) or `compact`.

    `auto` is the universal one where it is not much larger. Experts and VeRA have the compact one alone.
    """
    if not has_universal_form(plan):
        return compact_form(plan if plan.use_vera else saved_plan(plan, factors), factors)
    native = saved_plan(plan, factors)
    if form == "compact" or (form == "auto" and growth(native) > LARGEST_GROWTH):
        return compact_form(native, factors)
    return universal_form(native, factors)


def read_adapter(folder: Path) -> SavedAdapter:
    """Read an adapter in PEFT's layout, with the ranks and scales that it was trained with.

    Raises ModelError naming the file and what is wrong with it.
    """
    saved, metadata = _read_file(folder)
    try:
        native = None if saved.is_vera else read_native(metadata)
    except ValueError as error:
        raise damaged(folder / WEIGHTS, str(error)) from error
    if native is None:
        return saved
    scales = {module.name: module.scale for module in adapter_modules(saved, folder)}
    factors = native_factors(saved.factors, native, scales)
    return saved if factors is None else evolve(saved, factors=factors, native=native)


def read_stored(folder: Path) -> SavedAdapter:
    """Read an adapter as its file has it, padding and all, as other programs do. Raises as `read_adapter`."""
    return _read_file(folder)[0]


def _read_file(folder: Path) -> tuple[SavedAdapter, dict[str, str]]:
    settings = _read_settings(folder)
    if not (folder / WEIGHTS).is_file():
        raise _no_weights(folder)
    tensors, metadata = read_tensors(folder / WEIGHTS)
    if not tensors:
        raise damaged(folder / WEIGHTS, "holds no factors")
    head = _read_head(tensors, folder / WEIGHTS)
    check_keys(tensors, folder / WEIGHTS)
    factors: dict[str, dict[str, Array]] = {}
    for key, array in tensors.items():
        name, factor = _split_key(key, settings["peft_type"], folder / WEIGHTS)
        factors.setdefault(name, {})[factor] = array
    for name, arrays in factors.items():
        for factor, array in arrays.items():
            if not np.isfinite(array).all():
                raise ModelError(
                    "non-finite-adapter",
                    f"`{name or 'the model'}` has values in {factor} that are not finite",
                    where=str(folder / WEIGHTS),
                    help="the adapter is broken; use an earlier checkpoint.",
                )
    if settings["peft_type"] == "VERA":
        check_vera(factors, folder / WEIGHTS)
        return SavedAdapter(factors, settings, head), metadata
    try:
        return SavedAdapter(named_factors(factors, settings), settings, head), metadata
    except ValueError as error:
        raise damaged(folder / WEIGHTS, str(error)) from error
    except ConfigError as error:
        raise damaged(folder / SETTINGS, error.problems[0].message) from error


def _read_head(tensors: dict[str, Array], file: Path) -> Array | None:
    """Take a reward model's head out of the tensors. Raises ModelError for one that is no head."""
    head = tensors.pop(HEAD_KEY, None)
    if head is None:
        return None
    if head.ndim != 2 or len(head) != 1 or not head.size or not np.isfinite(head).all():
        raise damaged(file, f"`{HEAD}` must be one row of finite numbers, and is {tuple(head.shape)}")
    return head.astype(np.float32)


def adapter_folder(path: Path) -> Path:
    """The folder that holds the adapter: the one named, or `adapter/` in a run's output folder."""
    return path if (path / SETTINGS).is_file() or not (path / "adapter").is_dir() else path / "adapter"


def fit_factors(saved: SavedAdapter, plan: AdapterPlan, folder: Path) -> dict[str, dict[str, Array]]:
    """The saved factors for a run with its own scales: B takes the ratio, so that scale * B A stays the same.

    A VeRA adapter goes on as such with `use_vera`, else as the plain LoRA that it equals. Names and shapes are checked
    where the factors are set. Raises ModelError for a plain LoRA where the run trains VeRA.
    """
    if plan.use_vera and not saved.is_vera:
        raise ModelError(
            "adapter-is-lora",
            "the adapter is a plain LoRA, whose factors VeRA's two vectors a module cannot hold",
            where=str(folder),
            help="remove `training.lora.use_vera`, or name a VeRA adapter.",
        )
    if plan.use_vera:
        return {name: dict(arrays) for name, arrays in saved.factors.items()}
    saved = saved.plain(plan.modules, folder)
    scales = {module.name: module.scale for module in adapter_modules(saved, folder)}
    fitted = {name: dict(arrays) for name, arrays in saved.factors.items()}
    for adapter in plan.modules:
        if adapter.name in fitted and scales[adapter.name] != adapter.scale:
            fitted[adapter.name]["lora_B"] = fitted[adapter.name]["lora_B"] * np.float32(
                scales[adapter.name] / adapter.scale
            )
    return fitted


def adapter_modules(saved: SavedAdapter, folder: Path) -> tuple[AdapterModule, ...]:
    """The modules of a saved adapter with their ranks and scales, from its shapes and settings.

    Raises ModelError for factors that do not belong together, and for a pattern that is none or runs away.
    """
    native = saved.native
    alphas = {} if native else saved.settings.get("alpha_pattern") or {}
    rslora = native.use_rslora if native else saved.settings.get("use_rslora") is True
    dora = saved.settings.get("use_dora") is True
    by_weight = by_weight_names(saved.factors, saved.settings)
    names = [f"{name}.weight" if name in by_weight else name for name in saved.factors]
    try:
        values = pattern_values(alphas, names)
    except ConfigError as error:
        raise damaged(folder / SETTINGS, error.problems[0].message) from error
    modules = []
    for name, (module, arrays) in zip(names, saved.factors.items(), strict=True):
        sizes = _sizes(arrays)
        if sizes is None:
            raise damaged(folder / WEIGHTS, f"the factors of `{module}` do not belong together")
        out, width, rank, experts = sizes
        alpha = native.modules[module][1] if native else values.get(name, saved.settings.get("lora_alpha", 8))
        scale = adapter_scale(alpha, rank, rslora)
        kind = {"by_weight": module in by_weight, "dora": dora}
        modules.append(AdapterModule(module, out, width, rank, alpha, scale, experts, **kind))
    return tuple(modules)


def _sizes(arrays: Mapping[str, Array]) -> tuple[int, int, int, int] | None:
    """Outputs, inputs, rank and experts of a pair of factors; None where they do not belong together."""
    a, b = arrays.get("lora_A"), arrays.get("lora_B")
    if a is None or b is None or a.ndim not in (2, 3) or a.ndim != b.ndim:
        return None
    if a.shape[-2] != b.shape[-1] or a.shape[:-2] != b.shape[:-2] or not a.size or not b.size:
        return None
    return b.shape[-2], a.shape[-1], a.shape[-2], a.shape[0] if a.ndim == 3 else 0


def check_factors(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, Array]) -> None:
    """Compare names and shapes (`module.factor` -> shape). Raises ModelError naming the first that does not fit."""
    odd = sorted(set(expected).symmetric_difference(given))
    if odd:
        whose = "the adapter has no" if odd[0] in expected else "the run has no"
        raise ModelError(
            "adapter-does-not-fit",
            f"{len(odd)} tensors do not fit, first: {whose} `{odd[0]}`",
            help="the adapter belongs to another base or to other target_modules.",
        )
    for name, shape in expected.items():
        if tuple(given[name].shape) != shape:
            raise ModelError(
                "adapter-does-not-fit",
                f"`{name}` is {tuple(given[name].shape)} in the adapter and {shape} in the run",
                help="the adapter has another rank or belongs to another base.",
            )


def _read_settings(folder: Path) -> dict[str, Any]:
    file = folder / SETTINGS
    if not file.is_file():
        raise ModelError(
            "adapter-not-found",
            f"there is no {SETTINGS}",
            where=str(folder),
            help="name a folder that holds adapter_config.json, or a run's output folder.",
        )
    settings = read_settings(file)
    if "peft_type" not in settings and (MLX_LM_KEYS & settings.keys() or (folder / MLX_LM_WEIGHTS).is_file()):
        raise ModelError(
            "mlx-lm-adapter",
            "is an adapter in mlx-lm's form, and one in PEFT's is read here",
            where=str(folder),
            help=f"write it in PEFT's form first: `soupx export {folder} --to peft --output NEW`.",
        )
    if settings.get("peft_type") not in ("LORA", "VERA"):
        raise ModelError("foreign-adapter", "is not a LoRA or VeRA adapter in PEFT's layout", where=str(file))
    check_peft_settings(settings, file)
    return settings


def _no_weights(folder: Path) -> ModelError:
    if (folder / "adapter_model.bin").is_file():
        return ModelError(
            "foreign-weights",
            "`adapter_model.bin` is a pickle, which can run code when it is read",
            where=str(folder),
            help="where you trust its author, load it with PEFT and `save_pretrained` it: that writes safetensors.",
        )
    return damaged(folder, f"there is no {WEIGHTS}")


def _key(name: str, factor: str) -> str:
    if factor.startswith("vera_"):
        return vera_key(name, factor)
    return f"{PREFIX}{name}.{factor}" + ("" if factor == "lora_magnitude_vector" else ".weight")


def _split_key(key: str, kind: str, file: Path) -> tuple[str, str]:
    found = split_vera_key(key) if kind == "VERA" else _split_lora_key(key)
    if found is None:
        raise ModelError(
            "foreign-adapter", f"`{key}` is not a {kind} factor of a linear layer", where=str(file)
        )
    return found


def _split_lora_key(key: str) -> tuple[str, str] | None:
    match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(\.weight)?", key)
    return (match[1], match[2]) if match else None


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
