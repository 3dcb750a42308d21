"""mlx-lm's adapter folder: one rank and one scale for all modules, factors transposed, and stretched positions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from attrs import evolve, frozen

from soup_xb.core.adapter.foreign_settings import check_number, damaged, read_settings
from soup_xb.core.adapter.peft_file import Factors, SavedAdapter, adapter_modules
from soup_xb.core.adapter.plan import AdapterPlan
from soup_xb.core.base.modules import AdapterModule
from soup_xb.core.base.rope import RopeScaling
from soup_xb.core.errors import ModelError, Problem

WEIGHTS = "adapters.safetensors"
SETTINGS = "adapter_config.json"
# mlx-lm's name of a factor, ours, in that order; A and B are transposed, the magnitude is not.
_FACTORS = (("lora_a", "lora_A"), ("lora_b", "lora_B"), ("m", "lora_magnitude_vector"))

Array = np.ndarray[Any, Any]


@frozen(eq=False)
class MlxLmAdapter:
    """An adapter in mlx-lm's form: `tensors` by mlx-lm's names, `settings` for adapter_config.json."""

    tensors: Mapping[str, Array]
    settings: Mapping[str, Any]


def is_mlx_lm_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter as `mlx_lm.lora` writes it."""
    return (folder / WEIGHTS).is_file()


def to_mlx_lm(saved: SavedAdapter, folder: Path) -> MlxLmAdapter:
    """A saved adapter (read from `folder`) in mlx-lm's form.

    Ranks are padded with zeros to the largest; B takes what its own scale has over the common one. The keys
    are whole module names, so that mlx-lm adapts these modules and no other. Raises ModelError for factors of experts.
    """
    modules = adapter_modules(saved, folder)
    experts = [module.name for module in modules if module.experts]
    if experts:
        raise ModelError(
            "experts-not-exported",
            f"`{experts[0]}` and {len(experts) - 1} more adapted weights are 3-D stacks of experts, which mlx-lm keeps "
            "in other modules",
            where=str(folder),
            help="write the whole model with `soupx merge`, and convert that with `mlx_lm.convert`.",
        )
    rank = max(module.rank for module in modules)
    scale = modules[0].scale
    tensors: dict[str, Array] = {}
    for module in modules:
        arrays = saved.factors[module.name]
        a, b = (
            np.zeros((module.in_features, rank), np.float32),
            np.zeros((rank, module.out_features), np.float32),
        )
        a[:, : module.rank] = arrays["lora_A"].T
        b[: module.rank] = arrays["lora_B"].T * np.float32(module.scale / scale)
        tensors |= {f"{module.name}.lora_a": a, f"{module.name}.lora_b": b}
        if "lora_magnitude_vector" in arrays:
            tensors[f"{module.name}.m"] = arrays["lora_magnitude_vector"]
    settings = {
        "fine_tune_type": "dora" if saved.settings.get("use_dora") else "lora",
        "model": saved.settings.get("base_model_name_or_path"),
        # Whole names are found from the model's root; no block is searched by short names.
        "num_layers": 0,
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": 0.0,
            "keys": [module.name for module in modules],
        },
    }
    return MlxLmAdapter(tensors, settings)


def write_mlx_lm(folder: Path, adapter: MlxLmAdapter) -> None:
    """Write what `mlx_lm.generate --adapter-path` reads."""
    from safetensors.numpy import save_file

    save_file(
        {name: np.ascontiguousarray(array) for name, array in adapter.tensors.items()}, folder / WEIGHTS
    )
    text = json.dumps(adapter.settings, indent=2, sort_keys=True) + "\n"
    (folder / SETTINGS).write_text(text, "utf-8")


def read_mlx_lm(folder: Path) -> tuple[AdapterPlan, Factors]:
    """An adapter that mlx-lm wrote, as modules and factors in PEFT's shapes.

    Raises ModelError for a folder that is damaged or holds fully trained weights and no adapter.
    """
    settings, tensors = _read_settings(folder / SETTINGS), _read_tensors(folder / WEIGHTS)
    parameters = settings.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    scale = check_number(scale, "`lora_parameters.scale`", folder / SETTINGS)
    if not tensors:
        raise damaged(folder / WEIGHTS, "holds no factors")
    factors: dict[str, dict[str, Array]] = {}
    for key, array in tensors.items():
        name, _, leaf = key.rpartition(".")
        ours = dict(_FACTORS).get(leaf)
        if ours is None:
            raise damaged(folder / WEIGHTS, f"`{key}` is not a factor of a linear layer")
        factors.setdefault(name, {})[ours] = (
            array.astype(np.float32) if leaf == "m" else array.T.astype(np.float32)
        )
    dora = settings.get("fine_tune_type") == "dora"
    modules = (_module(name, arrays, float(scale), folder) for name, arrays in factors.items())
    modules = (evolve(module, dora=dora) for module in modules)
    return AdapterPlan(tuple(modules), 0.0, "random", use_rslora=False, seed=0), factors


def _module(name: str, arrays: Mapping[str, Array], scale: float, folder: Path) -> AdapterModule:
    a, b = arrays.get("lora_A"), arrays.get("lora_B")
    if (
        a is None
        or b is None
        or a.ndim != 2
        or b.ndim != 2
        or a.shape[0] != b.shape[1]
        or not a.size * b.size
    ):
        raise damaged(folder / WEIGHTS, f"the factors of `{name}` do not belong together")
    rank = int(a.shape[0])
    return AdapterModule(name, int(b.shape[0]), int(a.shape[1]), rank, scale * rank, scale)


def _read_settings(file: Path) -> dict[str, Any]:
    settings = read_settings(file)
    if settings.get("fine_tune_type", "lora") not in ("lora", "dora"):
        raise ModelError(
            "foreign-adapter",
            f"`fine_tune_type: {settings['fine_tune_type']}` is no adapter",
            where=str(file),
            help="whole trained weights are a model of their own; use them as a base.",
        )
    return settings


def _read_tensors(file: Path) -> dict[str, Array]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors: dict[str, Array] = load_file(file)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(file, f"cannot be read: {error}") from error
    return tensors


@frozen
class StretchedBase:
    """A base by its name, with the `scaling` of its positions. `longest` is its own `max_position_embeddings`."""

    name: str
    scaling: RopeScaling
    longest: int

    @property
    def settings(self) -> Mapping[str, Any]:
        """mlx-lm's `rope_scaling`."""
        told = {"rope_type": self.scaling.kind, **self.scaling.described()}
        if self.scaling.kind == "yarn":
            # Where it is not told, mlx-lm takes 4096.
            told["original_max_position_embeddings"] = self.scaling.original or self.longest
        return {"type": self.scaling.kind, **told}

    def code(self, adapter: str) -> str:
        """How mlx-lm loads base and adapter."""
        asked = json.dumps({"rope_scaling": dict(self.settings)})
        return (
            f"mlx_lm.load({json.dumps(self.name)}, adapter_path={json.dumps(adapter)}, model_config={asked})"
        )

    def notice(self, adapter: Path) -> Problem:
        """What the user should know of the exported adapter."""
        return Problem(
            "stretched-base",
            "the adapter belongs to the base with `training.rope_scaling`, which no command of mlx-lm asks for: load "
            f"both with `{self.code(str(adapter))}` (its README says so too), or write one model with `soupx merge`",
        )

    def readme(self) -> str:
        """The README.md beside the exported adapter."""
        return (
            "The positions of the base were stretched for the training: this adapter is for the base with the same "
            "setting. `mlx_lm.generate --adapter-path` does not apply it, and the adapter then says something else.\n\n"
            f"```python\nimport mlx_lm\n\nmodel, tokenizer = {self.code('.')}\n```\n"
        )


def check_exportable(scaling: RopeScaling, folder: Path) -> None:
    """Raise ModelError for positions that mlx-lm stretches in another way than transformers."""
    if scaling.kind == "dynamic":
        raise ModelError(
            "rope-not-exported",
            "the adapter belongs to a base with `rope_scaling: dynamic`, which mlx-lm computes otherwise than "
            "transformers",
            where=str(folder),
            help="use it with PEFT, or train with `yarn` or `linear`, which both libraries compute alike.",
        )
