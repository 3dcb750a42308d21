"""Gemma 4 from file to adapter: plan, train on one and two processes, resume, merge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from processes import in_two_processes
from safetensors.torch import load_file

Soupx = Callable[..., Any]
Config = Callable[..., Path]
PATCH = "34 clippable linears, 22 of them with finite clamps, take adapters on their inner linear"


@pytest.fixture
def config(tmp_path: Path, tiny_gemma4: Path, chat_file: Path) -> Config:
    """Writes a small config; keyword arguments are lines of `training.lora`."""

    def write(**lora: Any) -> Path:
        content = {
            "base": str(tiny_gemma4),
            "backend": "torch",
            "data": {"train": str(chat_file), "val_split": 0.1, "max_length": 128},
            "training": {
                "max_steps": 4,
                "lr": 0.005,
                "batch_size": 4,
                "save_steps": 2,
                "lora": {"r": 4, **lora},
            },
            "output": str(tmp_path / "out"),
        }
        file = tmp_path / "soup.yaml"
        file.write_text(json.dumps(content, indent=1))
        return file

    return write


def losses(folder: Path) -> list[float]:
    events = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [event["loss"] for event in events if event["event"] == "step"]


def test_plan_names_the_inner_linears_without_weights(
    soupx: Soupx, config: Config, tiny_gemma4: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "renamed"
    bare.mkdir()
    for file in tiny_gemma4.iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    file = config(target_modules=["q_proj", "post"], rank_pattern={"post": 2})
    done = soupx("plan", file, "--set", f"base={bare}", "--json")
    assert done.code == 0, done.err
    rows = {row["name"]: (row["count"], row["rank"]) for row in json.loads(done.out)["modules"]}
    assert rows == {"q_proj.linear": (4, 4), "q_proj": (4, 4), "post.linear": (2, 2)}
    assert (
        "note: 34 clippable linears, 34 of them with clamps, take adapters on their inner linear" in done.err
    )
    assert "warning[no-gradient]" in done.err


def test_a_run_tells_what_text_does_not_train_and_saves_an_adapter_for_stock_peft(
    soupx: Soupx, config: Config, tiny_gemma4: Path, tmp_path: Path
) -> None:
    file = config(target_modules=["q_proj", "v_proj"])
    one = soupx("train", file, "--output", tmp_path / "one")
    assert one.code == 0, one.err
    two = in_two_processes("torch", "-m", "soup_xb", "train", file)
    assert two.codes == (0, 0), two.err
    untrained = "8 adapted modules in the vision and audio towers get no gradient from text rows"
    for told in (one.err, two.err):
        assert told.count(f"note: {PATCH}") == told.count(untrained) == 1
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    factors = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    moved = {name: bool(tensor.any()) for name, tensor in factors.items() if "lora_B" in name}
    assert moved == {name: ".language_model." in name for name in moved}
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_gemma4, dtype=torch.float32)
    stock = PeftModel.from_pretrained(model, tmp_path / "out" / "adapter")
    assert sum("lora_A" in name for name, _ in stock.named_parameters()) == len(moved) == 14
    again = soupx(
        "train",
        file,
        "--output",
        tmp_path / "one",
        "--resume-from",
        tmp_path / "one/checkpoints/step-00000002",
    )
    assert again.code == 0, again.err


def test_the_adapter_of_auto_leaves_the_wrappers_alone_in_stock_peft(
    soupx: Soupx, config: Config, tiny_gemma4: Path, tmp_path: Path
) -> None:
    done = soupx("train", config())
    assert done.code == 0, done.err
    assert "no-gradient" not in done.err
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_gemma4, dtype=torch.float32)
    stock = PeftModel.from_pretrained(model, tmp_path / "out" / "adapter")
    adapted = [name for name, _ in stock.named_parameters() if "lora_B" in name]
    assert adapted and all(".language_model.layers." in name for name in adapted)


def test_a_merged_model_keeps_towers_and_clamps(
    soupx: Soupx, config: Config, tiny_gemma4: Path, tmp_path: Path
) -> None:
    assert soupx("train", config(target_modules=["q_proj", "v_proj"])).code == 0
    done = soupx("merge", tmp_path / "out", "--output", tmp_path / "merged")
    assert done.code == 0, done.err
    base, merged = (load_file(folder / "model.safetensors") for folder in (tiny_gemma4, tmp_path / "merged"))
    assert base.keys() == merged.keys()
    changed = {name for name, tensor in base.items() if not torch.equal(tensor, merged[name])}
    assert changed == {
        name
        for name in base
        if ".language_model." in name and name.endswith(("q_proj.weight", "v_proj.weight"))
    }


def test_targets_in_towers_alone_are_refused(soupx: Soupx, config: Config) -> None:
    done = soupx("train", config(target_modules=["post"]))
    assert done.code == 2
    assert "error[towers-alone]" in done.err
    assert "all 2 adapted modules are in vision and audio towers" in done.err


def test_mlx_refuses_the_towers_with_its_own_message(soupx: Soupx, config: Config) -> None:
    done = soupx("train", config(target_modules=["q_proj"]), "--backend", "mlx")
    assert done.code == 2
    assert "error[mlx-no-towers]" in done.err
    assert "mlx-lm opens the text model without its vision and audio towers" in done.err
