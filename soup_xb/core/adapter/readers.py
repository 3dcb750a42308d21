"""How programs read a LoRA in PEFT's layout, and the form of it in which all of them add the same.

PEFT gives each module its own rank and alpha by patterns. vLLM before 0.32, SGLang and TensorRT-LLM read one `r`, one
`lora_alpha` and `use_rslora` for all modules. llama.cpp divides the one `lora_alpha` by the rank of each tensor. mlx-lm
has one rank and one scale. The universal form has one rank, padded with zeros, one whole alpha and no rsLoRA: by each
of these rules a module gets alpha / rank, and what is left of its own scale is in its B.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from attrs import evolve, frozen

from soup_xb.core.adapter.plan import AdapterPlan
from soup_xb.core.base.modules import AdapterModule, adapter_scale
from soup_xb.core.errors import Problem

# The key of the header's metadata that holds the ranks and alphas that the adapter was trained with.
NATIVE = "soup_xb"
# A padded file may be that many times as large as the compact one.
LARGEST_GROWTH = 4.0

Array = np.ndarray[Any, Any]
Factors = Mapping[str, Mapping[str, Array]]


@frozen(eq=False)
class SavedForm:
    """An adapter as it is written: its `plan` and `factors`, and the file's `metadata`.

    `rounded` names the modules whose B took a factor that is no power of two: each entry is rounded once more.
    """

    plan: AdapterPlan
    factors: Factors
    metadata: Mapping[str, str]
    rounded: tuple[str, ...] = ()
    is_universal: bool = False


def growth(plan: AdapterPlan) -> float:
    """How many times as large the factors are in the universal form."""
    rank = max(module.rank for module in plan.modules)
    sides = [(module.rank, module.in_features + module.out_features) for module in plan.modules]
    return rank * sum(side for _, side in sides) / sum(own * side for own, side in sides)


def has_universal_form(plan: AdapterPlan) -> bool:
    """Whether the adapter can be written in the universal form: not VeRA's vectors, and not stacks of experts."""
    return not plan.use_vera and not any(module.experts for module in plan.modules)


def compact_form(plan: AdapterPlan, factors: Factors) -> SavedForm:
    """Each module with its own rank and alpha, which patterns in the settings tell."""
    return SavedForm(plan, factors, {})


def universal_form(plan: AdapterPlan, factors: Factors) -> SavedForm:
    """One rank, one whole alpha and no rsLoRA for all modules; `plan` has the ranks that the factors have."""
    rank = max(module.rank for module in plan.modules)
    alpha = _common_alpha(plan, rank)
    scale = alpha / rank
    if all(module.rank == rank and module.scale == scale for module in plan.modules):
        modules = [evolve(module, alpha=alpha) for module in plan.modules]
        plan = evolve(plan, modules=tuple(modules), use_rslora=False)
        return SavedForm(plan, factors, {}, is_universal=True)
    modules = [evolve(module, rank=rank, alpha=alpha, scale=scale) for module in plan.modules]
    written = {
        module.name: {**factors[module.name], **_padded(factors[module.name], rank, module.scale / scale)}
        for module in plan.modules
    }
    native = {"use_rslora": plan.use_rslora, "modules": {m.name: [m.rank, m.alpha] for m in plan.modules}}
    rounded = tuple(m.name for m in plan.modules if not _is_power_of_two(m.scale / scale))
    return SavedForm(
        evolve(plan, modules=tuple(modules), use_rslora=False),
        written,
        {NATIVE: json.dumps(native, separators=(",", ":"))},
        rounded,
        is_universal=True,
    )


def scales_rounded(saved: SavedForm) -> Problem:
    """The notice for an adapter whose scales went into B with a rounding."""
    text = (
        f"{len(saved.rounded)} of {len(saved.plan.modules)} modules have a scale that is no power of two times the "
        f"common one: it went into their B, each entry rounded once more (at most 6e-8 of it), first "
        f"`{saved.rounded[0]}`"
    )
    return Problem("scales-rounded", text)


def _common_alpha(plan: AdapterPlan, rank: int) -> int:
    """The alpha that gives most modules their own scale at that rank, or one near it where none is whole."""
    scales = Counter(module.scale for module in plan.modules)
    fitting = [(-count, scale) for scale, count in scales.items() if (scale * rank).is_integer()]
    scale = min(fitting)[1] if fitting else scales.most_common(1)[0][0]
    return max(1, round(scale * rank))


def _padded(arrays: Mapping[str, Array], rank: int, factor: float) -> dict[str, Array]:
    a, b = arrays["lora_A"], arrays["lora_B"]
    more, experts = rank - a.shape[-2], [(0, 0)] * (a.ndim - 2)
    return {
        "lora_A": np.pad(a, [*experts, (0, more), (0, 0)]),
        "lora_B": np.pad(_times(b, factor), [*experts, (0, 0), (0, more)]),
    }


def _times(array: Array, factor: float) -> Array:
    """The product, rounded once."""
    return array if factor == 1.0 else (array.astype(np.float64) * factor).astype(np.float32)


def _is_power_of_two(value: float) -> bool:
    return math.frexp(value)[0] == 0.5


@frozen
class NativeRanks:
    """What the header's metadata says: rank and alpha of each module as they were trained."""

    use_rslora: bool
    modules: Mapping[str, tuple[int, float]]

    def scale(self, name: str) -> float:
        """The scale of a module."""
        rank, alpha = self.modules[name]
        return adapter_scale(alpha, rank, self.use_rslora)


def read_native(metadata: Mapping[str, str]) -> NativeRanks | None:
    """The ranks and alphas in a header, None where there are none. Raises ValueError for what was never written."""
    written = metadata.get(NATIVE)
    if written is None:
        return None
    try:
        found = json.loads(written)
        modules = {str(name): (rank, alpha) for name, (rank, alpha) in found["modules"].items()}
        use_rslora = found["use_rslora"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"`{NATIVE}` in its header cannot be read: {error}") from error
    for name, (rank, alpha) in modules.items():
        if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not 0 < alpha < 1e9:
            raise ValueError(
                f"`{NATIVE}` in its header gives `{name}` a rank or alpha that was never written"
            )
    return NativeRanks(use_rslora is True, modules)


def native_factors(
    factors: Factors, native: NativeRanks, scales: Mapping[str, float]
) -> dict[str, dict[str, Array]] | None:
    """The factors without their padding and with their own scales; `scales` are those of the file.

    None where the header does not belong to the factors: another program trained them on, padding and all.
    """
    if factors.keys() != native.modules.keys():
        return None
    found = {}
    for name, arrays in factors.items():
        a, b, rank = arrays["lora_A"], arrays["lora_B"], native.modules[name][0]
        if a.ndim != 2 or rank > len(a) or a[rank:].any() or b[:, rank:].any():
            return None
        own = _times(b[:, :rank], scales[name] / native.scale(name))
        found[name] = {**arrays, "lora_A": a[:rank].copy(), "lora_B": np.ascontiguousarray(own)}
    return found


@frozen
class Misread:
    """Programs that do not read a saved adapter as what it is, and why."""

    readers: tuple[str, ...]
    because: str

    def __str__(self) -> str:
        return f"{', '.join(self.readers)}: {self.because}"


_ONE_RANK = ("vLLM before 0.32", "SGLang", "TensorRT-LLM")


def misreadings(
    settings: Mapping[str, Any], modules: Sequence[AdapterModule], tied_head: bool = False
) -> tuple[Misread, ...]:
    """The programs that a saved adapter is not for, from its settings and its modules.

    `tied_head`: the base's output head has no weight of its own, but the embedding's.
    """
    if settings.get("peft_type") == "VERA":
        return (
            Misread(("vLLM", "SGLang", "llama.cpp", "mlx-lm"), "they do not read VeRA's format"),
            Misread(("PEFT before 0.21",), "they draw the shared projections anew and compute another model"),
        )
    found = []
    if any(module.dora for module in modules):
        found.append(Misread(("vLLM", "SGLang", "llama.cpp"), "they refuse DoRA's magnitudes"))
    if any(module.experts for module in modules):
        found.append(
            Misread(("vLLM", "SGLang", "llama.cpp", "mlx-lm"), "they keep experts in other modules than PEFT")
        )
    elif tied_head and any(is_head(module.name) for module in modules):
        found.append(
            Misread(("llama.cpp", "mlx-lm"), "the base's head is its embedding, and they adapt no such head")
        )
    if not any(module.experts for module in modules) and not is_universal(settings, modules):
        readers: tuple[str, ...] = _ONE_RANK
        if any(not _same(tensor_rank_scale(settings, module), module.scale) for module in modules):
            readers = (*_ONE_RANK, "llama.cpp")
        found.append(Misread(readers, "they read one rank and one alpha for all modules"))
    return tuple(found)


def is_head(name: str) -> bool:
    """Whether a module is the output head, by the names that model types give it."""
    return name.rpartition(".")[2] in ("lm_head", "embed_out", "output")


def misread_by(misread: Sequence[Misread], reader: str) -> bool:
    """Whether no version of the program reads the adapter as what it is."""
    return any(reader in one.readers for one in misread)


def is_universal(settings: Mapping[str, Any], modules: Sequence[AdapterModule]) -> bool:
    """Whether each rule gives each module its own scale."""
    return all(
        module.rank == settings.get("r")
        and _same(one_rank_scale(settings), module.scale)
        and _same(tensor_rank_scale(settings, module), module.scale)
        for module in modules
    )


def one_rank_scale(settings: Mapping[str, Any]) -> float:
    """The scale of every module in vLLM before 0.32, SGLang and TensorRT-LLM."""
    return adapter_scale(
        settings.get("lora_alpha", 8), settings.get("r", 8), settings.get("use_rslora") is True
    )


def tensor_rank_scale(settings: Mapping[str, Any], module: AdapterModule) -> float:
    """The scale of a module in llama.cpp, which knows no rsLoRA."""
    return float(settings.get("lora_alpha", 8)) / module.rank


def _same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-9)
