"""Adapters on 3-D expert weights: what is trained, what is saved, and what stock PEFT makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig as PeftLora
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora.layer import ParamWrapper

from soup_xb.backends.torch.device import choose_device
from soup_xb.backends.torch.injection import lora_layers
from soup_xb.backends.torch.load import load_base
from soup_xb.backends.torch.processes import Processes
from soup_xb.core.adapter.peft_file import adapter_modules, read_adapter, saved_form, write_adapter
from soup_xb.core.errors import ConfigError, ModelError
from soup_xb.core.run.events import StepEvent
from soup_xb.core.run.loop import Hooks, run_loop
from soup_xb.runs.adapters import TrainedOptions, open_trained

Attached = Callable[..., Any]
Bases = Callable[..., Path]
# A dense first layer and shared experts beside the stacks, and heads whose rotary part is the whole of them.
DEEPSEEK = {"head_dim": 4, "num_key_value_heads": 4}
TYPES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "olmoe": {},
    "deepseek_v3": DEEPSEEK,
    "glm4_moe": {},
    "gpt_oss": {},
    "llama4_text": {"interleave_moe_layer_step": 1},
}
ALL = {"r": 2, "alpha": 4, "target_modules": "auto+experts"}


def train(
    session: Any, plan: Any, save: Callable[[int], None] = lambda step: None, done: int = 0
) -> list[Any]:
    events: list[Any] = []
    run_loop(plan, session, Hooks(events.append, save, lambda: 0), done)
    return events


def losses(events: list[Any]) -> list[float]:
    return [event.loss for event in events if isinstance(event, StepEvent)]


def first_loss(metrics: Path) -> float:
    events = map(json.loads, metrics.read_text().splitlines())
    return next(event["loss"] for event in events if event["event"] == "step")


def tokens_of(plan: Any) -> Any:
    return plan.rows[0].sequences[0].tokens[None]


def save(session: Any, plan: Any, base: Path, folder: Path) -> Path:
    names = [module.name for module in session.describe().modules if not module.experts]
    write_adapter(folder, saved_form(plan.adapters, session.factors()), str(base), names)
    return folder


def stock(base: Path, adapter: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter)


def logits(model: Any, tokens: Any) -> Any:
    with torch.no_grad():
        return (
            model(input_ids=torch.tensor(tokens, dtype=torch.int64), use_cache=False).logits.float().numpy()
        )


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {
        name.replace(".base_layer", ""): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if ".lora_" not in name
    }


@pytest.mark.parametrize("model_type", TYPES)
def test_auto_experts_trains_every_planned_factor_and_nothing_else(
    attached: Attached, tiny_experts: Bases, model_type: str
) -> None:
    base = tiny_experts(model_type, **TYPES[model_type])
    session, plan = attached(ALL, base=base, max_steps=3, weight_decay=0.0)
    planned = {adapter.name for adapter in plan.adapters.modules}
    stacks = {module.name for module in session.describe().modules if module.experts}
    assert stacks <= planned
    assert len(stacks) == (2 if model_type in ("deepseek_v3", "glm4_moe") else 4)
    assert not any(".gate." in f"{name}." or "router" in name for name in planned)
    assert lora_layers(session.model).keys() == planned
    before, first = weights(session.model), session._adapters.trained()
    tokens = tokens_of(plan)
    true = session.logits(tokens)
    train(session, plan)
    after, last = weights(session.model), session._adapters.trained()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert before.keys() == after.keys()
    for name, arrays in last.items():
        assert all(np.abs(array - first[name][factor]).max() > 0 for factor, array in arrays.items()), name
    np.testing.assert_array_equal(session.logits(tokens, adapter=False), true)
    assert np.abs(session.logits(tokens) - true).max() > 1e-3


@pytest.mark.parametrize("model_type", TYPES)
def test_the_saved_adapter_is_the_live_model_in_stock_peft(
    attached: Attached, tiny_experts: Bases, tmp_path: Path, model_type: str
) -> None:
    base = tiny_experts(model_type, **TYPES[model_type])
    session, plan = attached(ALL, base=base, max_steps=3)
    train(session, plan)
    model, tokens = stock(base, save(session, plan, base, tmp_path)), tokens_of(plan)
    found = lora_layers(model.base_model.model)
    by_weight = {f"{adapter.name}.weight" for adapter in plan.adapters.modules if adapter.by_weight}
    plain = {adapter.name for adapter in plan.adapters.modules if not adapter.by_weight}
    assert found.keys() == plain | by_weight
    np.testing.assert_allclose(logits(model, tokens), session.logits(tokens), atol=1e-4)
    assert np.abs(session.logits(tokens) - session.logits(tokens, adapter=False)).max() > 1e-2
    np.testing.assert_allclose(logits(model.merge_and_unload(), tokens), session.logits(tokens), atol=1e-4)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe"])
def test_auto_reaches_the_dense_first_layer_and_shared_experts_in_stock_peft_too(
    attached: Attached, tiny_experts: Bases, tmp_path: Path, model_type: str
) -> None:
    base = tiny_experts(model_type, **TYPES[model_type])
    session, plan = attached({"r": 2}, base=base, max_steps=3)
    names = {adapter.name for adapter in plan.adapters.modules}
    assert not any(adapter.experts for adapter in plan.adapters.modules)
    assert {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.shared_experts.down_proj"} <= names
    train(session, plan)
    model, tokens = stock(base, save(session, plan, base, tmp_path)), tokens_of(plan)
    assert len(lora_layers(model.base_model.model)) == len(names)
    np.testing.assert_allclose(logits(model, tokens), session.logits(tokens), atol=1e-4)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_dropout_leaves_experts_alone_and_stays_on_attention(
    attached: Attached, tiny_experts: Bases, model_type: str
) -> None:
    wrap = ParamWrapper.__init__
    session, plan = attached({**ALL, "dropout": 0.1}, base=tiny_experts(model_type), max_steps=3)
    layers = session._adapters.layers
    for adapter in plan.adapters.modules:
        dropout = layers[adapter.name].lora_dropout["default"]
        assert isinstance(dropout, torch.nn.Identity if adapter.experts else torch.nn.Dropout)
        assert adapter.experts or dropout.p == 0.1
    (told,) = [notice.message for notice in session.notices() if notice.code == "expert-dropout"]
    assert told.startswith(f"{model_type}: dropout 0.1 is off on 4 expert weights")
    assert told.endswith("stays on 8 other modules")
    assert ParamWrapper.__init__ is wrap
    assert all(np.isfinite(losses(train(session, plan))))
    session.close()
    assert ParamWrapper.__init__ is wrap


def test_without_the_strip_peft_would_refuse(tiny_experts: Bases) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_experts("mixtral"))
    names = ["model.layers.0.mlp.experts.down_proj"]
    config = PeftLora(target_modules=[], target_parameters=names, lora_dropout=0.1)
    with pytest.raises(ValueError, match="does not work with lora_dropout"):
        inject_adapter_in_model(config, model)


def test_the_strip_is_undone_when_attaching_fails(
    attached: Attached, tiny_experts: Bases, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrap = ParamWrapper.__init__

    def fail(*_: Any) -> None:
        assert ParamWrapper.__init__ is not wrap
        raise ModelError("broken", "the injection fails")

    monkeypatch.setattr("soup_xb.backends.torch.adapters.inject", fail)
    with pytest.raises(ModelError, match="the injection fails"):
        attached({**ALL, "dropout": 0.1}, base=tiny_experts("mixtral"))
    assert ParamWrapper.__init__ is wrap


@pytest.mark.parametrize("lora", [{**ALL, "dropout": 0.0}, {"r": 2, "dropout": 0.1}])
def test_the_strip_is_silent_without_a_dropout_or_without_expert_targets(
    attached: Attached, tiny_experts: Bases, lora: dict[str, Any]
) -> None:
    session, _ = attached(lora, base=tiny_experts("mixtral"))
    assert "expert-dropout" not in {notice.code for notice in session.notices()}


# A false alarm of PEFT's: it follows patterns for parameters, and warns that they match no module.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("rslora", [False, True])
def test_a_rank_for_each_group_of_experts_is_kept_by_file_and_stock_peft(
    attached: Attached, tiny_experts: Bases, tmp_path: Path, rslora: bool
) -> None:
    base = tiny_experts("qwen3_moe")
    ranks = {r"layers\.0\..*experts\.down_proj": 3, r"experts\.down_proj": 5, "q_proj": 1}
    lora = {**ALL, "rank_pattern": ranks, "alpha_pattern": {"gate_up_proj": 7}, "use_rslora": rslora}
    session, plan = attached(lora, base=base, max_steps=3)
    train(session, plan)
    found = {module.name: module for module in plan.adapters.modules}
    assert found["model.layers.0.mlp.experts.down_proj"].rank == 3
    assert found["model.layers.1.mlp.experts.down_proj"].rank == 5
    assert found["model.layers.1.mlp.experts.gate_up_proj"].alpha == 7
    folder = save(session, plan, base, tmp_path)
    assert set(adapter_modules(read_adapter(folder), folder)) == set(plan.adapters.modules)
    model, tokens = stock(base, folder), tokens_of(plan)
    layers = lora_layers(model.base_model.model)
    assert {name: layer.r["default"] for name, layer in layers.items()} == {
        name: module.rank for name, module in found.items()
    }
    np.testing.assert_allclose(logits(model, tokens), session.logits(tokens), atol=1e-4)


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_the_merged_model_gives_the_live_logits(
    attached: Attached, tiny_experts: Bases, tmp_path: Path, model_type: str
) -> None:
    base = tiny_experts(model_type, **TYPES[model_type])
    session, plan = attached(ALL, base=base, max_steps=3)
    train(session, plan)
    session.save_merged(tmp_path)
    model, tokens = transformers.AutoModelForCausalLM.from_pretrained(tmp_path), tokens_of(plan)
    np.testing.assert_allclose(logits(model, tokens), session.logits(tokens), atol=1e-5)


@pytest.mark.parametrize("model_type", ["mixtral", "glm4_moe"])
@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_experts_of_a_base_quantized_while_loading_keep_their_format_and_are_trained(
    attached: Attached, tiny_experts: Bases, tmp_path: Path, quantization: str, model_type: str
) -> None:
    base = tiny_experts(model_type)
    session, plan = attached({**ALL, "dropout": 0.1}, base=base, quantization=quantization, max_steps=3)
    stack = session._adapters.layers["model.layers.1.mlp.experts.down_proj"].get_param()
    assert stack.dtype in (torch.float32, torch.bfloat16)
    first, tokens = session._adapters.trained(), tokens_of(plan)
    true = session.logits(tokens, adapter=False)
    train(session, plan)
    assert all(
        np.abs(array - first[name][factor]).max() > 0
        for name, arrays in session._adapters.trained().items()
        for factor, array in arrays.items()
    )
    np.testing.assert_array_equal(session.logits(tokens, adapter=False), true)
    # Stock PEFT on the base as it is opened here: transformers would compute its linears in another format.
    model = load_base(session.settings, choose_device("auto", Processes()))
    theirs = PeftModel.from_pretrained(model, save(session, plan, base, tmp_path))
    for module in theirs.modules():
        if type(module).__module__.startswith("bitsandbytes"):
            module.training = True
    np.testing.assert_allclose(logits(theirs, tokens), session.logits(tokens), atol=1e-4)


def test_checkpointed_activations_change_no_loss(attached: Attached, tiny_experts: Bases) -> None:
    base = tiny_experts("mixtral")
    plain, plan = attached(ALL, base=base, max_steps=3)
    light, _ = attached(ALL, base=base, max_steps=3, gradient_checkpointing=True)
    np.testing.assert_allclose(losses(train(light, plan)), losses(train(plain, plan)), rtol=1e-6)


def test_a_saved_adapter_is_opened_again_on_its_base_and_on_no_other(
    attached: Attached, tiny_experts: Bases, tmp_path: Path
) -> None:
    base = tiny_experts("deepseek_v3", **DEEPSEEK)
    session, plan = attached(ALL, base=base, max_steps=3)
    train(session, plan)
    folder, tokens = save(session, plan, base, tmp_path / "adapter"), tokens_of(plan)
    with open_trained(TrainedOptions("torch", folder, str(base))) as opened:
        np.testing.assert_array_equal(opened.session.logits(tokens), session.logits(tokens))
    other = tiny_experts("deepseek_v3", n_routed_experts=2, **DEEPSEEK)
    with (
        pytest.raises(ModelError, match=r"is \(4, 48, 32\) in the adapter .* is \(2, 48, 32\) there"),
        open_trained(TrainedOptions("torch", folder, str(other))),
    ):
        pass


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
def test_an_expert_adapter_that_peft_trained_and_saved_is_read(tiny_experts: Bases, tmp_path: Path) -> None:
    base = tiny_experts("mixtral")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = PeftLora(r=2, lora_alpha=4, target_modules=["q_proj", "w1", "w2", "w3"])
    theirs = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0.0, 0.2)
    theirs.save_pretrained(tmp_path)
    tokens = np.array([[5, 9, 40, 77, 200, 31, 8]])
    with open_trained(TrainedOptions("torch", tmp_path, str(base))) as opened:
        live, true = opened.session.logits(tokens), opened.session.logits(tokens, adapter=False)
    np.testing.assert_allclose(live, logits(theirs, tokens), atol=1e-4)
    assert np.abs(live - true).max() > 1e-2


@pytest.mark.parametrize(("kind", "reason"), [("dora", "PEFT has no DoRA"), ("vera", "factors are matrices")])
def test_kinds_without_a_form_for_experts_are_refused(
    attached: Attached, tiny_experts: Bases, kind: str, reason: str
) -> None:
    lora = {"r": 2, "target_modules": ("gate_up_proj",), f"use_{kind}": True}
    with pytest.raises(ConfigError, match=reason) as caught:
        attached(lora, base=tiny_experts("mixtral"))
    assert caught.value.problems[0].code == f"{kind}-on-experts"


def test_one_expert_weight_alone_is_an_adapter_for_stock_peft(
    attached: Attached, tiny_experts: Bases, tmp_path: Path
) -> None:
    base = tiny_experts("qwen3_moe")
    session, plan = attached(
        {"r": 2, "target_modules": r"layers\.1\..*\.down_proj", "dropout": 0.1}, base=base, max_steps=3
    )
    assert [adapter.name for adapter in plan.adapters.modules] == ["model.layers.1.mlp.experts.down_proj"]
    train(session, plan)
    model, tokens = stock(base, save(session, plan, base, tmp_path)), tokens_of(plan)
    np.testing.assert_allclose(logits(model, tokens), session.logits(tokens), atol=1e-4)
    assert np.abs(session.logits(tokens) - session.logits(tokens, adapter=False)).max() > 1e-3


def test_a_run_from_a_file_tells_of_the_strip_and_proves_its_adapter(
    soupx: Callable[..., Any], tiny_experts: Bases, chat_file: Path, tmp_path: Path
) -> None:
    content = {
        "base": str(tiny_experts("qwen3_moe")),
        "backend": "torch",
        "data": {"train": str(chat_file), "max_length": 64},
        "training": {"max_steps": 2, "lora": {**ALL, "dropout": 0.1}},
        "output": str(tmp_path / "out"),
    }
    file = tmp_path / "soup.yaml"
    file.write_text(json.dumps(content))
    done = soupx("train", file)
    assert done.code == 0, done.err
    assert done.err.count("dropout 0.1 is off on 4 expert weights") == 1
    assert "experts.gate_up_proj" in (tmp_path / "out" / "adapter" / "README.md").read_text()
    done = soupx("eval", tmp_path / "out", "--data", chat_file, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["adapter"]["loss"] != found["base"]["loss"]
    warm = soupx("train", file, "--output", tmp_path / "again", "--set", f"adapter={tmp_path / 'out'}")
    assert warm.code == 0, warm.err
    first, second = (first_loss(tmp_path / run / "metrics.jsonl") for run in ("out", "again"))
    assert second < first
