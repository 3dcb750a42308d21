"""Which model types MLX computes as transformers does, by numbers: writes soup_xb/core/base/proven.json.

    make prove-families
    python tests/families/prove.py --only qwen3_moe gpt_oss

Each type's tiny random model is saved by transformers and opened by both backends. Compared are logits of rows of 40
and 200 tokens, beyond every window, and the gradients of all weights, at weights three and eight times as large as new
ones, with the float noise floor: what one unit in the last place of every weight does to transformers itself. Where
modules and experts are is found by looking rows up; which fields are followed, by changing each alone in both.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
FILE = HERE.parents[1] / "soup_xb" / "core" / "base" / "proven.json"
# Why a type that both libraries know is not opened on MLX.
LEFT_OUT = {
    "bitnet": "mlx-lm builds only the packed layer of 1.58 bits, a Metal kernel without a gradient",
    "minimax": "mlx-lm's `minimax` is MiniMax M2; MiniMax-Text-01 with its lightning attention is not there",
    "muse_spark": "mlx-lm calls Metal kernels of its own, without a gradient and without a CPU path",
    "olmo": "mlx-lm's module is for ai2-olmo's own format, not for that of transformers",
    "pixtral": "to transformers it is a vision tower; checkpoints of the model are of the type `llava`",
    "step3p5": "transformers has no language model class for it, so that there is nothing to agree with",
}
# At most this many times the noise floor, and never more than the second.
FLOORS, LARGEST = 4.0, 4e-6
LENGTHS = (40, 200)
_AT_ONCE = 5
# Of the type that is being proven.
_floor = 0.0
ROPES: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32.0, "beta_slow": 1.0},
    "longrope": {"factor": 4.0, "original_max_position_embeddings": 64},
}


class Anything(frozenset):
    """Holds every name: nothing is refused while it is found out."""

    def __contains__(self, _name: object) -> bool:
        return True


def permissive(name: str) -> Any:
    from soup_xb.backends.mlx.rope import KINDS
    from soup_xb.core.base.proven import ProvenType

    return ProvenType(name, Anything(), {}, (*KINDS, "proportional", "dynamic", "partial"))


def on_mlx(folder: Path, name: str) -> tuple[Any, Any]:
    """The reading and the model of a base, whatever is proven of its type."""
    from soup_xb.backends.mlx import load, reading
    from soup_xb.core.base.folder import inspect_base

    base = inspect_base(folder)
    read = reading.translated(base, permissive(name))
    model = read.build()
    weights = load._read_weights(base, read, model, headless=False)
    load._fill(model, weights, base)
    import mlx.core as mx

    model.set_dtype(mx.float32)
    if read.module in ("gemma3", "gemma3_text"):
        load.scale_exactly(model, load.text_config(read.config))
    return read, model


def on_torch(folder: Path) -> Any:
    """The base as the torch backend opens it."""
    from tiny import CASES, text_alone

    from soup_xb.backends.torch.session import open_session

    case = CASES.get(json.loads((folder / "config.json").read_text("utf-8"))["model_type"], {})
    return text_alone(folder) if case.get("nested") else open_session(settings(folder)).model


def settings(folder: Path, **changes: Any) -> Any:
    from soup_xb.core.run.session import OptimizerSettings, SessionSettings

    optimizer = OptimizerSettings("adamw", 0.9, 0.999, 1e-6, 0.0, 1.0)
    told = {"precision": "fp32", "quantization": "none", "gradient_checkpointing": False, "seed": 0}
    return SessionSettings(base=folder, optimizer=optimizer, **{**told, **changes})


def tokens(length: int) -> np.ndarray:
    from tiny import TOKENS

    return np.random.default_rng(length).integers(3, TOKENS, (2, length))


def torch_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(ids), use_cache=False).logits.float().numpy()


def mlx_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    import mlx.core as mx

    out = model(mx.array(ids))
    return np.array(getattr(out, "logits", out).astype(mx.float32))


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    return error if error == error else float("inf")


def nudged(model: Any, seed: int = 3) -> None:
    """One unit in the last place on every weight."""
    import torch

    signs = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + 6e-8 * torch.sign(torch.randn(weight.shape, generator=signs)))


def logits_proof(name: str, work: Path, scale: float) -> dict[str, Any]:
    """The largest difference of logits, and the noise floor, at one scale of the weights."""
    from tiny import tiny_base

    folder = tiny_base(name, work / "base", scale)
    theirs = on_torch(folder)
    expected = [torch_logits(theirs, tokens(length)) for length in LENGTHS]
    nudged(theirs)
    floor = max(
        relative(torch_logits(theirs, tokens(length)), each)
        for length, each in zip(LENGTHS, expected, strict=True)
    )
    _, ours = on_mlx(folder, name)
    errors = [
        relative(mlx_logits(ours, tokens(length)), each)
        for length, each in zip(LENGTHS, expected, strict=True)
    ]
    return {"errors": errors, "floor": floor, "equal": max(errors) <= max(FLOORS * floor, LARGEST)}


class Rows:
    """Where the rows of the weights of a torch model are, and of their transposes."""

    def __init__(self, model: Any) -> None:
        self.weights = {name: weight.detach().numpy() for name, weight in model.named_parameters()}
        buffers = {name: buffer.float().numpy() for name, buffer in model.named_buffers()}
        self.found: dict[bytes, tuple[str, bool, int]] = {}
        for name, array in {**buffers, **self.weights}.items():
            for turned in (False, True):
                matrix = as_rows(array, turned)
                if matrix is None or (turned and matrix.shape[-1] < 3):
                    continue
                for index, row in enumerate(matrix):
                    self.found.setdefault(row.tobytes(), (name, turned, index))

    def of(self, array: np.ndarray) -> list[tuple[str, bool, int]] | None:
        """Where each row of an array is; None where one is not found."""
        matrix = as_rows(array, False)
        hits = [] if matrix is None else [self.found.get(row.tobytes()) for row in matrix]
        return hits if hits and all(hits) else None  # type: ignore[return-value]


def as_rows(array: np.ndarray, turned: bool) -> np.ndarray | None:
    """An array as a matrix of its rows, of those of its transpose; None for a vector."""
    if array.ndim < 2 or array.dtype != np.float32:
        return None
    squeezed = array.squeeze() if 1 in array.shape else array
    if squeezed.ndim < 2:
        squeezed = squeezed.reshape(1, -1)
    if turned:
        squeezed = np.swapaxes(squeezed, -1, -2)
    return np.ascontiguousarray(squeezed).reshape(-1, squeezed.shape[-1])


def pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def find_parts(theirs: Any, ours: Any, rows: Rows) -> tuple[dict[str, Any], list[str], list[str]]:
    """Where torch's modules are in mlx-lm, which of them are nowhere, and the names that PEFT reads otherwise."""
    import mlx.core as mx
    from mlx_lm.models.mla import MultiLinear

    from soup_xb.backends.mlx.adapters import walk
    from soup_xb.backends.mlx.load import _carries
    from soup_xb.backends.torch.load import describe_model

    known = {module.name: module for module in describe_model(theirs, {}).modules}
    found: dict[str, dict[str, dict[str, Any]]] = {}
    closed = set()
    for place, module in walk(ours):
        if not _carries(module):
            continue
        if isinstance(module, MultiLinear):
            half = {"embed_q": "keys", "unembed_out": "values"}[place.rpartition(".")[2]]
            source = latent_source(place, np.array(module.weight), half, rows)
            if source is not None:
                found.setdefault(pattern(source), {})[pattern(place)] = {"heads": half}
            else:
                closed.add(pattern(place))
            continue
        weight = np.array(module.weight.astype(mx.float32))
        told = part_of(weight, rows, known) or scaled_part(place, weight, known)
        if told is not None:
            source, part = told
            found.setdefault(pattern(source), {})[pattern(place)] = part
        else:
            closed.add(pattern(place))
    parts = {}
    # Of one stack of experts all weights carry an adapter, or none.
    lost = {pattern(name) for name, module in known.items() if module.experts} - set(found)
    for source in [
        each for each in found if any(each.rpartition(".")[0] == name.rpartition(".")[0] for name in lost)
    ]:
        closed |= {source, *found.pop(source)}
    order = list(dict.fromkeys(pattern(name) for name in known))
    for source, places in sorted(found.items(), key=lambda each: order.index(each[0])):
        listed = [{"place": place, **part} for place, part in places.items()]
        listed.sort(key=lambda part: part.get("index", 0))
        # Stacks of experts are told apart from layers of the same name.
        if listed != [{"place": source}] or known_experts(source, known):
            parts[source] = [part["place"] if len(part) == 1 else part for part in listed]
    text = {pattern(name) for name in known if not re.search("vision|visual|audio|multi_modal|mm_proj", name)}
    if getattr(theirs.config.get_text_config(), "tie_word_embeddings", theirs.config.tie_word_embeddings):
        # A tied head is no module of its own in mlx-lm; an untied one of this type is.
        text.discard("lm_head")
    taken = sorted({name.rpartition(".")[2] for name, module in known.items() if module.by_weight})
    return parts, sorted(closed | text - set(found)), taken


def known_experts(source: str, known: Mapping[str, Any]) -> bool:
    return any(module.experts for name, module in known.items() if pattern(name) == source)


def part_of(weight: np.ndarray, rows: Rows, known: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    hits = rows.of(weight)
    if hits is None or len({(name, turned) for name, turned, _ in hits}) != 1:
        return None
    source, turned, _ = hits[0]
    name = source if source in known else source.removesuffix(".weight")
    if name not in known:
        return None
    module, count = known[name], weight.shape[-2]
    indices = np.array([index for _, _, index in hits])
    whole = rows.weights[source].shape[-1 if turned else -2]
    part: dict[str, Any] = {}
    if weight.ndim == 3 and len(weight) != module.experts:
        # LongCat's zero experts have weights in transformers, which nothing uses.
        return None
    if weight.ndim == 3:
        indices = indices[:count] % whole
        # PEFT takes these outputs for inputs: the sides that the torch backend tells are the other way round.
        if (module.out_features, module.in_features) != (whole, weight.shape[-1]):
            part["turned"] = True
    elif turned:
        part["turned"] = True
    if count < whole:
        step = int(indices[1] - indices[0])
        of = whole // count
        index = int(indices[0]) if step > 1 else int(indices[0]) // count
        part |= {"index": index, "of": of, **({"interleaved": True} if step > 1 else {})}
    return name, part


def scaled_part(
    place: str, weight: np.ndarray, known: Mapping[str, Any]
) -> tuple[str, dict[str, Any]] | None:
    """The same module by its name, where mlx-lm keeps its rows multiplied."""
    module = known.get(place)
    if module is None or (module.out_features, module.in_features) != weight.shape:
        return None
    return place, {}


def latent_source(place: str, weight: np.ndarray, half: str, rows: Rows) -> str | None:
    """The `kv_b_proj` whose rows for the values, or columns for the keys, are at a place."""
    if half == "values":
        hits = rows.of(weight)
        return None if hits is None else hits[0][0].removesuffix(".weight")
    heads = np.ascontiguousarray(np.swapaxes(weight, -1, -2))
    hits = rows.of(heads)
    return None if hits is None else hits[0][0].removesuffix(".weight")


def gradient_proof(theirs: Any, ours: Any, rows: Rows) -> dict[str, Any]:
    """The worst relative difference of a weight's gradient, over all weights whose rows are in both."""
    import mlx.core as mx
    import mlx.nn as nn
    import torch
    from mlx.utils import tree_flatten

    ids = tokens(24)
    theirs.zero_grad()
    theirs.requires_grad_(True)
    out = theirs(torch.from_numpy(ids), use_cache=False).logits.float()
    loss = torch.nn.functional.cross_entropy(
        out[:, :-1].reshape(-1, out.shape[-1]), torch.from_numpy(ids[:, 1:]).reshape(-1)
    )
    loss.backward()
    expected = {
        name: weight.grad.numpy() for name, weight in theirs.named_parameters() if weight.grad is not None
    }
    ours.unfreeze()

    def mean_loss(model: Any, row: mx.array) -> mx.array:
        logits = model(row[:, :-1])
        logits = getattr(logits, "logits", logits).astype(mx.float32)
        return nn.losses.cross_entropy(logits, row[:, 1:], reduction="mean")

    value, tree = nn.value_and_grad(ours, mean_loss)(ours, mx.array(ids))
    mx.eval(value, tree)
    weights, worst, compared = dict(tree_flatten(ours.parameters())), 0.0, 0
    scale = max(np.abs(each).max() for each in expected.values())
    matrices: dict[tuple[str, bool], np.ndarray | None] = {}
    for name, gradient in tree_flatten(tree):
        hits = rows.of(np.array(weights[name].astype(mx.float32)))
        if hits is None:
            continue
        for source, turned, _ in hits:
            if (source, turned) not in matrices:
                matrices[source, turned] = as_rows(expected[source], turned) if source in expected else None
        if any(matrices[source, turned] is None for source, turned, _ in hits):
            continue
        wanted = np.stack([matrices[source, turned][index] for source, turned, index in hits])
        got = as_rows(np.array(gradient.astype(mx.float32)), False)
        worst = max(worst, float(np.abs(got - wanted).max() / max(np.abs(wanted).max(), 1e-6 * scale)))
        compared += 1
    return {"worst": worst, "compared": compared, "losses": [float(loss.detach()), value.item()]}


def other_values(value: Any) -> list[Any]:
    """Values to try in a field's place."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, str):
        gates = ("silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu2")
        return [other for other in ("gelu", "silu") if other != value] if value in gates else []
    if isinstance(value, int):
        return [value * 2, max(1, value // 2)]
    if isinstance(value, float):
        return [value * 1.7 if value else 0.3, 1e-3 if value < 1e-3 else value * 0.6]
    if isinstance(value, list):
        # Numbers of layers, or factors of theirs.
        floats = value and all(type(each) is float for each in value)
        return [[1]] if not value else [[0.8 * each for each in value]] if floats else []
    return [True, 16, 0.7] if value is None else []


def sense(name: str, work: Path) -> tuple[list[str], dict[str, list[Any]]]:
    """Fields whose other values are followed, and for all others the values with which the models are equal."""
    from tiny import config_of

    from soup_xb.backends.mlx.reading import KINDS_OF_LAYERS, told_fields

    config = config_of(name)
    text = config.get_text_config()
    parts = [(text, "text")] if text is config else [(text, "text"), (config, "top")]
    reads, values = [], {}
    for part, which in parts:
        for field, value, usual in told_fields(part):
            tried = [list(value)[::-1]] if field in KINDS_OF_LAYERS and value else other_values(value)
            told = [follows(name, work, **changed(part, field, other)) for other in tried if which == "text"]
            if True in told and False not in told:
                reads.append(field)
            elif type(value) is int and told[:2] == [True, False]:
                # Such as how many experts a token has: mlx-lm takes one for a case of its own.
                values[field] = [{"least": value}]
            elif value != usual and field not in KINDS_OF_LAYERS:
                values[field] = [value, usual] if which == "top" else [value]
    return reads, values


def changed(part: Any, field: str, value: Any) -> dict[str, Any]:
    """A field with another value; of a dotted one the whole that it is part of."""
    outer, _, inner = field.partition(".")
    return {outer: {**part.to_dict()[outer], inner: value}} if inner else {outer: value}


def window_proof(name: str, work: Path) -> bool:
    """Whether rows beyond a sliding window are equal, where the config can have one."""
    from tiny import config_of

    text = config_of(name).get_text_config()
    if not hasattr(text, "sliding_window"):
        return False
    told: dict[str, Any] = {"sliding_window": 24}
    if hasattr(text, "use_sliding_window"):
        told["use_sliding_window"] = True
    if hasattr(text, "max_window_layers"):
        told["max_window_layers"] = 2
    kinds = getattr(text, "layer_types", None)
    if kinds and "sliding_attention" not in kinds and set(kinds) == {"full_attention"}:
        told["layer_types"] = ["full_attention", "sliding_attention"] * (len(kinds) // 2)
    return follows(name, work, **told) is True


def follows(name: str, work: Path, **changes: Any) -> bool | None:
    """Whether both models are equal with other values of fields; None where transformers takes none of them."""
    from tiny import tiny_base

    try:
        folder = tiny_base(name, work / "sense", **changes)
        expected = torch_logits(on_torch(folder), tokens(60))
    except Exception:  # noqa: BLE001 - a value that transformers refuses
        return None
    if not np.isfinite(expected).all():
        return None
    try:
        return relative(mlx_logits(on_mlx(folder, name)[1], tokens(60)), expected) < max(
            2e-5, FLOORS * _floor
        )
    except Exception:  # noqa: BLE001 - a value that mlx-lm, or our reading, refuses
        return False


def rope_proof(name: str, work: Path) -> list[str]:
    """The kinds of rotary embeddings that are equal, beside the tiny model's own."""
    from tiny import config_of

    text = config_of(name).get_text_config()
    own = getattr(text, "rope_parameters", None)
    if not own:
        return []
    nested = all(isinstance(each, dict) for each in own.values())
    base = own.get("full_attention", {}) if nested else own
    kinds = sorted({each.get("rope_type", "default") for each in (own.values() if nested else (own,))})
    kept = {key: base[key] for key in ("partial_rotary_factor", "rope_theta") if key in base}
    half = {**base, "partial_rotary_factor": 0.5}
    if follows(name, work, rope_parameters={**own, "full_attention": half} if nested else half):
        kinds.append("partial")
    for kind, more in ROPES.items():
        if kind in kinds:
            continue
        told = {**kept, "rope_type": kind, **more}
        if kind == "longrope":
            sizes = text.to_dict()
            head = sizes.get("qk_rope_head_dim") or sizes.get("head_dim")
            head = head or text.hidden_size // text.num_attention_heads
            half = int(head * kept.get("partial_rotary_factor", 1.0)) // 2
            told |= {
                "short_factor": [1.0 + 0.1 * index for index in range(half)],
                "long_factor": [2.0] * half,
            }
        if follows(name, work, rope_parameters={**own, "full_attention": told} if nested else told):
            kinds.append(kind)
    return kinds


def head_proof(ours: Any) -> bool:
    """Whether head and decoder apart give the logits of the whole."""
    import mlx.core as mx

    from soup_xb.backends.mlx.head import head_logits, hidden_states

    ids = tokens(40)[:1]
    got = np.array(head_logits(ours, hidden_states(ours, mx.array(ids))[0]))
    return relative(got, mlx_logits(ours, ids)[0]) < LARGEST * FLOORS


def cache_proof(ours: Any) -> bool:
    """Whether answers of prompts of several lengths, sampled with a cache, have the logits of uncached rows."""
    from soup_xb.backends.mlx import generation

    prompts = [tokens(40)[0][:length] for length in (9, 14, 5)]
    chances = np.random.default_rng(0).random((3, 40))
    told = generation.GenerationSettings(max_new_tokens=40, temperature=1.0, seed=0, end_ids=(127,))
    try:
        cached = generation.sample(ours, prompts, chances, told)
        plain = generation.sample(ours, prompts, chances, told, cached=False)
        greedy = generation.GenerationSettings(max_new_tokens=40, temperature=0.0, seed=0, end_ids=(127,))
        one = [generation.generate_tokens(ours, prompts[0], greedy, cached=each) for each in (True, False)]
    except Exception:  # noqa: BLE001 - a model that keeps something else than keys and values
        return False
    same = all(np.array_equal(one, other) for one, other in zip(cached, plain, strict=True))
    return same and np.array_equal(*one)


def scores(name: str) -> bool:
    """Whether transformers has a sequence classifier with a head called `score` for the type."""
    import torch
    import transformers
    from tiny import config_of

    try:
        config = config_of(name)
        with torch.device("meta"):
            model = transformers.AutoModelForSequenceClassification.from_config(config)
    except Exception:  # noqa: BLE001 - no such class
        return False
    return "score" in dict(model.named_children())


def prove(name: str, work: Path) -> dict[str, Any]:
    """Everything about one type."""
    from tiny import tiny_base

    from soup_xb.backends.mlx.families import family_of

    result: dict[str, Any] = {"x3": logits_proof(name, work, 3.0)}
    result["x8"] = logits_proof(name, work, 8.0)
    global _floor
    _floor = result["x3"]["floor"]
    folder = tiny_base(name, work / "base")
    theirs = on_torch(folder)
    _, ours = on_mlx(folder, name)
    result["head"] = head_proof(ours)
    result["scaled"] = family_of(name).scaled
    result["cached"] = cache_proof(ours)
    result["scores"] = scores(name)
    rows = Rows(theirs)
    result["parts"], result["closed"], result["by_weight"] = find_parts(theirs, ours, rows)
    result["gradient"] = gradient_proof(theirs, ours, rows)
    if os.environ.get("QUICK"):
        return {**result, "ropes": [], "windows": False, "reads": [], "values": {}}
    result["ropes"] = rope_proof(name, work)
    result["windows"] = window_proof(name, work)
    result["reads"], result["values"] = sense(name, work)
    return result


def verdict(result: Mapping[str, Any]) -> str:
    """Why a type is not proven; empty where it is."""
    if "error" in result:
        return result["error"]
    for scale in ("x3", "x8"):
        if not result[scale]["equal"]:
            error, floor = max(result[scale]["errors"]), result[scale]["floor"]
            return (
                f"its logits differ from transformers' by {error:.1e} of the largest with weights {scale} as large, "
                f"{error / floor:.0f} times float noise"
            )
    if not result["gradient"]["worst"] <= max(2e-4, 8 * result["x3"]["floor"]):
        return f"gradients differ by {result['gradient']['worst']:.1e}"
    return "" if result["head"] else "head and decoder apart differ from the whole"


def both_libraries() -> list[str]:
    """The model types that transformers and mlx-lm both know."""
    import mlx_lm
    import mlx_lm.utils
    import transformers

    models = {file.stem for file in (Path(mlx_lm.__file__).parent / "models").glob("*.py")}
    known = [
        name for name in transformers.CONFIG_MAPPING if name.replace("_vl", "-vl") in models or name in models
    ]
    return sorted(
        {*known, *(name for name in mlx_lm.utils.MODEL_REMAPPING if name in transformers.CONFIG_MAPPING)}
    )


def one(name: str, out: Path) -> None:
    """Prove a type in this process, and write what was found."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    started = time.time()
    with tempfile.TemporaryDirectory() as work:
        try:
            result = prove(name, Path(work))
        except Exception as error:  # noqa: BLE001 - any failure is the verdict
            import traceback

            result = {
                "error": f"{type(error).__name__}: {error}"[:300],
                "trace": traceback.format_exc()[-1500:],
            }
    result["seconds"] = round(time.time() - started, 1)
    (out / f"{name}.json").write_text(json.dumps(result, indent=1), "utf-8")
    print(f"{name:18} {verdict(result) or 'equal'}  {result['seconds']} s", flush=True)


def rows_of(results: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    kept = (
        "reads",
        "values",
        "ropes",
        "parts",
        "closed",
        "by_weight",
        "cached",
        "scores",
        "windows",
    )
    for name, result in sorted(results.items()):
        if not verdict(result):
            yield (
                name,
                {
                    key: result[key]
                    for key in kept
                    if result[key] or key in ("reads", "values", "ropes") or isinstance(result[key], bool)
                },
            )


def quiet() -> None:
    """Before the libraries are imported: no hub, no progress bars, and nothing compiled."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        # Tens of small models: each compiled function would call a compiler. The numbers are the same.
        "MLX_DISABLE_COMPILE": "1",
    }


def main() -> None:
    """The command line."""
    quiet()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[], help="types to prove anew; the others' rows stay")
    parser.add_argument("--each", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "prove-families")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    if options.each:
        for name in options.each:
            one(name, options.results)
        return
    from tiny import CASES

    missing = sorted(set(both_libraries()) - set(CASES) - set(LEFT_OUT))
    if missing:
        sys.exit(
            f"both libraries know these types, and there is neither a case nor a reason: {', '.join(missing)}"
        )
    names = options.only or [name for name in CASES if name not in LEFT_OUT]
    if not options.only and not os.environ.get("QUICK"):
        shutil.rmtree(options.results)
        options.results.mkdir()
    # A process for a few types: importing the libraries takes as long as a proof, and one may end its process.
    command = [sys.executable, __file__, "--results", str(options.results), "--each"]
    some = [names[first : first + _AT_ONCE] for first in range(0, len(names), _AT_ONCE)]
    with ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(lambda each: subprocess.run([*command, *each], check=False), some))
    results = {file.stem: json.loads(file.read_text("utf-8")) for file in options.results.glob("*.json")}
    left_out = {**LEFT_OUT, **{name: why for name, each in results.items() if (why := verdict(each))}}
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "mlx-lm", "mlx", "torch")}
    write(versions, dict(rows_of(results)), left_out)


def write(versions: Mapping[str, str], types: Mapping[str, Any], left_out: Mapping[str, str]) -> None:
    """proven.json, a line for each type."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in types.items())
    FILE.write_text(
        f'{{\n "versions": {json.dumps(versions)},\n "types": {{\n{lines}\n }},\n'
        f' "left_out": {json.dumps(dict(sorted(left_out.items())), indent=2)}\n}}\n',
        "utf-8",
    )


if __name__ == "__main__":
    main()
