"""Runs whose adapter adds nothing, as a user meets them: one process, and two that must not wait for each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import in_two_processes

from soup_xb.core.config.support_rows import BACKENDS

Soupx = Callable[..., Any]
Config = Callable[..., Path]
# Too small for a float32: a factor that starts at zero stays there.
NOTHING = 1e-60


@pytest.fixture
def config(tmp_path: Path, tiny_llama: Path, chat_file: Path) -> Config:
    """Writes a small config; keyword arguments are lines of `training.lora`."""

    def write(lr: float, **lora: Any) -> Path:
        content = {
            "base": str(tiny_llama),
            "data": {"train": str(chat_file), "max_length": 128},
            "training": {"max_steps": 3, "lr": lr, "lora": {"r": 4, **lora}},
            "output": str(tmp_path / "out"),
        }
        file = tmp_path / "soup.yaml"
        file.write_text(json.dumps(content))
        return file

    return write


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("lr", "lora"), [(NOTHING, {}), (1e-12, {"init_strategy": "pissa"}), (NOTHING, {"use_dora": True})]
)
def test_a_rate_that_moves_nothing_ends_in_an_error_that_names_it(
    soupx: Soupx, config: Config, tmp_path: Path, backend: str, lr: float, lora: dict[str, Any]
) -> None:
    done = soupx("train", config(lr, **lora), "--backend", backend)
    assert done.code == 4, done.err
    assert "error[adapter-inert]" in done.err
    assert "after 3 steps the adapter adds nothing to the base, in none of its 14 modules" in done.err
    assert f"`training.lr` ({lr:g};" in done.err
    assert not (tmp_path / "out" / "adapter").exists()
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_processes_end_together_where_the_first_one_finds_no_proof(
    config: Config, tmp_path: Path, backend: str
) -> None:
    words = ("train", config(NOTHING), "--backend", backend, "--output", tmp_path / "out")
    done = in_two_processes(backend, "-m", "soup_xb", *words)
    assert done.codes == (4, 4), done.err
    assert done.err.count("error[adapter-inert]") == 1
    assert done.err.count("error[first-process-failed]") == 1
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "failed"
    assert not (tmp_path / "out" / "adapter").exists()
