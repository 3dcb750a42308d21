"""What a user sees of the coverage: in `soupx plan`, at the start of a run, and in the report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Soupx = Callable[..., Any]


@pytest.fixture(scope="module")
def tiny_moe(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2-MoE of eleven layers, the second one dense."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen2MoeConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=11,
        shared_expert_intermediate_size=16, num_attention_heads=4, num_key_value_heads=2, num_experts=4,
        num_experts_per_tok=2, mlp_only_layers=[1], max_position_embeddings=256,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny-moe")
    for file in tiny_llama.iterdir():
        if "token" in file.name or file.suffix == ".jinja":
            shutil.copy(file, folder / file.name)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def config(folder: Path, base: Path, data: Path, **lora: Any) -> Path:
    content = {
        "base": str(base),
        "backend": "torch",
        "data": {"train": str(data), "max_length": 64},
        "training": {"max_steps": 1, "batch_size": 2, "lora": {"r": 2, **lora}},
        "output": str(folder / "out"),
    }
    file = folder / "soup.yaml"
    file.write_text(json.dumps(content))
    return file


def notes(err: str) -> list[str]:
    return [line.partition(": ")[2] for line in err.splitlines() if line.startswith("note: ")]


def test_a_dense_base_is_one_line_of_a_plan_and_nothing_at_the_start(
    soupx: Soupx, tmp_path: Path, tiny_llama: Path, chat_file: Path
) -> None:
    file = config(tmp_path, tiny_llama, chat_file)
    shown = soupx("plan", file)
    assert (
        "reached\n  auto: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj in layers 0-1 (14)\n\n"
        in (shown.out)
    )
    done = soupx("train", file)
    assert done.code == 0, done.err
    assert not [note for note in notes(done.err) if "layer" in note]


def test_a_base_with_experts_names_its_parts_in_the_plan_the_run_and_the_report(
    soupx: Soupx, tmp_path: Path, tiny_moe: Path, chat_file: Path
) -> None:
    file = config(tmp_path, tiny_moe, chat_file)
    plan = json.loads(soupx("plan", file, "--json").out)
    parts = {part["name"]: (part["adapted_count"], part["count"]) for part in plan["coverage"]["parts"]}
    assert parts == {
        "experts": (0, 20),
        "shared experts": (30, 30),
        "dense layers": (3, 3),
        "routers": (0, 20),
    }
    shown = soupx("plan", file).out
    assert "in layer 1 (3) [mlp_only_layers]" in shown
    assert "  experts: not adapted (" in shown
    done = soupx("train", file)
    assert done.code == 0, done.err
    said = [note for note in notes(done.err) if note.partition(":")[0] in parts]
    assert [note.partition(" (")[0] for note in said] == [
        "experts: not adapted", "shared experts: adapted", "dense layers: adapted", "routers: not adapted",
    ]  # fmt: skip
    assert "help: `target_modules: auto+experts` adapts them too." in done.err
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "<td><code>dense layers</code></td><td><p>adapted (mlp.gate_proj" in page


def test_a_pattern_that_misses_layers_is_warned_about_in_plan_and_run(
    soupx: Soupx, tmp_path: Path, tiny_moe: Path, chat_file: Path
) -> None:
    file = config(tmp_path, tiny_moe, chat_file, target_modules=["q_proj", r"layers\.\d\.self_attn\.v_proj"])
    for command in ("plan", "train"):
        done = soupx(command, file)
        assert done.code == 0, done.err
        assert done.err.count("reaches v_proj in layers 0-9, and not in layer 10") == 1
