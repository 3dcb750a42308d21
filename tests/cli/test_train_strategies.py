"""pissa, olora and ReLoRA from file to adapter, as a user runs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from processes import in_two_processes

from soup_xb.core.adapter.peft_file import read_adapter
from soup_xb.core.config.support_rows import BACKENDS

Soupx = Callable[..., Any]


@pytest.fixture
def config(tmp_path: Path, tiny_llama: Path, chat_file: Path) -> Callable[..., Path]:
    """Writes a small config; `lora` and keyword arguments are lines of `training`."""

    def write(lora: dict[str, Any] | None = None, **training: Any) -> Path:
        settings = {"max_steps": 9, "lr": 0.005, "lora": {"r": 4, "alpha": 8, **(lora or {})}, **training}
        content = {
            "base": str(tiny_llama),
            "backend": "torch",
            "data": {"train": str(chat_file), "max_length": 128},
            "training": settings,
            "output": str(tmp_path / "out"),
        }
        file = tmp_path / "soup.yaml"
        file.write_text(json.dumps(content, indent=1))
        return file

    return write


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def stock_difference(base: Path, adapter: Path) -> float:
    tokens = torch.arange(3, 40)[None]
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        before = model(tokens).logits.clone()
        after = PeftModel.from_pretrained(model, adapter)(tokens).logits
    return float((after - before).abs().max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strategy", ["pissa", "olora"])
def test_a_start_from_the_weights_ends_as_plain_lora(
    soupx: Soupx, config: Callable[..., Path], tmp_path: Path, tiny_llama: Path, strategy: str, backend: str
) -> None:
    file = config({"init_strategy": strategy, "use_rslora": True, "dropout": 0.1})
    done = soupx("train", file, "--backend", backend)
    assert done.code == 0, done.err
    assert "warning[start-not-exact]" in done.err
    adapter = tmp_path / "out" / "adapter"
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["init_lora_weights"] is True and settings["use_rslora"] is False
    assert settings["r"] == 8
    assert settings["lora_alpha"] / 8 == pytest.approx(8 / 4**0.5)
    assert "--max-lora-rank 8" in (adapter / "README.md").read_text()
    assert stock_difference(tiny_llama, adapter) > 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_older_spelling_of_olora_trains_the_same_adapter(
    soupx: Soupx, config: Callable[..., Path], tmp_path: Path, backend: str
) -> None:
    weights = []
    for lora in ({"init_strategy": "olora"}, {"use_olora": True}, {}):
        done = soupx("train", config(lora), "--backend", backend, "--overwrite")
        assert done.code == 0, done.err
        weights.append((tmp_path / "out" / "adapter" / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_two_mlx_processes_start_alike_and_have_the_losses_of_one(
    soupx: Soupx, config: Callable[..., Path], tmp_path: Path
) -> None:
    words = ("train", config({"init_strategy": "pissa"}), "--backend", "mlx", "--output")
    alone = soupx(*words, tmp_path / "one")
    assert alone.code == 0, alone.err
    together = in_two_processes("mlx", "-m", "soup_xb", *words, tmp_path / "two")
    assert together.codes == (0, 0), together.err
    one, two = (events(tmp_path / name, "step") for name in ("one", "two"))
    assert [step["loss"] for step in two] == pytest.approx([step["loss"] for step in one], abs=1e-5)
    assert [step["grad_norm"] for step in two] == pytest.approx([step["grad_norm"] for step in one], rel=1e-3)
    assert one[-1]["loss"] < one[0]["loss"]


@pytest.mark.parametrize(("mode", "rank"), [("prune", 4), ("merge", 12)])
def test_restarts_are_told_and_their_adapter_is_plain_lora(
    soupx: Soupx, config: Callable[..., Path], tmp_path: Path, tiny_llama: Path, mode: str, rank: int
) -> None:
    done = soupx("train", config(relora_steps=3, relora_mode=mode))
    assert done.code == 0, done.err
    out = tmp_path / "out"
    fired = events(out, "restart")
    assert [event["step"] for event in fired] == [3, 6]
    for event in fired:
        gone = event["pruned"] / event["entries"]
        assert gone == (0 if mode == "merge" else pytest.approx(0.9, abs=0.05))
        moved = abs(event["loss_after"] - event["loss_before"])
        assert moved < 1e-5 if mode == "merge" else moved > 0
    settings = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (rank, 2 * rank)
    assert stock_difference(tiny_llama, out / "adapter") > 1e-3
    assert "restart" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("backend", "lora", "training"),
    [
        ("torch", {"init_strategy": "pissa"}, {}),
        ("torch", {"init_strategy": "olora"}, {"relora_steps": 3}),
        ("torch", {"init_strategy": "pissa"}, {"relora_steps": 3, "relora_mode": "merge"}),
        ("mlx", {"init_strategy": "pissa"}, {}),
        ("mlx", {"init_strategy": "olora", "dropout": 0.2}, {}),
    ],
    ids=["pissa", "olora-prune", "pissa-merge", "mlx-pissa", "mlx-olora-dropout"],
)
def test_a_run_resumed_in_the_middle_leaves_the_same_adapter(
    soupx: Soupx,
    config: Callable[..., Path],
    tmp_path: Path,
    backend: str,
    lora: dict[str, Any],
    training: dict[str, Any],
) -> None:
    file = config(lora, save_steps=2, **training)
    assert soupx("train", file, "--backend", backend).code == 0
    whole = read_adapter(tmp_path / "out" / "adapter").factors
    checkpoint = tmp_path / "out" / "checkpoints" / "step-00000004"
    done = soupx("train", file, "--backend", backend, "--resume-from", checkpoint)
    assert done.code == 0, done.err
    again = read_adapter(tmp_path / "out" / "adapter").factors
    for name, arrays in whole.items():
        for factor, array in arrays.items():
            assert array.tobytes() == np.asarray(again[name][factor]).tobytes()


def test_a_resume_beside_a_restart_does_not_lose_its_warning(
    soupx: Soupx, config: Callable[..., Path], tmp_path: Path
) -> None:
    steps = {"max_steps": 45, "relora_steps": 25, "relora_prune_ratio": 0.99, "save_steps": 10}
    file = config(lr=0.02, scheduler="constant", **steps)
    assert soupx("train", file).code == 0
    told = warnings(tmp_path / "out", "restart-hurts")
    assert [warning["step"] for warning in told] == [45]
    for done in (20, 30):
        checkpoint = tmp_path / "out" / "checkpoints" / f"step-{done:08}"
        assert soupx("train", file, "--resume-from", checkpoint).code == 0
        assert warnings(tmp_path / "out", "restart-hurts") == told


def warnings(folder: Path, code: str) -> list[dict[str, Any]]:
    return [event for event in events(folder, "notice") if event["code"] == code and event["warning"]]


def test_a_merge_with_dora_is_refused(soupx: Soupx, config: Callable[..., Path]) -> None:
    done = soupx("check", config({"use_dora": True}, relora_steps=3, relora_mode="merge"))
    assert done.code == 2
    assert "error[contradiction]" in done.err and "DoRA" in done.err


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha", [32, 12], ids=["exact", "rounded"])
def test_a_warm_start_from_either_form_of_an_adapter_is_the_same(
    soupx: Soupx, config: Callable[..., Path], tmp_path: Path, backend: str, alpha: int
) -> None:
    lora = {"rank_pattern": {"down_proj": 2, "q_proj": 8}, "alpha_pattern": {"q_proj": alpha}}
    file = config(lora, max_steps=3)
    assert soupx("train", file, "--backend", backend).code == 0
    done = soupx("export", tmp_path / "out", "--to", "peft", "--compact", "--output", tmp_path / "compact")
    assert done.code == 0, done.err
    settings = json.loads((tmp_path / "compact" / "adapter_config.json").read_text())
    assert sorted(set(settings["rank_pattern"].values())) == [2, 8]
    losses, saved = [], []
    for form in ("out", "compact"):
        output = tmp_path / f"from-{form}"
        asked = ["--set", f"adapter={tmp_path / form}", "--set", f"output={output}"]
        assert soupx("train", file, "--backend", backend, *asked).code == 0
        losses.append([step["loss"] for step in events(output, "step")])
        saved.append((output / "adapter" / "adapter_model.safetensors").read_bytes())
    if alpha == 32:
        assert saved[0] == saved[1]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
