from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from soup_xb.core.base.folder import inspect_base
from soup_xb.core.errors import ModelError


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"a": np.zeros((3, 4), np.float32), "b": np.zeros(5, np.float32)}, folder / "model.safetensors")
    return folder


def shard(base: Path, names: dict[str, str]) -> None:
    (base / "model.safetensors").rename(base / "model-00001-of-00002.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size - 20])


def trailing(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"more")


DAMAGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "no folder": (shutil.rmtree, "base-not-found", "no such folder"),
    "no config": (lambda b: (b / "config.json").unlink(), "base-config", "there is no config.json"),
    "empty config": (lambda b: (b / "config.json").write_text(""), "base-config", "is not JSON"),
    "a list": (lambda b: (b / "config.json").write_text("[]"), "base-config", "must be an object"),
    "not text": (lambda b: (b / "config.json").write_bytes(b"\xff\xfe{}"), "base-config", "is not JSON"),
    "very deep": (lambda b: (b / "config.json").write_text("[" * 90_000), "base-config", "is not JSON"),
    "no type": (lambda b: (b / "config.json").write_text("{}"), "base-config", "`model_type` is missing"),
    "code": (
        lambda b: (b / "config.json").write_text('{"model_type": "llama", "model_file": "model.py"}'),
        "remote-code",
        "model_file: model.py",
    ),
    "no weights": (lambda b: (b / "model.safetensors").unlink(), "no-weights", "no safetensors file"),
    "pickle": (
        lambda b: (b / "model.safetensors").rename(b / "pytorch_model.bin"),
        "foreign-weights",
        "pytorch_model.bin` is a pickle",
    ),
    "gguf": (lambda b: (b / "model.safetensors").rename(b / "m.gguf"), "foreign-weights", "GGUF"),
    "cut off": (lambda b: half(b / "model.safetensors"), "damaged-weights", "damaged or cut off"),
    "trailing bytes": (lambda b: trailing(b / "model.safetensors"), "damaged-weights", "damaged or cut off"),
    "empty weights": (lambda b: (b / "model.safetensors").write_bytes(b""), "damaged-weights", "cut off"),
    "missing shard": (
        lambda b: shard(
            b, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
        ),
        "missing-shard",
        "1 of 2 shards are missing: model-00002-of-00002.safetensors",
    ),
    "shard outside": (
        lambda b: shard(b, {"a": "../model.safetensors"}),
        "base-index",
        "not a plain file name",
    ),
    "shard of a name that no disk takes": (
        lambda b: shard(b, {"a": "a" * 300 + ".safetensors"}),
        "base-index",
        "not a plain file name",
    ),
    "shard with NUL": (lambda b: shard(b, {"a": "a\0.safetensors"}), "base-index", "not a plain file name"),
    "empty index": (lambda b: shard(b, {}), "base-index", "missing or empty"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_base_is_named_with_its_file(base: Path, damage: str) -> None:
    act, code, words = DAMAGES[damage]
    act(base)
    with pytest.raises(ModelError) as caught:
        inspect_base(base)
    (problem,) = caught.value.problems
    assert problem.code == code
    assert words in problem.message
    assert str(base) in problem.where + problem.message


def test_sizes_come_from_the_headers(base: Path) -> None:
    found = inspect_base(base)
    assert found.parameters == 17
    assert found.weight_bytes == (base / "model.safetensors").stat().st_size
    assert (found.model_type, found.quantization) == ("llama", "")


def test_shards_are_counted_together(base: Path) -> None:
    save_file({"c": np.zeros(8, np.float32)}, base / "model-00002-of-00002.safetensors")
    shard(base, {"a": "model-00001-of-00002.safetensors", "c": "model-00002-of-00002.safetensors"})
    assert inspect_base(base).parameters == 25


def test_the_structure_alone_needs_no_weights(base: Path) -> None:
    (base / "model.safetensors").unlink()
    assert inspect_base(base, weights=False).parameters == 0


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "mlx"),
        ({}, ""),
    ],
)
def test_a_base_that_is_quantized_already_says_so(base: Path, written: dict, expected: str) -> None:
    (base / "config.json").write_text(json.dumps({"model_type": "llama", **written}))
    assert inspect_base(base).quantization == expected
