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
from soup_xb.core.base.rope import RopeScaling
from soup_xb.core.errors import ModelError, Problem

WEIGHTS = MLX_LM_WEIGHTS
SETTINGS = "adapter_config.json"
# Model types whose linear layers have the same names in both libraries, found by comparing their weights.
_SAME_NAMES = frozenset({
    "afmoe", "apertus", "cohere", "cohere2", "deepseek_v2", "dots1", "ernie4_5", "ernie4_5_moe", "exaone4",
    "exaone_moe", "falcon_mamba", "gemma", "gemma2", "gemma3_text", "gemma4_text", "glm", "glm4", "glm4_moe",
    "gpt_bigcode", "gpt_oss", "granite", "helium", "hunyuan_v1_dense", "internlm3", "iquestcoder", "jamba",
    "lfm2", "llama", "llama4", "mamba", "mamba2", "mellum", "mimo_v2_flash", "minicpm3", "ministral3",
    "mistral", "nemotron", "olmo2", "olmo3", "olmoe", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
    "qwen3_next", "recurrent_gemma", "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2",
})  # fmt: skip
# Types with the same names but for these (by their last part): split, renamed or another kind of layer in mlx-lm.
_OTHER_LAYERS = {
    **dict.fromkeys(
        ("deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "mistral4"),
        ("kv_b_proj",),
    ),
    **dict.fromkeys(("granitemoe", "granitemoehybrid"), ("router", "layer")),
    **dict.fromkeys(("mixtral", "minimax_m2", "phimoe"), ("gate", "router")),
    "lfm2_moe": ("w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"),
}
# Types whose language model lies elsewhere: its place in transformers, and in mlx-lm.
_MULTIMODAL = (
    "gemma3", "gemma4", "gemma4_unified", "lfm2_vl", "llava", "mistral3", "pixtral", "qwen2_vl", "qwen2_5_vl",
    "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe",
)  # fmt: skip
_PLACES = {
    **dict.fromkeys(_MULTIMODAL, ("model.language_model.", "language_model.model.")),
    "gemma3n": ("model.", "model.language_model."),
    "llama4_text": ("model.", "language_model.model."),
    "muse_glimmer": ("model.language_model.", "model."),
}
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
    are whole module names, so that mlx-lm adapts these modules and no other. `base` is the base's name,
    `model_type` its type, empty where it is not known. Raises ModelError for factors of experts, and for modules
    that mlx-lm has no counterpart of.
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
    names = {module.name: _mlx_lm_name(module.name, model_type, folder) for module in modules}
    saved_plan = AdapterPlan(modules, 0.0, "random", use_rslora=False, seed=0)
    form = universal_form(saved_plan, saved.factors)
    rank, scale = form.plan.modules[0].rank, form.plan.modules[0].scale
    tensors: dict[str, Array] = {}
    for module in modules:
        arrays, name = form.factors[module.name], names[module.name]
        tensors |= {f"{name}.lora_a": arrays["lora_A"].T, f"{name}.lora_b": arrays["lora_B"].T}
        if "lora_magnitude_vector" in arrays:
            tensors[f"{name}.m"] = arrays["lora_magnitude_vector"]
    settings = {
        "fine_tune_type": "dora" if saved.settings.get("use_dora") else "lora",
        "model": base,
        # Whole names are found from the model's root; no block is searched by short names.
        "num_layers": 0,
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": 0.0,
            "keys": list(names.values()),
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
    factors: dict[str, dict[str, Array]] = {}
    for key, array in tensors.items():
        name, _, leaf = key.rpartition(".")
        ours = dict(_FACTORS).get(leaf)
        if ours is None:
            raise damaged(folder / WEIGHTS, f"`{key}` is not a factor of a linear layer")
        if array.ndim == 3:
            raise _no_counterpart(
                f"`{name}` is a stack of experts, which transformers keeps in other modules", folder
            )
        name = _transformers_name(name, model_type, folder)
        factors.setdefault(name, {})[ours] = array if leaf == "m" else array.T
    dora = settings.get("fine_tune_type") == "dora"
    modules = (_module(name, arrays, float(scale), folder) for name, arrays in factors.items())
    modules = (evolve(module, dora=dora) for module in modules)
    return AdapterPlan(tuple(modules), 0.0, "random", use_rslora=False, seed=0), factors


def _mlx_lm_name(name: str, model_type: str, folder: Path) -> str:
    ours, theirs = _PLACES.get(model_type, ("", ""))
    return _moved(name, (ours, theirs), model_type, folder)


def _transformers_name(name: str, model_type: str, folder: Path) -> str:
    ours, theirs = _PLACES.get(model_type, ("", ""))
    return _moved(name, (theirs, ours), model_type, folder)


def _moved(name: str, places: tuple[str, str], model_type: str, folder: Path) -> str:
    """The name in the other library, where the language model lies at the second of the places."""
    _check_name(name, model_type, folder)
    if not name.startswith(places[0]):
        raise _no_counterpart(f"`{name}` lies outside of `{model_type}`'s language model", folder)
    return places[1] + name.removeprefix(places[0])


def _check_name(name: str, model_type: str, folder: Path) -> None:
    """Raise ModelError for a module that the other library knows under another name, or not as a linear layer."""
    last = name.rpartition(".")[2]
    if last in _EMBEDDINGS:
        raise _no_counterpart(f"`{name}` is an embedding", folder)
    known = {*_SAME_NAMES, *_OTHER_LAYERS, *_PLACES}
    if model_type and model_type not in known:
        raise _no_counterpart(
            f"the modules of `{model_type}` have other names in mlx-lm than in transformers", folder
        )
    if last in _OTHER_LAYERS.get(model_type, ()):
        raise _no_counterpart(
            f"`{name}` of `{model_type}` is another layer in mlx-lm than in transformers", folder
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
