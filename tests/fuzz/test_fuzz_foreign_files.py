"""Settings, headers, manifests and records of others, spoiled: read or refused in our own words, and soon."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutation import SAMPLE, full, spoiled
from safetensors.numpy import save

from soup_xb.core.adapter.mlx_lm_file import read_mlx_lm
from soup_xb.core.adapter.peft_file import adapter_modules, read_adapter
from soup_xb.core.base.folder import inspect_base
from soup_xb.core.base.patterns import matching_names
from soup_xb.core.run.checkpoint import read_checkpoint
from soup_xb.core.run.events import kept_lines, last_step, read_events
from soup_xb.core.run.record import read_record

MODULE = "model.layers.0.self_attn.q_proj"
PREFIX = f"base_model.model.{MODULE}"
TENSORS = {
    f"{PREFIX}.lora_A.weight": np.ones((4, 8), np.float32),
    f"{PREFIX}.lora_B.weight": np.ones((6, 4), np.float32),
}
MLX_TENSORS = {
    f"{MODULE}.lora_a": np.ones((8, 4), np.float32),
    f"{MODULE}.lora_b": np.ones((4, 6), np.float32),
}

# What is spoiled, whole: each reader's own text.
TEXTS: dict[str, Any] = {
    "adapter_config.json": {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"q_proj": 4},
        "alpha_pattern": {"(.*\\.)?q_proj": 16},
        "target_modules": ["q_proj"],
        "target_parameters": [],
        "base_model_name_or_path": "tiny",
        "init_lora_weights": True,
    },
    "config.json": {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "vocab_size": 320,
        "auto_map": {"AutoConfig": "x.Y"},
        "quantization_config": {"quant_method": "bitsandbytes"},
        "text_config": {"hidden_size": 64},
    },
    "model.safetensors.index.json": {"metadata": {}, "weight_map": {"a": "model-00001-of-00001.safetensors"}},
    "manifest.json": {
        "version": 1,
        "step": 2,
        "backend": "torch",
        "processes": 1,
        "config": "c",
        "data": "d",
        "versions": {"torch": "2"},
        "files": [{"name": "factors.safetensors", "bytes": 9, "sha256": "0" * 64}],
        "sha256": "0" * 64,
    },
    "run.json": {
        "status": "running",
        "backend": "torch",
        "base": "tiny",
        "config": {},
        "versions": {},
        "seed": 1,
        "total_steps": 4,
        "started": "now",
        "version": "0",
        "steps": 2,
        "train_seconds": 1.5,
        "tokens_per_second": None,
        "peak_memory_bytes": 5,
        "ended": None,
        "error": None,
    },
    "metrics.jsonl": {
        "event": "step",
        "step": 1,
        "loss": 2.5,
        "learning_rate": 0.1,
        "grad_norm": 1.0,
        "target_tokens": 4,
        "tokens": 9,
        "seconds": 0.1,
    },
    "mlx-lm": {"fine_tune_type": "lora", "lora_parameters": {"scale": 2.0, "rank": 4}},
}
WORDS = 'null true -1 0 1e308 1e999 NaN "x" [] {} ../../x /etc/passwd a\\u0000b ..\\\\x \\ud800 pissa LOHA'
PIECES = [
    *'{}[]:,"\\\n\0 ',
    *WORDS.split(),
    *("9" * 400, "[" * 3000, '{"a":' * 300, "(a+)+$", "(?R)", "(.*)*(.*)*x", "\x1b[31m"),
]


def read_adapter_folder(place: Path, text: bytes) -> None:
    (place / "adapter_config.json").write_bytes(text)
    (place / "adapter_model.safetensors").write_bytes(save(TENSORS))
    adapter_modules(read_adapter(place), place)


def read_mlx_lm_folder(place: Path, text: bytes) -> None:
    (place / "adapter_config.json").write_bytes(text)
    (place / "adapters.safetensors").write_bytes(save(MLX_TENSORS))
    read_mlx_lm(place, "")


def read_base(place: Path, text: bytes) -> None:
    (place / "config.json").write_bytes(text)
    (place / "model.safetensors").write_bytes(save({"a": np.ones(3, np.float32)}))
    assert inspect_base(place).parameters == 3


def read_index(place: Path, text: bytes) -> None:
    (place / "config.json").write_text('{"model_type": "llama"}')
    (place / "model.safetensors").unlink(missing_ok=True)
    (place / "model-00001-of-00001.safetensors").write_bytes(save({"a": np.ones(3, np.float32)}))
    (place / "model.safetensors.index.json").write_bytes(text)
    assert inspect_base(place).parameters == 3


def read_manifest(place: Path, text: bytes) -> None:
    (place / "manifest.json").write_bytes(text)
    (place / "factors.safetensors").write_bytes(b"123456789")
    read_checkpoint(place)


def read_run(place: Path, text: bytes) -> None:
    (place / "run.json").write_bytes(text)
    read_record(place)


def read_metrics(place: Path, text: bytes) -> None:
    file = place / "metrics.jsonl"
    file.write_bytes(text + b"\n" + text)
    read_events(file)
    kept_lines(file, 5)
    last_step(file)


READERS: Mapping[str, Callable[[Path, bytes], None]] = {
    "adapter_config.json": read_adapter_folder,
    "config.json": read_base,
    "model.safetensors.index.json": read_index,
    "manifest.json": read_manifest,
    "run.json": read_run,
    "metrics.jsonl": read_metrics,
    "mlx-lm": read_mlx_lm_folder,
}


@st.composite
def foreign_files(draw: st.DrawFn) -> tuple[str, bytes]:
    name = draw(st.sampled_from(sorted(READERS)))
    indent = draw(st.sampled_from([None, 1]))
    text = draw(spoiled([json.dumps(TEXTS[name], indent=indent)], PIECES))
    return name, text.encode("utf-8", "surrogatepass")


@st.composite
def spoiled_tensors(draw: st.DrawFn) -> bytes:
    """A file of tensors with another header: JSON of the same length, or of any."""
    raw = save(TENSORS)
    length = int.from_bytes(raw[:8], "little")
    header = draw(spoiled([raw[8 : 8 + length].decode()], PIECES)).encode("utf-8", "surrogatepass")
    claimed = draw(st.sampled_from([len(header), length, 0, 2**63, len(raw)]))
    return claimed.to_bytes(8, "little") + header + raw[8 + length :]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("foreign")


def folder(place: Path, name: str) -> Path:
    (place / name).mkdir(exist_ok=True)
    return place / name


@SAMPLE
@given(given_file=foreign_files())
def test_a_spoiled_foreign_file_is_read_or_refused(
    given_file: tuple[str, bytes], met: Callable[[str], Any], place: Path
) -> None:
    name, text = given_file
    with met("foreign files")(given_file):
        READERS[name](folder(place, name), text)


@SAMPLE
@given(content=spoiled_tensors())
def test_spoiled_tensors_are_read_or_refused(content: bytes, met: Callable[[str], Any], place: Path) -> None:
    where = folder(place, "tensors")
    (where / "adapter_config.json").write_text(json.dumps(TEXTS["adapter_config.json"]))
    (where / "adapter_model.safetensors").write_bytes(content)
    with met("tensors")(content):
        adapter_modules(read_adapter(where), where)


PATTERNS = spoiled(["(.*\\.)?q_proj", "layers\\.[0-7]"], PIECES)


@pytest.fixture(scope="module")
def short_time() -> Iterator[None]:
    """Less than a person's pattern has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("soup_xb.core.base.patterns.SECONDS_PER_PATTERN", 0.2)
        yield


@SAMPLE
@given(pattern=st.text("qvproj_.*+?()[]{}|\\^$:=!<>R0123,-", max_size=40) | PATTERNS)
def test_any_pattern_matches_or_is_refused(pattern: str, met: Callable[[str], Any], short_time: None) -> None:
    with met("patterns")(pattern):
        matching_names(pattern, [MODULE] * 8)


@pytest.mark.torture
@full(3_000)
@given(given_file=foreign_files())
def test_three_thousand_spoiled_foreign_files(
    given_file: tuple[str, bytes], met: Callable[[str], Any], place: Path
) -> None:
    name, text = given_file
    with met("foreign files, all of them")(given_file):
        READERS[name](folder(place, name), text)
