"""Gemma 4 with its towers: adapters on the linears inside the clamps, and steps on rows of text."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel

from soup_xb.backends.torch.patches.gemma4_clippable import clippable_linears
from soup_xb.core.adapter.peft_file import saved_form, write_adapter
from soup_xb.core.base.modules import reachable_names
from soup_xb.core.run.plan import Plan
from soup_xb.core.run.session import StepSettings

Attached = Callable[..., tuple[Any, Plan]]
TOWERS = {"target_modules": ("q_proj", "v_proj", "ffw_layer_1")}
TEXT = torch.arange(5, 45)[None]


def senses() -> dict[str, torch.Tensor]:
    """A row of text with one picture of 4 x 4 patches (4 soft tokens) and 32 frames of sound (8 soft tokens)."""
    random = torch.Generator().manual_seed(3)
    grid = torch.tensor([(x, y) for y in range(4) for x in range(4)])
    return {
        "input_ids": torch.tensor([[1, 9, *[300] * 4, 17, *[301] * 8, 40, 41]]),
        "pixel_values": torch.rand(1, 16, 48, generator=random),
        "image_position_ids": grid[None],
        "input_features": torch.randn(1, 32, 8, generator=random),
        "input_features_mask": torch.ones(1, 32, dtype=torch.bool),
    }


def outputs(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the text, and of the text with picture and sound."""
    with torch.no_grad():
        return model(input_ids=TEXT).logits, model(**senses()).logits


def untouched(base: Path, auto: Any = transformers.AutoModelForCausalLM) -> Any:
    return auto.from_pretrained(base, dtype=torch.float32).eval()


def train(session: Any, plan: Plan, steps: int = 3) -> list[float]:
    return [
        session.train_step(
            plan.micro_batches(step),
            StepSettings(step, plan.learning_rates.at(step), plan.target_tokens(step)),
        ).loss
        for step in range(1, steps + 1)
    ]


def shake(session: Any) -> None:
    """Move every factor, as training on all senses would."""
    random = np.random.default_rng(0)
    adapters = session._adapters
    adapters.load(
        {
            name: {
                factor: array + random.normal(0, 0.2, array.shape).astype(np.float32)
                for factor, array in arrays.items()
            }
            for name, arrays in adapters.trained().items()
        }
    )


def save(session: Any, plan: Plan, base: Path, folder: Path) -> Path:
    names = reachable_names(session.describe().modules)
    write_adapter(folder, saved_form(plan.adapters, session.factors()), str(base), names)
    return folder


def adapted(plan: Plan, tower: str) -> list[str]:
    return [adapter.name for adapter in plan.adapters.modules if f".{tower}." in adapter.name]


def test_a_suffix_reaches_the_wrappers_of_every_tower_and_lands_on_their_inner_linear(
    attached: Attached, tiny_gemma4: Path
) -> None:
    session, plan = attached({"target_modules": ("q_proj", "post")}, base=tiny_gemma4)
    assert adapted(plan, "vision_tower") == [
        f"model.vision_tower.encoder.layers.{layer}.self_attn.q_proj.linear" for layer in range(2)
    ]
    assert adapted(plan, "audio_tower") == [
        f"model.audio_tower.layers.{layer}.self_attn.{name}.linear"
        for layer in range(2)
        for name in ("q_proj", "post")
    ]
    assert len(adapted(plan, "language_model")) == 4
    layer = session.model.model.vision_tower.encoder.layers[0].self_attn.q_proj
    assert type(layer).__name__ == "Gemma4ClippableLinear"
    assert hasattr(layer.linear, "lora_A")


def test_keys_of_the_maps_reach_the_inner_linears(attached: Attached, tiny_gemma4: Path) -> None:
    lora = TOWERS | {
        "rank_pattern": {"vision_tower.*q_proj": 3, "q_proj": 2},
        "alpha_pattern": {"ffw_layer_1": 6},
    }
    _, plan = attached(lora, base=tiny_gemma4)
    found = {adapter.name: (adapter.rank, adapter.alpha) for adapter in plan.adapters.modules}
    assert found["model.vision_tower.encoder.layers.0.self_attn.q_proj.linear"] == (3, 8)
    assert found["model.audio_tower.layers.1.self_attn.q_proj.linear"] == (2, 8)
    assert found["model.language_model.layers.0.self_attn.q_proj"] == (2, 8)
    assert found["model.audio_tower.layers.0.feed_forward1.ffw_layer_1.linear"] == (4, 6)


def test_auto_is_the_text_decoder_alone(attached: Attached, tiny_gemma4: Path, tmp_path: Path) -> None:
    session, plan = attached(base=tiny_gemma4)
    names = [adapter.name for adapter in plan.adapters.modules]
    assert all(name.startswith("model.language_model.layers.") for name in names)
    assert {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"} <= {
        name.rpartition(".")[2] for name in names
    }
    assert plan.warnings == ()
    shake(session)
    stock = PeftModel.from_pretrained(
        untouched(tiny_gemma4), save(session, plan, tiny_gemma4, tmp_path / "a")
    ).eval()
    for live, reloaded in zip(outputs(session.model), outputs(stock), strict=True):
        torch.testing.assert_close(live, reloaded, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "lora", [{}, {"use_dora": True}, {"init_strategy": "pissa"}, {"init_strategy": "olora"}]
)
def test_the_output_before_training_is_that_of_the_untouched_model(
    attached: Attached, tiny_gemma4: Path, lora: dict[str, Any]
) -> None:
    session, plan = attached(TOWERS | lora, base=tiny_gemma4)
    plain = untouched(tiny_gemma4)
    for live, expected in zip(outputs(session.model), outputs(plain), strict=True):
        if lora.get("use_dora"):
            torch.testing.assert_close(live, expected, rtol=0, atol=1e-4)
        else:
            assert torch.equal(live, expected)
    clamps = [name for name, _ in plain.named_buffers() if name.endswith(("_min", "_max"))]
    assert len(clamps) == 4 * 34
    state = {name.replace(".base_layer.", "."): tensor for name, tensor in session.model.state_dict().items()}
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())
    assert len(adapted(plan, "vision_tower")) == 4


def test_the_clamps_of_the_fixture_matter(tiny_gemma4: Path) -> None:
    model = untouched(tiny_gemma4)
    clamped = outputs(model)[1]
    for name, buffer in model.named_buffers():
        if name.endswith(("_min", "_max")):
            buffer.fill_(-torch.inf if name.endswith("min") else torch.inf)
    assert (outputs(model)[1] - clamped).abs().max() > 0.1


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"init_strategy": "pissa"}, {"use_rslora": True}])
@pytest.mark.parametrize(
    "auto", [transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText]
)
def test_stock_peft_gives_the_live_logits_of_text_and_of_all_senses(
    attached: Attached, tiny_gemma4: Path, tmp_path: Path, lora: dict[str, Any], auto: Any
) -> None:
    session, plan = attached(TOWERS | lora | {"rank_pattern": {"ffw_layer_1": 2}}, base=tiny_gemma4)
    shake(session)
    train(session, plan)
    folder = save(session, plan, tiny_gemma4, tmp_path / "adapter")
    stock = PeftModel.from_pretrained(untouched(tiny_gemma4, auto), folder).eval()
    plain = outputs(untouched(tiny_gemma4))
    # The scales of rsLoRA and of two ranks are in B of the saved file, each entry rounded once more.
    within = 1e-4 if lora.get("use_rslora") else 2e-5
    for live, reloaded, base in zip(outputs(session.model), outputs(stock), plain, strict=True):
        torch.testing.assert_close(live, reloaded, rtol=0, atol=within)
        assert (live - base).abs().max() > 1e-3


def test_an_untrained_adapter_gives_the_same_bits_in_stock_peft(
    attached: Attached, tiny_gemma4: Path, tmp_path: Path
) -> None:
    session, plan = attached(TOWERS, base=tiny_gemma4)
    folder = save(session, plan, tiny_gemma4, tmp_path / "adapter")
    stock = PeftModel.from_pretrained(untouched(tiny_gemma4), folder).eval()
    for live, reloaded in zip(outputs(session.model), outputs(stock), strict=True):
        assert torch.equal(live, reloaded)


def test_a_merged_model_computes_what_the_adapter_does(
    attached: Attached, tiny_gemma4: Path, tmp_path: Path
) -> None:
    session, _ = attached(TOWERS, base=tiny_gemma4)
    shake(session)
    session.save_merged(tmp_path / "merged")
    merged, plain = untouched(tmp_path / "merged"), untouched(tiny_gemma4).state_dict()
    assert merged.state_dict().keys() == plain.keys()
    for name, tensor in merged.state_dict().items():
        piece = session.factors().get(name.removesuffix(".weight"))
        delta = torch.from_numpy(2 * piece["lora_B"] @ piece["lora_A"]) if piece else torch.zeros(())
        torch.testing.assert_close(tensor, plain[name] + delta, rtol=0, atol=1e-6)
    for live, expected in zip(outputs(session.model), outputs(merged), strict=True):
        torch.testing.assert_close(live, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "lora",
    [{"weight_decay": 0.0}, {"weight_decay": 0.5}, {"use_dora": True}, {"init_strategy": "pissa"}],
    ids=["plain", "decay", "dora", "pissa"],
)
def test_rows_of_text_train_the_text_tower_and_leave_the_others_as_they_start(
    attached: Attached, tiny_gemma4: Path, lora: dict[str, Any]
) -> None:
    decay = lora.pop("weight_decay", 0.5)
    session, plan = attached(TOWERS | lora, base=tiny_gemma4, weight_decay=decay, gradient_checkpointing=True)
    before = session._adapters.trained()
    losses = train(session, plan, 4)
    assert all(np.isfinite(losses)) and losses[-1] != losses[0]
    for name, factors in session._adapters.trained().items():
        moved = any(not np.array_equal(array, before[name][factor]) for factor, array in factors.items())
        assert moved == (".language_model." in name), name


def test_what_gets_no_gradient_is_told(attached: Attached, tiny_gemma4: Path) -> None:
    _, plan = attached(TOWERS, base=tiny_gemma4)
    towers = len(adapted(plan, "vision_tower")) + len(adapted(plan, "audio_tower"))
    assert [problem.code for problem in plan.warnings] == ["no-gradient"]
    assert plan.warnings[0].message.startswith(f"{towers} adapted modules in the vision and audio towers")


def test_the_session_says_what_it_did_with_counts(attached: Attached, tiny_gemma4: Path) -> None:
    session, _ = attached(TOWERS, base=tiny_gemma4)
    told = [problem.message for problem in session.notices() if problem.code == "gemma4-clippable-linear"]
    assert told == [
        "34 clippable linears, 22 of them with finite clamps, take adapters on their inner linear"
    ]


def test_after_close_the_model_and_the_library_are_as_before(attached: Attached, tiny_gemma4: Path) -> None:
    code = transformers.models.gemma4.modeling_gemma4.Gemma4ClippableLinear
    methods = dict(vars(code))
    session, _ = attached(TOWERS, base=tiny_gemma4)
    shake(session)
    towers = session.model.model.vision_tower, session.model.model.audio_tower
    session.close()
    assert dict(vars(code)) == methods
    plain = untouched(tiny_gemma4).model
    for tower, expected in zip(towers, (plain.vision_tower, plain.audio_tower), strict=True):
        kinds = [(name, type(module)) for name, module in tower.named_modules()]
        assert kinds == [(name, type(module)) for name, module in expected.named_modules()]
        state = expected.state_dict()
        assert tower.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in tower.state_dict().items())


def test_without_the_name_the_wrappers_are_left_alone(tiny_gemma4: Path) -> None:
    model = untouched(tiny_gemma4)
    model.config.model_type = "mygemma4ish"
    with clippable_linears(model, "somewhere/mygemma4ish") as patch:
        assert not patch.wrappers and not patch.notices
    with clippable_linears(model, "somewhere/Gemma-4-E2B-it") as patch:
        assert len(patch.wrappers) == 34


def test_without_the_architecture_the_name_does_nothing(tiny_llama: Path) -> None:
    model = untouched(tiny_llama)
    with clippable_linears(model, "google/gemma-4-E2B-it") as patch:
        assert not patch.wrappers and not patch.notices


def test_generating_and_logits_work_with_the_towers_there(attached: Attached, tiny_gemma4: Path) -> None:
    from soup_xb.core.run.session import GenerationSettings

    session, _ = attached(TOWERS, base=tiny_gemma4)
    shake(session)
    prompt = np.array([5, 9, 40, 7], np.int32)
    found = session.generate(prompt, GenerationSettings(5, 0.0, (2,)))
    tokens = list(prompt)
    for token in found:
        assert int(session.logits(np.array([tokens]))[0, -1].argmax()) == token
        tokens.append(int(token))


def test_blocks_without_key_or_value_projection_are_no_hindrance(
    attached: Attached, tiny_gemma4: Path
) -> None:
    _, plan = attached({"target_modules": ("k_proj", "v_proj")}, base=tiny_gemma4)
    layers = {int(re.findall(r"layers\.(\d+)", name)[0]) for name in adapted(plan, "language_model")}
    assert layers == {0, 1}
