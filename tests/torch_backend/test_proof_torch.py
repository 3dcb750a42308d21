"""The proof of a saved adapter where torch alone has the kind: merges, VeRA, experts, a tied head, towers, Conv1D."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from attrs import evolve
from safetensors.numpy import load_file, save_file

from soup_xb.core.adapter.peft_file import read_stored, saved_form, write_adapter
from soup_xb.core.adapter.proof import Proof, check_effect, prove
from soup_xb.core.base.modules import reachable_names
from soup_xb.core.errors import ModelError
from soup_xb.core.run.loop import Hooks, run_loop

Attached = Callable[..., Any]
MERGES: dict[str, Any] = {"relora_steps": 3, "relora_mode": "merge", "max_steps": 8}
FIRST = "model.layers.0.self_attn.q_proj"


def train(session: Any, plan: Any, save: Callable[[int], None] = lambda step: None, done: int = 0) -> None:
    run_loop(plan, session, Hooks(lambda event: None, save, lambda: 0), done)


def save(session: Any, plan: Any, folder: Path) -> Path:
    names = reachable_names([module for module in session.describe().modules if not module.experts])
    write_adapter(folder, saved_form(plan.adapters, session.factors()), "base", names)
    return folder


def proof(session: Any, plan: Any, folder: Path) -> Proof:
    """Of the folder as it is: what was written into it is taken to be what lies there."""
    written = evolve(saved_form(plan.adapters, session.factors()), factors=read_stored(folder).factors)
    return prove(session, plan.adapters, folder, written)


def trained(attached: Attached, folder: Path, lora: dict[str, Any], **training: Any) -> tuple[Any, Any, Path]:
    session, plan = attached(lora, **training)
    train(session, plan)
    return session, plan, save(session, plan, folder)


def scale(folder: Path, part: str, factor: float = 1.01) -> str:
    """Multiply the first tensor whose name holds `part`; its name."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = min(name for name in tensors if part in name)
    tensors[name] = tensors[name] * np.float32(factor)
    save_file(tensors, file, metadata={"format": "pt"})
    return name


@pytest.mark.parametrize("strategy", ["random", "pissa", "olora"])
def test_merged_pieces_are_compared_with_the_base_as_it_was_opened(
    attached: Attached, tmp_path: Path, strategy: str
) -> None:
    session, plan, folder = trained(attached, tmp_path, {"init_strategy": strategy}, **MERGES)
    found = proof(session, plan, folder)
    assert found.largest.relative < 1e-5 and not found.warnings()
    scale(folder, f"{FIRST}.lora_B")
    with pytest.raises(ModelError, match=f"`{FIRST}` is off by"):
        proof(session, plan, folder)


def test_a_merge_that_left_no_piece_behind_is_caught(attached: Attached, tmp_path: Path) -> None:
    session, plan = attached(**MERGES)
    train(session, plan)
    session._adapters.pieces[FIRST].pop()
    # Its module has one rank less than the others now, and the file says so.
    folder = save(session, plan, tmp_path)
    with pytest.raises(ModelError, match=rf"1 of 14 modules .* `{FIRST}` is off by"):
        proof(session, plan, folder)


def test_a_base_that_changed_under_merges_is_caught(attached: Attached, tmp_path: Path) -> None:
    session, plan, folder = trained(attached, tmp_path, {}, **MERGES)
    with torch.no_grad():
        session._adapters.layers[FIRST].get_base_layer().weight += 1e-3
    with pytest.raises(ModelError, match=f"`{FIRST}` is off by"):
        proof(session, plan, folder)


def test_a_resumed_run_of_merges_is_proven_against_the_same_base(attached: Attached, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    first, plan = attached(**MERGES, save_steps=4)
    train(first, plan, lambda step: first.save_state(tmp_path / "state") if step == 4 else None)
    second, _ = attached(**MERGES)
    second.load_state(tmp_path / "state")
    train(second, plan, done=4)
    found = proof(second, plan, save(second, plan, tmp_path / "adapter"))
    assert found.largest.relative < 1e-5
    assert found == proof(first, plan, save(first, plan, tmp_path / "other"))


def test_merges_that_bf16_rounds_away_are_a_warning(attached: Attached, tmp_path: Path) -> None:
    session, plan, folder = trained(attached, tmp_path, {}, **MERGES, lr=1e-5, precision="bf16")
    found = proof(session, plan, folder)
    (warning,) = found.warnings()
    assert warning.code == "merges-rounded" and "`precision: fp32`" in warning.help


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_vera_is_proven_as_the_lora_that_it_equals(
    attached: Attached, tmp_path: Path, precision: str
) -> None:
    session, plan, folder = trained(attached, tmp_path, {"use_vera": True, "r": 8}, precision=precision)
    found = proof(session, plan, folder)
    assert found.largest.relative < 1e-6 and len(found.deviations) == len(plan.adapters.modules)
    check_effect(found, plan, folder)
    scale(folder, f"{FIRST}.vera_lambda_b")
    with pytest.raises(ModelError, match=rf"1 of 14 modules .* `{FIRST}` is off by"):
        proof(session, plan, folder)
    fresh, plan = attached({"use_vera": True, "r": 8})
    with pytest.raises(ModelError, match="adds nothing"):
        check_effect(proof(fresh, plan, save(fresh, plan, tmp_path / "fresh")), plan, folder)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "llama4_text"])
@pytest.mark.parametrize("training", [{}, MERGES], ids=["plain", "merge"])
def test_experts_are_compared_one_by_one(
    attached: Attached,
    tiny_experts: Callable[..., Path],
    tmp_path: Path,
    model_type: str,
    precision: str,
    training: dict[str, Any],
) -> None:
    base = tiny_experts(model_type)
    lora = {"r": 2, "alpha": 4, "target_modules": "auto+experts"}
    session, plan, folder = trained(
        attached, tmp_path, lora, base=base, precision=precision, **{"max_steps": 3, **training}
    )
    found = proof(session, plan, folder)
    stacks = [one for one in found.deviations if one.pairs > 1]
    assert stacks and all(one.pairs == 4 for one in stacks)
    if precision == "fp32":
        # A merged sum is rounded with the base's weights, beside which it is small.
        assert found.largest.relative < (5e-5 if training else 1e-6)
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        name = min(name for name in tensors if "experts" in name and "lora_B" in name)
        # Rank-major with the expert last: these columns are the last expert's.
        tensors[name][:, 3::4] *= np.float32(1.05)
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=r"1 of \d+ modules .*experts.* is off by"):
            proof(session, plan, folder)


def test_an_expert_that_no_token_reached_is_counted(
    attached: Attached, tiny_experts: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_experts("qwen3_moe")
    session, plan = attached({"r": 2, "target_modules": "auto+experts"}, base=base, max_steps=2)
    train(session, plan)
    adapters = session._adapters
    name = next(adapter.name for adapter in plan.adapters.modules if adapter.experts)
    with torch.no_grad():
        adapters.layers[name].lora_B["default"].trained[2] = 0
    found = proof(session, plan, save(session, plan, tmp_path))
    text = {problem.code: problem.message for problem in found.notices()}["inert-modules"]
    assert "adds nothing for 1 of 16 experts" in text and "adapted modules" not in text


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"init_strategy": "pissa"}, {"use_vera": True}])
def test_an_adapter_on_a_tied_head_is_proven(
    attached: Attached, tmp_path: Path, kind: dict[str, Any]
) -> None:
    lora = {"target_modules": ("lm_head", "q_proj"), "r": 8, **kind}
    session, plan, folder = trained(attached, tmp_path, lora)
    found = proof(session, plan, folder)
    assert {one.name for one in found.deviations} >= {"lm_head"} and found.largest.relative < 1e-5


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"init_strategy": "olora"}])
def test_linears_inside_clamps_are_proven_and_towers_that_text_does_not_train_are_told(
    attached: Attached, tiny_gemma4: Path, tmp_path: Path, kind: dict[str, Any]
) -> None:
    lora = {"target_modules": ("q_proj", "v_proj"), **kind}
    session, plan, folder = trained(attached, tmp_path, lora, base=tiny_gemma4, max_steps=3)
    found = proof(session, plan, folder)
    assert found.largest.relative < 1e-5
    check_effect(found, plan, folder)
    towers = [adapter.name for adapter in plan.adapters.modules if "tower" in adapter.name]
    assert towers and all(name.endswith(".linear") for name in towers)
    told = {problem.code: problem.message for problem in found.notices()}["inert-modules"]
    assert f"in {len(towers)} of {len(plan.adapters.modules)} adapted modules (first `{towers[0]}`)" in told


@pytest.mark.parametrize(
    "kind", [{}, {"use_dora": True}, {"init_strategy": "pissa"}, {"use_vera": True}, MERGES]
)
def test_a_conv1d_base_is_proven(
    attached: Attached, save_model: Callable[..., Path], tmp_path: Path, kind: dict[str, Any]
) -> None:
    config = transformers.GPT2Config(
        vocab_size=320, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    base = save_model(tmp_path / "gpt2", config)
    lora, training = ({}, kind) if "relora_steps" in kind else (kind, {"max_steps": 3})
    lora = {"target_modules": ("c_attn", "c_fc"), **lora}
    session, plan, folder = trained(attached, tmp_path / "adapter", lora, base=base, **training)
    assert proof(session, plan, folder).largest.relative < 1e-5


def test_a_run_tells_that_its_adapter_is_proven_and_leaves_no_adapter_that_is_not(
    soupx: Callable[..., Any],
    tiny_llama: Path,
    chat_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    content = {
        "base": str(tiny_llama),
        "backend": "torch",
        "data": {"train": str(chat_file)},
        "training": {"max_steps": 2, "lora": {"r": 4}},
        "output": str(out),
    }
    file = tmp_path / "soup.yaml"
    file.write_text(json.dumps(content))
    done = soupx("train", file)
    assert done.code == 0, done.err
    assert "the adapter adds what the trained model adds on each of its 14 modules" in done.err
    assert (out / "adapter" / "adapter_config.json").is_file()
    # A writer with a fault: alpha is one too many.
    import soup_xb.core.adapter.peft_file as adapter_file

    own = adapter_file.adapter_settings
    monkeypatch.setattr(
        adapter_file,
        "adapter_settings",
        lambda *words: own(*words) | {"lora_alpha": own(*words)["lora_alpha"] + 1},
    )
    done = soupx("train", file, "--overwrite")
    assert done.code == 4
    assert "error[adapter-not-proven]" in done.err and "14 of 14 modules do not add" in done.err
    assert not (out / "adapter").exists()
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "failed" and "adapter-not-proven" in record["error"]
