"""mlx-lm's adapter folder: one rank and scale, factors transposed, its module names, and stretched positions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import evolve, frozen

from soup_xb.core.adapter.foreign_settings import check_number, damaged, read_settings
from soup_xb.core.adapter.peft_file import MLX_LM_WEIGHTS, Factors, SavedAdapter, adapter_modules
from soup_xb.core.adapter.plan import AdapterPlan
from soup_xb.core.adapter.readers import universal_form
from soup_xb.core.adapter.tensors import read_tensors
from soup_xb.core.base.modules import AdapterModule
from soup_xb.core.base.proven import Part, proven_type
from soup_xb.core.base.rope import RopeScaling
from soup_xb.core.errors import ModelError, Problem

WEIGHTS = MLX_LM_WEIGHTS
SETTINGS = "adapter_config.json"
_EMBEDDINGS = (
    "embed_tokens",
    "wte",
    "embed_in",
    "word_embeddings",
    "embeddings",
    "embedding",
    "tok_embeddings",
)
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


def to_mlx_lm(saved: SavedAdapter, folder: Path, base: str, model_type: str) -> MlxLmAdapter:
    """A saved adapter (read from `folder`) in mlx-lm's form.

    Ranks are padded with zeros to the largest; B takes what its own scale has over the common one. The keys
    are whole module names, so that mlx-lm adapts these modules and no other. A module whose rows are in several of
    mlx-lm's gives each of them its A. `base` is the base's name, `model_type` its type, empty where it is not known.
    Raises ModelError for modules that mlx-lm has no counterpart of.
    """
    modules = adapter_modules(saved, folder)
    saved_plan = AdapterPlan(modules, 0.0, "random", use_rslora=False, seed=0)
    form = universal_form(saved_plan, saved.factors)
    rank, scale = form.plan.modules[0].rank, form.plan.modules[0].scale
    tensors: dict[str, Array] = {}
    for module in modules:
        for part in _places(module, model_type, folder):
            tensors |= _for_part(part, form.factors[module.name], bool(module.experts))
    settings = {
        "fine_tune_type": "dora" if saved.settings.get("use_dora") else "lora",
        "model": base,
        # Whole names are found from the model's root; no block is searched by short names.
        "num_layers": 0,
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": 0.0,
            "keys": list(dict.fromkeys(name.rpartition(".")[0] for name in tensors)),
        },
    }
    return MlxLmAdapter(tensors, settings)


def _for_part(part: Part, arrays: Mapping[str, Array], experts: bool) -> dict[str, Array]:
    """The factors of one of mlx-lm's modules; its LoRA layers keep those of experts as PEFT does, others turned."""
    a, b = arrays["lora_A"], arrays["lora_B"]
    if experts and part.turned:
        # PEFT takes the outputs for the inputs.
        a, b = b.swapaxes(-1, -2), a.swapaxes(-1, -2)
    b = b[..., _rows(part, b.shape[-2]), :]
    told = {"lora_a": a, "lora_b": b} if experts else {"lora_a": a.T, "lora_b": b.T}
    if "lora_magnitude_vector" in arrays:
        told["m"] = arrays["lora_magnitude_vector"][_rows(part, len(arrays["lora_magnitude_vector"]))]
    return {f"{part.place}.{leaf}": array for leaf, array in told.items()}


def _rows(part: Part, rows: int) -> slice:
    """Which of a module's rows are at one of its places."""
    if part.interleaved:
        return slice(part.index, None, part.of)
    count = rows // part.of
    return slice(part.index * count, (part.index + 1) * count)


def _places(module: AdapterModule, model_type: str, folder: Path) -> tuple[Part, ...]:
    """Where mlx-lm has a module. Raises ModelError where it has no layer that takes an adapter for it."""
    _check_name(module.name, model_type, folder)
    proven = proven_type(model_type)
    if proven is None:
        return (Part(module.name),)
    parts = proven.parts_of(module.name)
    if not parts or any(part.heads for part in parts) or proven.scaled:
        raise _no_counterpart(
            f"`{module.name}` of `{model_type}` is another layer in mlx-lm than in transformers", folder
        )
    return parts


def write_mlx_lm(folder: Path, adapter: MlxLmAdapter) -> None:
    """Write what `mlx_lm.generate --adapter-path` reads."""
    from safetensors.numpy import save_file

    save_file(
        {name: np.ascontiguousarray(array) for name, array in adapter.tensors.items()}, folder / WEIGHTS
    )
    text = json.dumps(adapter.settings, indent=2, sort_keys=True) + "\n"
    (folder / SETTINGS).write_text(text, "utf-8")


def mlx_lm_base(folder: Path) -> str:
    """The base that an adapter of mlx-lm names in its settings, empty where it names none."""
    named = _read_settings(folder / SETTINGS).get("model")
    return named if isinstance(named, str) else ""


def read_mlx_lm(folder: Path, model_type: str) -> tuple[AdapterPlan, Factors]:
    """An adapter that mlx-lm wrote, as modules and factors in PEFT's shapes and transformers' names.

    `model_type` is the base's, empty where it is not known. Raises ModelError for a folder that is damaged or holds
    fully trained weights and no adapter, and for modules that transformers has no counterpart of.
    """
    settings, tensors = _read_settings(folder / SETTINGS), read_tensors(folder / WEIGHTS)[0]
    parameters = settings.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    scale = check_number(scale, "`lora_parameters.scale`", folder / SETTINGS)
    if not tensors:
        raise damaged(folder / WEIGHTS, "holds no factors")
    layers: dict[str, dict[str, Array]] = {}
    for key, array in tensors.items():
        name, _, leaf = key.rpartition(".")
        ours = dict(_FACTORS).get(leaf)
        if ours is None:
            raise damaged(folder / WEIGHTS, f"`{key}` is not a factor of a linear layer")
        layers.setdefault(name, {})[ours] = array if array.ndim != 2 else array.T
    factors = _modules_of(layers, model_type, folder)
    dora = settings.get("fine_tune_type") == "dora"
    modules = (_module(name, arrays, float(scale), folder) for name, arrays in factors.items())
    modules = (evolve(module, dora=dora) for module in modules)
    return AdapterPlan(tuple(modules), 0.0, "random", use_rslora=False, seed=0), factors


def _modules_of(
    layers: Mapping[str, Mapping[str, Array]], model_type: str, folder: Path
) -> dict[str, dict[str, Array]]:
    """Factors by transformers' names, of layers by mlx-lm's."""
    proven = proven_type(model_type)
    found: dict[str, dict[str, tuple[Part, Mapping[str, Array]]]] = {}
    for place, arrays in layers.items():
        _check_name(place, model_type, folder)
        at = proven.module_at(place) if proven is not None else (place, Part(place))
        scaled = proven is not None and proven.scaled
        experts = any(array.ndim == 3 for array in arrays.values())
        unknown = at is None or (experts and (proven is None or not proven.is_moved(at[0])))
        if at is None or unknown or scaled or at[1].heads:
            raise _no_counterpart(
                f"`{place}` of `{model_type}` is another layer in transformers than in mlx-lm", folder
            )
        found.setdefault(at[0], {})[place] = (at[1], arrays)
    names = list(found) if proven is None else proven.ordered(found)
    return {name: _joined(list(found[name].values()), folder) for name in names}


def _joined(parts: Sequence[tuple[Part, Mapping[str, Array]]], folder: Path) -> dict[str, Array]:
    """One module's factors of those of its parts, which share an A where these are equal.

    Otherwise A and B are blocks, and the rank is the sum of theirs: [A1; A2], and B with the rows of each part in
    columns of its own.
    """
    part, arrays = parts[0]
    if any("lora_A" not in own or "lora_B" not in own for _, own in parts):
        raise damaged(folder / WEIGHTS, f"`{part.place}` has only one of its factors")
    if part.of == 1 and not (part.turned and arrays["lora_A"].ndim == 3):
        return dict(arrays)
    turned = part.turned and arrays["lora_A"].ndim == 3
    first = arrays["lora_A"]
    alike = all(
        own["lora_A"].shape == first.shape and np.array_equal(own["lora_A"], first) for _, own in parts
    )
    ranks = [own["lora_A"].shape[-2] for _, own in parts]
    rows = arrays["lora_B"].shape[-2] * part.of
    a = first if alike else np.concatenate([own["lora_A"] for _, own in parts], axis=-2)
    b = np.zeros((*first.shape[:-2], rows, a.shape[-2]), np.float32)
    start = 0
    for (each, own), rank in zip(parts, ranks, strict=True):
        columns = slice(0, rank) if alike else slice(start, start + rank)
        b[..., _rows(each, rows), columns] = own["lora_B"]
        start += rank
    if turned:
        a, b = b.swapaxes(-1, -2), a.swapaxes(-1, -2)
    joined = {"lora_A": a, "lora_B": b}
    if "lora_magnitude_vector" in arrays:
        magnitudes = np.zeros(rows, np.float32)
        for each, own in parts:
            magnitudes[_rows(each, rows)] = own["lora_magnitude_vector"]
        joined["lora_magnitude_vector"] = magnitudes
    return joined


def _check_name(name: str, model_type: str, folder: Path) -> None:
    """Raise ModelError for an embedding, and for a type of which nobody knows where its modules are in the other."""
    if name.rpartition(".")[2] in _EMBEDDINGS:
        raise _no_counterpart(f"`{name}` is an embedding", folder)
    if model_type and proven_type(model_type) is None:
        raise _no_counterpart(
            f"the modules of `{model_type}` have other names in mlx-lm than in transformers", folder
        )


def _no_counterpart(message: str, folder: Path) -> ModelError:
    return ModelError(
        "no-counterpart",
        message,
        where=str(folder),
        help="train without these modules in `target_modules`, or fold the adapter into its base (`soupx merge`, or "
        "`mlx_lm.fuse` for one of mlx-lm's) and use the whole model.",
    )


def _module(name: str, arrays: Mapping[str, Array], scale: float, folder: Path) -> AdapterModule:
    a, b = arrays.get("lora_A"), arrays.get("lora_B")
    if (
        a is None
        or b is None
        or a.ndim not in (2, 3)
        or b.ndim != a.ndim
        or a.shape[-2] != b.shape[-1]
        or not a.size * b.size
    ):
        raise damaged(folder / WEIGHTS, f"the factors of `{name}` do not belong together")
    rank = int(a.shape[-2])
    experts = len(a) if a.ndim == 3 else 0
    return AdapterModule(name, int(b.shape[-2]), int(a.shape[-1]), rank, scale * rank, scale, experts=experts)


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


def tokenizer_readme(load: str, base: str, end_ids: Sequence[int], new_template: bool) -> str:
    """What README.md says of the tokenizer beside an exported adapter; `load` is the code that loads both models."""
    code = [
        "from pathlib import Path",
        "",
        "import mlx_lm",
        "from mlx_lm.tokenizer_utils import load as load_tokenizer",
        "",
        f"model, _ = {load}",
        f'tokenizer = load_tokenizer(Path("."), eos_token_ids={list(end_ids)})',
        'prompt = tokenizer.apply_chat_template([{"role": "user", "content": "…"}], add_generation_prompt=True)',
        "print(mlx_lm.generate(model, tokenizer, prompt))",
    ]
    text = (
        "The tokenizer in this folder has the chat template and the end tokens of the training. With `adapter_path` "
        "mlx-lm reads the base's, so load this one too:\n\n```python\n" + "\n".join(code) + "\n```\n"
    )
    if new_template:
        return text
    ends = " ".join(map(str, end_ids))
    command = f"mlx_lm.generate --model {base} --adapter-path . --extra-eos-token {ends} --prompt …"
    return f"{text}\nOn the command line:\n\n```bash\n{command}\n```\n"


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
