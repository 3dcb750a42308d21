"""A saved adapter is proven on every backend: it is read back from its files and compared with the live layers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attrs import evolve
from safetensors.numpy import load_file, save_file

from soup_xb.core.adapter.peft_file import read_stored, saved_form, write_adapter
from soup_xb.core.adapter.proof import Proof, check_effect, prove
from soup_xb.core.base.modules import reachable_names
from soup_xb.core.config.schema import LoraConfig
from soup_xb.core.config.support_rows import BACKENDS
from soup_xb.core.errors import ModelError
from soup_xb.core.run.loop import Hooks, run_loop
from soup_xb.core.run.plan import Plan
from soup_xb.core.run.session import Session

Opener = Callable[..., tuple[Session, Plan]]
Tensors = dict[str, np.ndarray]
LORAS: dict[str, dict[str, Any]] = {
    "random": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora with dropout": {"use_dora": True, "dropout": 0.1},
    "pissa": {"init_strategy": "pissa"},
    "olora with dropout": {"init_strategy": "olora", "use_rslora": True, "dropout": 0.1},
    "patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}},
    "pissa patterns": {"init_strategy": "pissa", "rank_pattern": {"q_proj": 3}},
}
FIRST, SECOND = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
PREFIX = "base_model.model."

every_backend = pytest.mark.parametrize("backend", BACKENDS)


def trained(opener: Opener, backend: str, lora: Mapping[str, Any], **training: Any) -> tuple[Session, Plan]:
    session, plan = opener(backend, lora=LoraConfig(**{"r": 4, "alpha": 8, **lora}), **training)
    run_loop(plan, session, Hooks(lambda event: None, lambda step: None, lambda: 0))
    return session, plan


def save(session: Session, plan: Plan, folder: Path) -> Path:
    names = reachable_names([module for module in session.describe().modules if not module.experts])
    write_adapter(folder, saved_form(plan.adapters, session.factors()), "base", names)
    return folder


def proof(session: Session, plan: Plan, folder: Path) -> Proof:
    """Of the folder as it is: what was written into it is taken to be what lies there."""
    try:
        factors = read_stored(folder).factors
    except ModelError:
        factors = {}
    written = evolve(saved_form(plan.adapters, session.factors()), factors=factors)
    return prove(session, plan.adapters, folder, written)


def tamper(
    folder: Path, tensors: Callable[[Tensors], Any], settings: Callable[[dict[str, Any]], Any]
) -> None:
    found = load_file(folder / "adapter_model.safetensors")
    tensors(found)
    arrays = {name: np.ascontiguousarray(array) for name, array in found.items()}
    save_file(arrays, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    written = json.loads((folder / "adapter_config.json").read_text())
    settings(written)
    (folder / "adapter_config.json").write_text(json.dumps(written))


def unchanged(_found: Any) -> None:
    pass


def key(name: str, factor: str) -> str:
    return f"{PREFIX}{name}.{factor}.weight"


def scale_one(found: Tensors) -> None:
    found[key(FIRST, "lora_B")] *= np.float32(1.01)


def swap_two(found: Tensors) -> None:
    for factor in ("lora_A", "lora_B"):
        one, two = key(FIRST, factor), key(SECOND, factor)
        found[one], found[two] = found[two], found[one]


def transpose_square(found: Tensors) -> None:
    """B A of a square weight as its transpose: every shape still fits."""
    a, b = key(FIRST, "lora_A"), key(FIRST, "lora_B")
    found[a], found[b] = found[b].T, found[a].T


def transpose_one(found: Tensors) -> None:
    found[key(FIRST, "lora_A")] = found[key(FIRST, "lora_A")].T


def lose_one(found: Tensors) -> None:
    for factor in ("lora_A", "lora_B"):
        del found[key(FIRST, factor)]


TAMPERED: dict[str, tuple[Callable[[Tensors], Any], Callable[[dict[str, Any]], Any], str]] = {
    "a factor times 1.01": (scale_one, unchanged, rf"1 of 14 modules .* `{FIRST}` is off by 0\.0"),
    "two modules swapped": (swap_two, unchanged, r"2 of 14 modules do not add"),
    "a square pair transposed": (transpose_square, unchanged, rf"`{FIRST}` is off by"),
    "a factor transposed": (transpose_one, unchanged, "cannot be read back: .* do not belong together"),
    "a module lost": (lose_one, unchanged, rf"1 modules are not the trained ones: `{FIRST}` is missing"),
    "alpha": (unchanged, lambda words: words.update(lora_alpha=9), r"14 of 14 modules do not add"),
    "alpha of one": (
        unchanged,
        lambda words: words.update(alpha_pattern={r"layers\.0\..*q_proj": 9}),
        rf"1 of 14 modules .* `{FIRST}` is off by 0\.",
    ),
    "rslora": (unchanged, lambda words: words.update(use_rslora=True), "14 of 14 modules do not add"),
    "dora": (unchanged, lambda words: words.update(use_dora=True), "14 of 14 modules do not add"),
    "rank": (unchanged, lambda words: words.update(r=5), "the rank 5, and its factors have 4"),
    "rank of one": (unchanged, lambda words: words.update(rank_pattern={"q_proj": 2}), "the rank 2"),
    "a target lost": (unchanged, lambda words: words["target_modules"].remove("q_proj"), "differ on 2 modules"),
    "a target more": (unchanged, lambda words: words["target_modules"].append("lm_head"), "differ on 1 modules"),
}  # fmt: skip


@every_backend
@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
def test_a_trained_adapter_is_proven(
    opener: Opener, tmp_path: Path, backend: str, lora: dict[str, Any]
) -> None:
    session, plan = trained(opener, backend, lora)
    tokens = plan.rows[0].sequences[0].tokens[None]
    before, factors = session.logits(tokens), session.factors()
    found = prove(session, plan.adapters, save(session, plan, tmp_path), saved_form(plan.adapters, factors))
    assert len(found.deviations) == len(plan.adapters.modules)
    assert found.largest.relative < 5e-6
    assert [problem.code for problem in found.notices()] == ["adapter-proven"] and not found.warnings()
    check_effect(found, plan, tmp_path)
    # The layers that were looked at are as they were.
    np.testing.assert_array_equal(session.logits(tokens), before)
    for name, arrays in session.factors().items():
        for factor, array in arrays.items():
            assert array.tobytes() == factors[name][factor].tobytes()


@every_backend
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("quantization", ["none", "4bit", "8bit"])
@pytest.mark.parametrize("strategy", ["random", "pissa"])
def test_the_format_of_the_base_does_not_blur_the_proof(
    opener: Opener, tmp_path: Path, backend: str, quantization: str, precision: str, strategy: str
) -> None:
    lora = {"init_strategy": strategy}
    session, plan = trained(
        opener, backend, lora, quantization=quantization, precision=precision, max_steps=3
    )
    assert proof(session, plan, save(session, plan, tmp_path)).largest.relative < 1e-6


@every_backend
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("quantization", ["none", "4bit"])
def test_dora_is_proven_on_a_base_of_any_format(
    opener: Opener, tmp_path: Path, backend: str, quantization: str, precision: str
) -> None:
    session, plan = trained(
        opener, backend, {"use_dora": True}, quantization=quantization, precision=precision, max_steps=3
    )
    assert proof(session, plan, save(session, plan, tmp_path)).largest.relative < 1e-5


@every_backend
@pytest.mark.parametrize("change", TAMPERED.values(), ids=TAMPERED)
def test_files_that_say_something_else_are_not_proven(
    opener: Opener, tmp_path: Path, backend: str, change: tuple[Any, Any, str]
) -> None:
    session, plan = trained(opener, backend, {})
    folder = save(session, plan, tmp_path)
    proof(session, plan, folder)
    tensors, settings, words = change
    tamper(folder, tensors, settings)
    with pytest.raises(ModelError, match=words) as caught:
        proof(session, plan, folder)
    (problem,) = caught.value.problems
    assert (problem.code, problem.where) == ("adapter-not-proven", str(folder))
    assert caught.value.exit_code == 4


@every_backend
@pytest.mark.parametrize("lora", [{"use_dora": True}, {"init_strategy": "pissa"}], ids=["dora", "pissa"])
def test_a_scaled_factor_shows_in_every_kind(
    opener: Opener, tmp_path: Path, backend: str, lora: dict[str, Any]
) -> None:
    session, plan = trained(opener, backend, lora)
    folder = save(session, plan, tmp_path)
    tamper(folder, scale_one, unchanged)
    with pytest.raises(ModelError, match=f"`{FIRST}` is off by"):
        proof(session, plan, folder)


@every_backend
def test_a_magnitude_that_is_not_the_trained_one_shows(opener: Opener, tmp_path: Path, backend: str) -> None:
    session, plan = trained(opener, backend, {"use_dora": True})
    folder = save(session, plan, tmp_path)

    def scale(found: Tensors) -> None:
        found[f"{PREFIX}{FIRST}.lora_magnitude_vector"] *= np.float32(1.01)

    tamper(folder, scale, unchanged)
    with pytest.raises(ModelError, match=f"`{FIRST}` is off by"):
        proof(session, plan, folder)


@every_backend
def test_bytes_that_are_not_those_that_were_written_are_told_apart(
    opener: Opener, tmp_path: Path, backend: str
) -> None:
    session, plan = trained(opener, backend, {})
    folder = save(session, plan, tmp_path)
    tamper(folder, lambda found: found[key(FIRST, "lora_B")].__imul__(np.float32(1 + 1e-6)), unchanged)
    with pytest.raises(ModelError) as caught:
        prove(session, plan.adapters, folder, saved_form(plan.adapters, session.factors()))
    assert caught.value.problems[0].code == "adapter-not-saved"


@every_backend
@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"init_strategy": "pissa"}])
def test_a_live_layer_that_does_something_else_than_was_written_is_caught(
    opener: Opener, tmp_path: Path, backend: str, lora: dict[str, Any]
) -> None:
    session, plan = trained(opener, backend, lora)
    folder = save(session, plan, tmp_path)
    layer: Any = session._adapters.layers[FIRST]  # type: ignore[attr-defined]
    if backend == "torch":
        layer.scaling["default"] *= 1.01
    else:
        layer[0].scale *= 1.01
    with pytest.raises(ModelError, match=rf"1 of 14 modules .* `{FIRST}` is off by"):
        proof(session, plan, folder)


@every_backend
@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"init_strategy": "pissa"}, {"use_rslora": True}])
def test_an_adapter_that_adds_nothing_is_an_error_of_its_own(
    opener: Opener, tmp_path: Path, backend: str, lora: dict[str, Any]
) -> None:
    session, plan = opener(backend, lora=LoraConfig(r=4, **lora))
    found = proof(session, plan, save(session, plan, tmp_path))
    with pytest.raises(ModelError, match="after 6 steps the adapter adds nothing") as caught:
        check_effect(found, plan, tmp_path)
    (problem,) = caught.value.problems
    assert problem.code == "adapter-inert" and caught.value.exit_code == 4
    assert "training.lr" in problem.help and "0.005" in problem.help


@every_backend
def test_one_module_that_adds_nothing_is_counted(opener: Opener, tmp_path: Path, backend: str) -> None:
    session, plan = trained(opener, backend, {})
    factors = {name: dict(arrays) for name, arrays in session.factors().items()}
    factors[SECOND]["lora_B"] = np.zeros_like(factors[SECOND]["lora_B"])
    session.load_factors(factors)
    found = proof(session, plan, save(session, plan, tmp_path))
    check_effect(found, plan, tmp_path)
    told = {problem.code: problem.message for problem in found.notices()}
    assert f"adds nothing in 1 of 14 adapted modules (first `{SECOND}`)" in told["inert-modules"]


def test_both_backends_measure_the_same(opener: Opener) -> None:
    for lora in ({}, {"use_dora": True}, {"init_strategy": "olora"}):
        (first, plan), (second, _) = (trained(opener, backend, lora, max_steps=2) for backend in BACKENDS)
        for adapter in plan.adapters.modules:
            factors = first.factors()[adapter.name]
            one, two = (session.addition(adapter, factors) for session in (first, second))
            np.testing.assert_allclose(one.added, two.added, atol=2e-3)
            assert one.added.shape == (2, adapter.out_features)
