"""VeRA (arXiv:2310.11454): one frozen pair of random projections for all modules, and trained scaling vectors.

A module's weight gets diag(b) B diag(d) A. A is the first columns of the shared projection (rank, widest input), B the
first rows of the other one (largest output, rank), so that modules of different shapes share both, as in PEFT. A saved
adapter holds the projections too, and can be written as a plain LoRA.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from soup_xb.core.adapter.plan import AdapterPlan
from soup_xb.core.base.modules import AdapterModule, Module
from soup_xb.core.base.rope import NOTE
from soup_xb.core.errors import ModelError
from soup_xb.core.random_numbers import uniform

# Among factors by module name, the name that holds the projections: they belong to no module.
SHARED = ""
LAMBDA_START = 0.1

Array = np.ndarray[Any, Any]
Factors = Mapping[str, Mapping[str, Array]]


def first_factors(modules: Sequence[AdapterModule], seed: int) -> dict[str, dict[str, Array]]:
    """Where VeRA starts: d at 0.1, b at zero, so that the output is the base's, and the projections under `SHARED`.

    The projections are uniform with the Kaiming bound sqrt(6 / fan_in), as in the paper and PEFT. They depend on seed,
    rank and largest sizes, not on the order of modules.
    """
    rank, widest, largest = _sizes(modules)
    factors = {
        module.name: {
            "vera_lambda_d": np.full(rank, LAMBDA_START, np.float32),
            "vera_lambda_b": np.zeros(module.out_features, np.float32),
        }
        for module in modules
    }
    a = _projection(("vera_A", seed), (rank, widest))
    b = _projection(("vera_B", seed), (largest, rank))
    return {**factors, SHARED: {"vera_A": a, "vera_B": b}}


def shared_entries(modules: Sequence[AdapterModule]) -> int:
    """Entries of both projections, which are kept and not trained; 0 for modules of another kind."""
    if not any(module.vera for module in modules):
        return 0
    rank, widest, largest = _sizes(modules)
    return rank * (widest + largest)


def lora_pair(
    arrays: Mapping[str, Array], shared: Mapping[str, Array], in_features: int
) -> tuple[Array, Array]:
    """One module as a plain LoRA of scale 1, float32: diag(d) A (rank, in_features) and diag(b) B (out_features, rank).

    Exact but for the rounding of one product an entry.
    """
    d, b = arrays["vera_lambda_d"], arrays["vera_lambda_b"]
    return d[:, None] * shared["vera_A"][:, :in_features], b[:, None] * shared["vera_B"][: len(b)]


def _projection(key: tuple[object, ...], shape: tuple[int, int]) -> Array:
    bound = math.sqrt(6.0 / shape[1])
    values = uniform(shape[0] * shape[1], *key)
    return ((2.0 * values - 1.0) * bound).astype(np.float32).reshape(shape)


def _sizes(modules: Iterable[AdapterModule]) -> tuple[int, int, int]:
    """Rank, widest input and largest output."""
    modules = list(modules)
    return (
        modules[0].rank,
        max(module.in_features for module in modules),
        max(module.out_features for module in modules),
    )


_ROOT = "base_model"
_KEY = re.compile(r"base_model\.(?:(vera_[AB])|model\.(.+)\.(vera_lambda_[bd]))")


def vera_settings(plan: AdapterPlan, base: str, targets: Sequence[str]) -> dict[str, Any]:
    """The content of `adapter_config.json`."""
    return {
        "peft_type": "VERA",
        "task_type": plan.task_type,
        "base_model_name_or_path": base,
        "r": plan.modules[0].rank,
        "vera_dropout": plan.dropout,
        "d_initial": LAMBDA_START,
        "target_modules": list(targets),
        # The projections come from the run's own seed, which no generator of PEFT's repeats: they are in the file.
        "save_projection": True,
        "projection_prng_key": 0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }


def vera_key(name: str, factor: str) -> str:
    """PEFT's name of a tensor; the projections lie at the root.

    >>> vera_key("model.layers.0.mlp.down_proj", "vera_lambda_d"), vera_key("", "vera_A")
    ('base_model.model.model.layers.0.mlp.down_proj.vera_lambda_d', 'base_model.vera_A')
    """
    return f"{_ROOT}.{factor}" if name == SHARED else f"{_ROOT}.model.{name}.{factor}"


def split_vera_key(key: str) -> tuple[str, str] | None:
    """Module name and factor of one of PEFT's names, None for any other text."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    return (SHARED, match[1]) if match[1] else (match[2], match[3])


def check_vera(factors: Factors, file: Path) -> None:
    """Raise ModelError for vectors and projections that are missing or do not belong together."""
    shared = factors.get(SHARED, {})
    if not shared.keys() >= {"vera_A", "vera_B"}:
        raise ModelError(
            "adapter-without-projections",
            "VeRA's random projections are not in the file",
            where=str(file),
            help="save the adapter with PEFT's `save_projection=True`, which writes them too.",
        )
    a, b = shared["vera_A"], shared["vera_B"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise _apart("the projections", file)
    for name, arrays in factors.items():
        if name == SHARED:
            continue
        d, out = arrays.get("vera_lambda_d"), arrays.get("vera_lambda_b")
        if d is None or out is None or d.shape != a.shape[:1] or out.ndim != 1 or len(out) > len(b):
            raise _apart(f"the vectors of `{name}`", file)


def plain_factors(
    factors: Factors, modules: Sequence[Module | AdapterModule], file: Path
) -> dict[str, dict[str, Array]]:
    """The adapter as a plain LoRA of scale 1 and VeRA's rank; `modules` tell the sides of the adapted ones.

    Raises ModelError where an adapted module is not among them or has other sides.
    """
    known = {module.name: module for module in modules}
    shared = factors[SHARED]
    plain = {}
    for name, arrays in factors.items():
        if name == SHARED:
            continue
        module = known.get(name)
        if (
            module is None
            or module.out_features != len(arrays["vera_lambda_b"])
            or module.in_features > shared["vera_A"].shape[1]
        ):
            has = "no such module" if module is None else f"{(module.out_features, module.in_features)} there"
            raise ModelError(
                "adapter-does-not-fit",
                f"the VeRA adapter adapts `{name}`, and the base or the run has {has}",
                where=str(file),
                help="the adapter belongs to another base or to other target_modules.",
            )
        plain[name] = dict(
            zip(("lora_A", "lora_B"), lora_pair(arrays, shared, module.in_features), strict=True)
        )
    return plain


def plain_settings(
    settings: Mapping[str, Any], factors: Factors, modules: Sequence[Module | AdapterModule]
) -> dict[str, Any]:
    """What `adapter_config.json` says of the plain form: alpha is the rank, so that the scale is 1."""
    rank = int(factors[SHARED]["vera_A"].shape[0])
    # What the adapter is for is the same in either form.
    kept = ("task_type", "base_model_name_or_path", NOTE)
    return {
        **{key: settings[key] for key in kept if key in settings},
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_parameters": [
            f"{module.name}.weight" for module in modules if module.by_weight and module.name in factors
        ],
    }


def _apart(what: str, file: Path) -> ModelError:
    return ModelError(
        "damaged-adapter",
        f"{what} do not belong together",
        where=str(file),
        help="write the adapter again.",
    )
