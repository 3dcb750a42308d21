"""The error table, part four: what can be wrong with a saved adapter, whatever reads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

SETTINGS, WEIGHTS = "ad/adapter_config.json", "ad/adapter_model.safetensors"
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Act = Callable[[Path], Any]


def settings(**values: object) -> Act:
    def act(place: Path) -> None:
        file = place / SETTINGS
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return act


def content(file: str, text: str | bytes) -> Act:
    return lambda place: (place / file).write_bytes(text if isinstance(text, bytes) else text.encode())


def tensors(change: Callable[[dict[str, Any]], Any]) -> Act:
    """Rewrites the factors; a change may give new ones back."""

    def act(place: Path) -> None:
        found = load_file(place / WEIGHTS)
        changed = change(found)
        save_file(changed if isinstance(changed, dict) else found, place / WEIGHTS)

    return act


def without_rank(found: dict[str, Any]) -> dict[str, Any]:
    return {name: array[:0] if "lora_A" in name else array[:, :0] for name, array in found.items()}


def cut(place: Path) -> None:
    (place / WEIGHTS).write_bytes((place / WEIGHTS).read_bytes()[:-100])


def dtype_of_nobody(place: Path) -> None:
    raw = (place / WEIGHTS).read_bytes()
    (place / WEIGHTS).write_bytes(raw.replace(b'"F32"', b'"F99"'))


# Every command that reads an adapter answers alike.
EVERYWHERE = {
    "not there": {
        "arrange": lambda place: shutil.rmtree(place / "ad"),
        "code": "adapter-not-found",
        "where": "ad: ",
    },
    "no settings": {"arrange": lambda place: (place / SETTINGS).unlink(), "code": "adapter-not-found"},
    "empty settings": {"arrange": content(SETTINGS, ""), "code": "damaged-adapter", "where": f"{SETTINGS}: "},
    "settings that are no text": {"arrange": content(SETTINGS, b"\xff\xfe"), "code": "damaged-adapter"},
    "settings nested 90,000 deep": {"arrange": content(SETTINGS, "[" * 90_000), "code": "damaged-adapter"},
    "settings that are a list": {"arrange": content(SETTINGS, "[]"), "code": "foreign-adapter"},
    "settings of 5 MB": {
        "arrange": settings(filler="x" * 5_000_000),
        "code": "damaged-adapter",
        "words": "larger than",
    },
    "another kind of adapter": {
        "arrange": settings(peft_type="LOHA"),
        "code": "foreign-adapter",
        "words": "LoRA",
    },
    "an adapter of a changed base": {
        "arrange": settings(init_lora_weights="pissa_niter_4"),
        "code": "foreign-adapter",
        "words": '`init_lora_weights: "pissa_niter_4"` changed',
        "help": "path_initial_model_for_weight_conversion",
    },
    "an adapter of a rebuilt base": {
        "arrange": settings(layer_replication=[[0, 2]]),
        "code": "foreign-adapter",
    },
    "alpha in words": {
        "arrange": settings(lora_alpha="high"),
        "code": "damaged-adapter",
        "words": "must be a number",
    },
    "alpha that is not finite": {"arrange": settings(lora_alpha=float("nan")), "code": "damaged-adapter"},
    "alpha of 401 digits": {
        "arrange": settings(lora_alpha=10**400),
        "code": "damaged-adapter",
        "words": "at most",
    },
    "factors beyond float32": {
        "arrange": tensors(lambda found: {name: array.astype("f8") * 1e300 for name, array in found.items()}),
        "code": "non-finite-adapter",
    },
    "alpha of 1e308": {"arrange": settings(lora_alpha=1e308), "code": "damaged-adapter", "words": "at most"},
    "patterns that are a number": {
        "arrange": settings(alpha_pattern=5),
        "code": "damaged-adapter",
        "words": "an object",
    },
    "a pattern with an alpha in words": {
        "arrange": settings(alpha_pattern={"q_proj": "x"}),
        "code": "damaged-adapter",
    },
    "100,000 patterns": {
        "arrange": settings(alpha_pattern={f"m{number}": 4 for number in range(100_000)}),
        "code": "damaged-adapter",
        "words": "at most 4096",
    },
    "a pattern of 2,000 characters": {
        "arrange": settings(rank_pattern={"x" * 2000: 4}),
        "code": "damaged-adapter",
        "words": "2000 characters",
    },
    "no factors": {
        "arrange": lambda place: (place / WEIGHTS).unlink(),
        "code": "damaged-adapter",
        "words": "there is no",
    },
    "factors in a pickle": {
        "arrange": lambda place: (place / WEIGHTS).rename(place / "ad/adapter_model.bin"),
        "code": "foreign-weights",
        "words": "is a pickle, which can run code",
        "help": "save_pretrained",
    },
    "factors cut off": {"arrange": cut, "code": "damaged-adapter", "where": f"{WEIGHTS}: "},
    "an empty file of factors": {
        "arrange": tensors(lambda _: {}),
        "code": "damaged-adapter",
        "words": "no factors",
    },
    "a type that nobody knows": {"arrange": dtype_of_nobody, "code": "damaged-adapter"},
    "factors that are not finite": {
        "arrange": tensors(lambda found: found[Q_PROJ].fill(np.nan)),
        "code": "non-finite-adapter",
        "words": "q_proj",
    },
    "a tensor that is no factor": {
        "arrange": tensors(lambda found: found.update(evil=np.zeros(3, np.float32))),
        "code": "foreign-adapter",
        "words": "`evil`",
    },
}

EVERYWHERE |= {
    "an adapter in mlx-lm's form": {
        "arrange": content(SETTINGS, '{"fine_tune_type": "lora", "lora_parameters": {"scale": 2.0}}'),
        "code": "mlx-lm-adapter",
        "words": "in mlx-lm's form",
        "help": "soupx export ad --to peft",
    },
    "trained biases beside the factors": {
        "arrange": tensors(
            lambda found: found.update({Q_PROJ.replace("lora_A.weight", "bias"): np.ones(3, "f4")})
        ),
        "code": "more-than-factors",
        "words": "biases",
        "help": "merge_and_unload",
    },
    "an adapter that acts after some tokens alone": {
        "arrange": settings(alora_invocation_tokens=[1, 2]),
        "code": "foreign-adapter",
        "words": "alora_invocation_tokens",
    },
}

# What only shows where the factors are brought together or set.
PAIRS = {
    "half of the pairs": {
        "arrange": tensors(lambda found: {name: array for name, array in found.items() if "lora_A" in name}),
        "code": "damaged-adapter",
        "words": "do not belong together",
    },
    "a factor of one dimension": {
        "arrange": tensors(lambda found: found.update({Q_PROJ: np.zeros(3, np.float32)})),
        "code": "damaged-adapter",
    },
    "factors of rank 0": {
        "arrange": tensors(without_rank),
        "code": "damaged-adapter",
        "words": "do not belong together",
    },
    "a pattern that is none": {
        "arrange": settings(alpha_pattern={"(": 3}),
        "code": "damaged-adapter",
        "where": f"{SETTINGS}: ",
        "words": "not a regular expression",
    },
    "a pattern that runs away": {
        "arrange": settings(alpha_pattern={"(?:.|..|...)*[A-Z]": 3}),
        "code": "damaged-adapter",
        "words": "takes more than",
    },
}

ANOTHER_BASE = {
    "generate": {"code": "adapter-of-another-base", "words": ("layers.7", "/base`"), "help": "--base"},
    "train": {"code": "adapter-does-not-fit", "words": "layers."},
}

COMMANDS = {
    "train": "train --set adapter=ad",
    "generate": "generate --adapter ad --prompt Hello --max-new-tokens 2",
    "eval": "eval ad --data train.jsonl",
    "export": "export ad --to mlx-lm --output elsewhere",
    "merge": "merge ad --output elsewhere",
}


@pytest.fixture
def adapter(workplace: Path, trained: Callable[[str], Path]) -> Path:
    """A saved adapter in the workplace, to be spoiled."""
    shutil.copytree(trained("torch") / "adapter", workplace / "ad")
    return workplace / "ad"


@pytest.mark.parametrize("name", EVERYWHERE)
def test_a_wrong_adapter_is_answered_in_one_shape_by_every_command(
    name: str, adapter: Path, workplace: Path, check: Callable[[Any], Any]
) -> None:
    row: dict[str, Any] = {"exit": 4, **EVERYWHERE[name]}
    row.pop("arrange")(workplace)
    for command in COMMANDS.values():
        check({**row, "argv": command})
        assert not (workplace / "elsewhere").exists()


@pytest.mark.parametrize("backend", ["torch", "mlx"])
@pytest.mark.parametrize("name", PAIRS)
def test_factors_that_do_not_belong_together_are_refused_on_both_engines(
    name: str,
    backend: str,
    adapter: Path,
    check: Callable[[Any], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("soup_xb.core.base.patterns.SECONDS_PER_PATTERN", 0.2)
    row: dict[str, Any] = {"exit": 4, **PAIRS[name]}
    check({**row, "argv": f"{COMMANDS['generate']} --backend {backend}"})


@pytest.mark.parametrize("backend", ["torch", "mlx"])
@pytest.mark.parametrize("command", ANOTHER_BASE)
def test_an_adapter_of_another_base_is_named(
    command: str, backend: str, adapter: Path, workplace: Path, check: Callable[[Any], Any]
) -> None:
    row: dict[str, Any] = {
        "arrange": tensors(
            lambda found: {name.replace("layers.0", "layers.7"): a for name, a in found.items()}
        ),
        "exit": 4,
        **ANOTHER_BASE[command],
    }
    check({**row, "argv": f"{COMMANDS[command]} --backend {backend}"})


@pytest.mark.parametrize(
    ("value", "code", "words"),
    [
        (5, "no-base", "does not say which base"),
        (None, "no-base", "does not say which base"),
        ("../../etc", "base-not-found", "no such folder"),
        ("a\0b", "base-not-found", "u0000"),
        ("nobody/nothing", "base-not-cached", "nobody/nothing"),
    ],
)
def test_an_adapter_whose_base_is_not_there_says_so(
    value: object, code: str, words: str, adapter: Path, check: Callable[[Any], Any]
) -> None:
    arrange = settings(base_model_name_or_path=value)
    check({"arrange": arrange, "argv": COMMANDS["generate"], "exit": 4, "code": code, "words": words})


MLX_LM = {
    "settings that are no object": {
        "arrange": content("x/adapter_config.json", "5"),
        "code": "foreign-adapter",
    },
    "fully trained weights": {
        "arrange": content("x/adapter_config.json", '{"fine_tune_type": "full"}'),
        "code": "foreign-adapter",
    },
    "no scale": {
        "arrange": content("x/adapter_config.json", "{}"),
        "code": "damaged-adapter",
        "words": "scale",
    },
    "an endless scale": {
        "arrange": content("x/adapter_config.json", '{"lora_parameters": {"scale": 1e300}}'),
        "code": "damaged-adapter",
    },
    "no factors": {
        "arrange": lambda place: save_file({}, place / "x" / "adapters.safetensors"),
        "code": "damaged-adapter",
        "words": "no factors",
    },
    "a foreign factor": {
        "arrange": lambda place: save_file(
            {"x": np.zeros(3, np.float32)}, place / "x" / "adapters.safetensors"
        ),
        "code": "damaged-adapter",
    },
    "factors cut off": {"arrange": content("x/adapters.safetensors", b"\0" * 9), "code": "damaged-adapter"},
    "experts": {
        "arrange": lambda place: save_file(
            {"model.layers.0.mlp.switch_mlp.up_proj.lora_a": np.zeros((2, 3, 4), np.float32)},
            place / "x" / "adapters.safetensors",
        ),
        "code": "no-counterpart",
        "words": "another layer in transformers",
        "help": "mlx_lm.fuse",
    },
    "an embedding": {
        "arrange": lambda place: save_file(
            {"model.embed_tokens.lora_a": np.zeros((3, 4), np.float32)}, place / "x" / "adapters.safetensors"
        ),
        "code": "no-counterpart",
        "words": "is an embedding",
    },
}


@pytest.mark.parametrize("name", MLX_LM)
def test_a_wrong_adapter_of_mlx_lm_is_answered_in_one_shape(
    name: str, adapter: Path, check: Callable[[Any], Any]
) -> None:
    check({"argv": "export ad --to mlx-lm --output x", "exit": 0})
    row: dict[str, Any] = {"exit": 4, **MLX_LM[name]}
    check({**row, "argv": "export x --to peft --output elsewhere"})
