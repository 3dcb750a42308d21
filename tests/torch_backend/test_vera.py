from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.numpy import load_file, save_file

from soup_xb.core.adapter.peft_file import read_adapter, saved_form, write_adapter
from soup_xb.core.adapter.vera import SHARED, first_factors, shared_entries
from soup_xb.core.base.modules import AdapterModule, Module, resolve_adapters
from soup_xb.core.config.load import parse_config
from soup_xb.core.config.schema import LoraConfig
from soup_xb.core.config.support_rows import BACKENDS
from soup_xb.core.errors import ConfigError, ModelError
from soup_xb.core.run.events import StepEvent
from soup_xb.core.run.loop import Hooks, run_loop
from soup_xb.runs.adapters import TrainedOptions, open_trained
from soup_xb.runs.export import ExportOptions, export_adapter, merge_adapter
from soup_xb.runs.resume import TrainOptions
from soup_xb.runs.train import train as run_file

Attached = Callable[..., Any]
Soupx = Callable[..., Any]
TOKENS = np.array([[5, 9, 40, 77, 200, 31, 8]])
VERA = {"use_vera": True, "r": 8}
# Sides 64 x 64, 64 x 128 and 128 x 64: every projection is sliced somewhere.
MIXED = ("q_proj", "down_proj", "up_proj")


def train(
    session: Any, plan: Any, save: Callable[[int], None] = lambda step: None, done: int = 0
) -> list[Any]:
    events: list[Any] = []
    run_loop(plan, session, Hooks(events.append, save, lambda: 0), done)
    return [event for event in events if isinstance(event, StepEvent)]


def save_model(folder: Path, config: Any) -> Path:
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2, whose Conv1D layers hold their weights transposed, beside a plain linear head."""
    config = transformers.GPT2Config(
        vocab_size=320,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    return save_model(tmp_path_factory.mktemp("gpt2"), config)


def test_only_the_vectors_train_and_they_are_counted(attached: Attached) -> None:
    session, plan = attached({**VERA, "target_modules": MIXED})
    counts = {adapter.name.rpartition(".")[2]: adapter.parameters for adapter in plan.adapters.modules}
    assert counts == {"q_proj": 8 + 64, "up_proj": 8 + 128, "down_proj": 8 + 64}
    trained = [parameter for parameter in session.model.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == 2 * sum(counts.values())
    before = session.factors()
    losses = [event.loss for event in train(session, plan)]
    after = session.factors()
    assert losses[-1] < losses[0]
    for name, arrays in before.items():
        for factor, array in arrays.items():
            assert np.array_equal(after[name][factor], array) == (name == SHARED), (name, factor)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("quantization", ["none", "4bit", "8bit"])
def test_the_start_is_the_base_to_the_bit(attached: Attached, quantization: str, precision: str) -> None:
    session, plan = attached(VERA, quantization=quantization, precision=precision)
    tokens = plan.rows[0].sequences[0].tokens[None]
    np.testing.assert_array_equal(session.logits(tokens), session.logits(tokens, adapter=False))
    train(session, plan)
    assert np.abs(session.logits(tokens) - session.logits(tokens, adapter=False)).max() > 1e-3
    assert all(
        array.dtype == np.float32 for arrays in session.factors().values() for array in arrays.values()
    )


@pytest.mark.parametrize("targets", ["auto", MIXED, ("q_proj",)], ids=["auto", "mixed", "one"])
def test_stock_peft_gives_the_live_logits(
    attached: Attached, stock_logits: Callable[..., Any], targets: Any
) -> None:
    session, plan = attached({**VERA, "target_modules": targets, "dropout": 0.1})
    train(session, plan)
    tokens = plan.rows[0].sequences[0].tokens[None]
    live, base = session.logits(tokens), session.logits(tokens, adapter=False)
    np.testing.assert_allclose(stock_logits(session, plan, tokens), live, atol=1e-4)
    assert np.abs(live - base).max() > 1e-2


def test_the_projections_are_the_seed_s_and_cut_for_each_module() -> None:
    modules = (
        AdapterModule("a", 64, 32, 4, 4, 1.0, vera=True),
        AdapterModule("b", 16, 128, 4, 4, 1.0, vera=True),
    )
    first = first_factors(modules, seed=7)
    assert {name: array.shape for name, array in first[SHARED].items()} == {
        "vera_A": (4, 128),
        "vera_B": (64, 4),
    }
    assert shared_entries(modules) == 4 * (128 + 64)
    again = first_factors(modules[::-1], seed=7)
    for name, arrays in first.items():
        for factor, array in arrays.items():
            np.testing.assert_array_equal(again[name][factor], array)
    assert not np.array_equal(first_factors(modules, seed=8)[SHARED]["vera_A"], first[SHARED]["vera_A"])
    # The spread is that of PEFT's own start, the Kaiming bound for the whole matrix.
    assert np.abs(first[SHARED]["vera_A"]).max() == pytest.approx((6 / 128) ** 0.5, rel=0.02)
    assert np.abs(first[SHARED]["vera_B"]).max() == pytest.approx((6 / 4) ** 0.5, rel=0.02)


def test_the_file_is_what_stock_peft_writes(attached: Attached, tiny_llama: Path, tmp_path: Path) -> None:
    session, plan = attached({**VERA, "target_modules": MIXED})
    names = [module.name for module in session.describe().modules]
    write_adapter(tmp_path / "ours", saved_form(plan.adapters, session.factors()), str(tiny_llama), names)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    PeftModel.from_pretrained(model, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    ours, theirs = read_adapter(tmp_path / "ours"), read_adapter(tmp_path / "theirs")
    assert {name: arrays.keys() for name, arrays in ours.factors.items()} == {
        name: arrays.keys() for name, arrays in theirs.factors.items()
    }
    for name, arrays in ours.factors.items():
        for factor, array in arrays.items():
            np.testing.assert_array_equal(theirs.factors[name][factor], array)
    assert ours.settings["peft_type"] == "VERA" and ours.settings["save_projection"] is True
    assert ours.settings["target_modules"] == ["down_proj", "q_proj", "up_proj"]


def test_training_is_that_of_peft_s_own_layers(attached: Attached, tiny_llama: Path, tmp_path: Path) -> None:
    session, plan = attached({**VERA, "target_modules": MIXED}, max_steps=3, max_grad_norm=0.0)
    names = [module.name for module in session.describe().modules]
    write_adapter(tmp_path, saved_form(plan.adapters, session.factors()), "base", names)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    peft = PeftModel.from_pretrained(model, tmp_path, is_trainable=True)
    trained = [parameter for parameter in peft.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=plan.config.training.weight_decay)
    for step, event in enumerate(train(session, plan), 1):
        (batch,) = plan.micro_batches(step)
        logits = peft(torch.from_numpy(batch.tokens.astype(np.int64))).logits
        picked = logits.reshape(-1, logits.shape[-1])[torch.from_numpy(batch.positions[batch.weights != 0])]
        loss = torch.nn.functional.cross_entropy(picked, torch.from_numpy(batch.targets[batch.weights != 0]))
        assert event.loss == pytest.approx(loss.item(), abs=2e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = plan.learning_rates.at(step)
        optimizer.step()


def test_a_quantized_base_trains_as_its_weights_read_back(
    attached: Attached, tiny_llama: Path, tmp_path: Path
) -> None:
    from peft.utils.integrations import dequantize_module_weight

    quantized, plan = attached(VERA, quantization="4bit")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        for adapter in plan.adapters.modules:
            weight = dequantize_module_weight(quantized.model.get_submodule(adapter.name).get_base_layer())
            plain.get_submodule(adapter.name).weight.copy_(weight)
    plain.save_pretrained(tmp_path)
    dequantized, same = attached(VERA, base=tmp_path)
    losses = [event.loss for event in train(dequantized, same)]
    np.testing.assert_allclose([event.loss for event in train(quantized, plan)], losses, atol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_resumed_run_goes_on_to_the_same_bytes(attached: Attached, tmp_path: Path, dropout: float) -> None:
    lora = {**VERA, "dropout": dropout}
    whole, plan = attached(lora, save_steps=3)

    def save(step: int) -> None:
        if step == 3:
            whole.save_state(tmp_path)

    losses = [event.loss for event in train(whole, plan, save)]
    # Another seed would begin from other projections: they are the checkpoint's.
    second, _ = attached(lora)
    for name in ("vera_A", "vera_B"):
        projections = {**second.factors()[SHARED], name: second.factors()[SHARED][name] * 2}
        second.load_factors({**second.factors(), SHARED: projections})
    second.load_state(tmp_path)
    assert [event.loss for event in train(second, plan, done=3)] == losses[3:]
    for name, arrays in whole.factors().items():
        for factor, array in arrays.items():
            assert array.tobytes() == second.factors()[name][factor].tobytes()


def test_without_the_adapter_the_base_is_exact_after_training(attached: Attached) -> None:
    session, plan = attached(VERA)
    tokens = plan.rows[0].sequences[0].tokens[None]
    base, loss = session.logits(tokens), session.evaluate(plan.eval_micro_batches())
    train(session, plan)
    np.testing.assert_array_equal(session.logits(tokens, adapter=False), base)
    assert session.evaluate(plan.eval_micro_batches(), adapter=False) == loss
    assert session.evaluate(plan.eval_micro_batches()) != loss


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_merged_model_gives_the_live_logits(
    attached: Attached, tmp_path: Path, checkpointing: bool
) -> None:
    session, plan = attached({**VERA, "target_modules": MIXED}, gradient_checkpointing=checkpointing)
    train(session, plan)
    session.save_merged(tmp_path)
    tokens = plan.rows[0].sequences[0].tokens[None]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        merged = model(torch.tensor(tokens, dtype=torch.int64)).logits.numpy()
    np.testing.assert_allclose(merged, session.logits(tokens), atol=1e-5)


def test_conv1d_layers_train_reload_and_merge(
    attached: Attached, stock_logits: Callable[..., Any], tiny_gpt2: Path, tmp_path: Path
) -> None:
    session, plan = attached({**VERA, "target_modules": ("c_attn", "c_fc", "lm_head")}, base=tiny_gpt2)
    assert {(m.out_features, m.in_features) for m in plan.adapters.modules} == {
        (192, 64),
        (256, 64),
        (320, 64),
    }
    train(session, plan)
    tokens = plan.rows[0].sequences[0].tokens[None]
    live = session.logits(tokens)
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        np.testing.assert_allclose(stock_logits(session, plan, tokens, tiny_gpt2), live, atol=1e-4)
    assert np.abs(live - session.logits(tokens, adapter=False)).max() > 1e-2


def content(base: Path, rows: Path, output: Path, lora: dict[str, Any], **training: Any) -> dict[str, Any]:
    return {
        "base": str(base),
        "backend": "torch",
        "data": {"train": str(rows), "max_length": 128},
        "training": {"max_steps": 6, "lr": 0.05, "lora": {**VERA, **lora}, **training},
        "output": str(output),
    }


@pytest.fixture
def config(tmp_path: Path, tiny_llama: Path, chat_file: Path) -> Callable[..., Path]:
    """Writes a small VeRA config; `lora` and keyword arguments are lines of it and of `training`."""

    def write(
        lora: dict[str, Any] | None = None, adapter: Path | None = None, output: str = "out", **training: Any
    ) -> Path:
        values = content(tiny_llama, chat_file, tmp_path / output, lora or {}, **training)
        file = tmp_path / f"{output}.yaml"
        file.write_text(json.dumps(values | ({"adapter": str(adapter)} if adapter else {}), indent=1))
        return file

    return write


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, chat_file: Path) -> Path:
    """The output folder of a short VeRA run."""
    output = tmp_path_factory.mktemp("run") / "out"
    loaded = parse_config(json.dumps(content(tiny_llama, chat_file, output, {})), "soup.yaml")
    return run_file(loaded, TrainOptions(), ()).folder


def stock_peft_logits(base: Path, adapter: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        return PeftModel.from_pretrained(model, adapter)(torch.from_numpy(TOKENS)).logits.numpy()


def opened_logits(backend: str, base: Path, adapter: Path | None) -> Any:
    with open_trained(TrainedOptions(backend, adapter, str(base))) as opened:
        return opened.session.logits(TOKENS)


def test_a_run_leaves_a_vera_adapter_and_says_where_it_can_be_read(
    soupx: Soupx, config: Callable[..., Path], tmp_path: Path, tiny_llama: Path
) -> None:
    done = soupx("train", config())
    assert done.code == 0, done.err
    assert "not for vLLM, SGLang, llama.cpp, mlx-lm: they do not read VeRA's format" in done.err
    assert f"`soupx export {tmp_path / 'out'} --to peft --output NEW` writes the plain LoRA" in done.err
    trained = tmp_path / "out"
    settings = json.loads((trained / "adapter" / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"]) == ("VERA", 8)
    card = (trained / "adapter" / "README.md").read_text()
    assert card.count("# VeRA adapter for") == 1 and '- "vera"' in card
    assert "soupx export PATH/TO/THIS/FOLDER --to peft" in card and "tuned=plain-lora" in card
    stock = stock_peft_logits(tiny_llama, trained / "adapter")
    assert np.abs(stock - opened_logits("torch", tiny_llama, None)).max() > 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_either_engine_opens_it_as_the_lora_that_it_equals(
    trained: Path, tiny_llama: Path, backend: str, tmp_path: Path
) -> None:
    stock = stock_peft_logits(tiny_llama, trained / "adapter")
    np.testing.assert_allclose(opened_logits(backend, tiny_llama, trained), stock, atol=1e-4)
    merge_adapter(TrainedOptions(backend, trained, str(tiny_llama), "base"), tmp_path / "merged")
    np.testing.assert_allclose(opened_logits("torch", tmp_path / "merged", None), stock, atol=1e-4)


def test_commands_take_it_as_any_adapter(trained: Path, soupx: Soupx, chat_file: Path) -> None:
    told = soupx("eval", trained, "--data", chat_file, "--backend", "torch", "--json")
    assert told.code == 0, told.err
    losses = json.loads(told.out)
    assert losses["adapter"]["loss"] < losses["base"]["loss"]
    answer = soupx(
        "generate", "--adapter", trained, "--prompt", "Hi", "--max-new-tokens", "3", "--backend", "torch"
    )
    assert answer.code == 0, answer.err


def test_the_exported_plain_lora_gives_the_same_logits_in_stock_libraries(
    trained: Path, tiny_llama: Path, soupx: Soupx, tmp_path: Path
) -> None:
    stock = stock_peft_logits(tiny_llama, trained / "adapter")
    for form in ("peft", "mlx-lm"):
        done = soupx("export", trained, "--to", form, "--output", tmp_path / form)
        assert done.code == 0, done.err
        assert "written as the plain LoRA of rank 8" in done.err
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"]) == ("LORA", 8, 8)
    assert "q_proj" in settings["target_modules"]
    np.testing.assert_allclose(stock_peft_logits(tiny_llama, tmp_path / "peft"), stock, atol=1e-5)
    np.testing.assert_allclose(stock_mlx_lm_logits(tiny_llama, tmp_path / "mlx-lm"), stock, atol=1e-4)


def stock_mlx_lm_logits(base: Path, adapter: Path) -> Any:
    import soup_xb.backends.mlx  # isort: skip - loads the fast BLAS before mlx, where there is one
    import mlx.core as mx
    from mlx_lm import load

    assert soup_xb.backends.mlx.__doc__
    model, _ = load(str(base), adapter_path=str(adapter))
    return np.array(model(mx.array(TOKENS)).astype(mx.float32))


def test_a_resumed_run_leaves_the_same_adapter(
    soupx: Soupx, config: Callable[..., Path], tmp_path: Path
) -> None:
    file = config({"dropout": 0.1}, save_steps=2)
    assert soupx("train", file).code == 0
    weights = tmp_path / "out" / "adapter" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    done = soupx("train", file, "--resume-from", tmp_path / "out" / "checkpoints" / "step-00000004")
    assert done.code == 0, done.err
    assert weights.read_bytes() == whole


def test_the_plan_counts_the_vectors(soupx: Soupx, config: Callable[..., Path]) -> None:
    told = soupx("plan", config({"target_modules": ["q_proj", "up_proj"]}), "--json")
    assert told.code == 0, told.err
    plan = json.loads(told.out)
    assert {row["name"]: (row["parameters"], row["scale"]) for row in plan["modules"]} == {
        "q_proj": (2 * (8 + 64), 1.0),
        "up_proj": (2 * (8 + 128), 1.0),
    }
    # float32 vectors with gradient and two moments, and both projections once.
    assert plan["memory_bytes"]["adapter_and_optimizer"] == 4 * (4 * 416 + 8 * (64 + 128))


def test_a_warm_start_goes_on_with_the_saved_vectors_and_projections(
    trained: Path, soupx: Soupx, config: Callable[..., Path], tmp_path: Path
) -> None:
    first = read_adapter(trained / "adapter").factors
    done = soupx("train", config(adapter=trained, output="on", max_steps=1, lr=1e-9, seed=5))
    assert done.code == 0, done.err
    second = read_adapter(tmp_path / "on" / "adapter").factors
    for name, arrays in first.items():
        for factor, array in arrays.items():
            np.testing.assert_allclose(second[name][factor], array, atol=1e-6)


def test_a_plain_run_starts_from_the_lora_that_it_equals(
    trained: Path, soupx: Soupx, config: Callable[..., Path], tmp_path: Path, tiny_llama: Path
) -> None:
    lora = {"use_vera": False, "alpha": 32}
    done = soupx("train", config(lora, adapter=trained, output="on", max_steps=1, lr=1e-9))
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "on/adapter/adapter_config.json").read_text())["peft_type"] == "LORA"
    stock = stock_peft_logits(tiny_llama, trained / "adapter")
    np.testing.assert_allclose(stock_peft_logits(tiny_llama, tmp_path / "on/adapter"), stock, atol=1e-4)
    done = soupx("train", config(adapter=tmp_path / "on", output="back"))
    assert done.code == 4 and "error[adapter-is-lora]" in done.err


@pytest.mark.parametrize(
    ("lora", "training", "words"),
    [
        ({"init_strategy": "pissa"}, {}, "the pissa start does not go with `training.lora.use_vera`"),
        ({"use_olora": True}, {}, "the olora start does not go with"),
        ({"use_dora": True}, {}, "two kinds of adapter"),
        ({"use_rslora": True}, {}, "VeRA has no alpha to scale by"),
        ({"rank_pattern": {"q_proj": 4}}, {}, "share one pair of factors and its rank"),
        ({"alpha_pattern": {"q_proj": 4}}, {}, "its trained vectors scale"),
        ({"target_modules": "auto+experts"}, {}, "experts are 3-D"),
        ({}, {"relora_steps": 3}, "ReLoRA's prune does not go with"),
        ({}, {"relora_steps": 3, "relora_mode": "merge"}, "ReLoRA's merge does not go with"),
    ],
)
def test_what_vera_cannot_be_combined_with_is_refused(
    soupx: Soupx, config: Callable[..., Path], lora: dict[str, Any], training: dict[str, Any], words: str
) -> None:
    done = soupx("check", config(lora, **training))
    assert done.code == 2
    assert done.err.count("error[") == 1 and "error[contradiction]" in done.err and words in done.err


def test_an_alpha_beside_vera_is_told_to_mean_nothing(soupx: Soupx, config: Callable[..., Path]) -> None:
    done = soupx("check", config({"alpha": 64}))
    assert done.code == 0
    assert "warning[key-without-effect]" in done.err and "VeRA has no alpha" in done.err


def test_experts_are_refused_by_their_name() -> None:
    modules = [Module("model.layers.0.mlp.experts.down_proj", 64, 32, experts=4)]
    lora = LoraConfig(use_vera=True, target_modules="down_proj")
    with pytest.raises(ConfigError, match="experts are 3-D") as caught:
        resolve_adapters(modules, lora, {})
    assert caught.value.problems[0].code == "vera-on-experts"


def test_the_dense_layers_of_a_model_of_experts_are_adapted_and_exported(
    attached: Attached, tiny_experts: Callable[..., Path], tmp_path: Path
) -> None:
    # PEFT takes the names of its dense layers for those of experts, in a plain LoRA and not in VeRA.
    base = tiny_experts("deepseek_v3", head_dim=4, num_key_value_heads=4)
    session, plan = attached(VERA, base=base)
    adapted = [adapter for adapter in plan.adapters.modules if adapter.name.startswith("model.layers.0.mlp")]
    assert len(adapted) == 3 and all(adapter.by_weight for adapter in adapted)
    train(session, plan)
    live = session.logits(TOKENS)
    names = [module.name for module in session.describe().modules if not module.experts]
    write_adapter(tmp_path / "vera", saved_form(plan.adapters, session.factors()), str(base), names)
    export_adapter(tmp_path / "vera", tmp_path / "plain", ExportOptions("peft"))
    for folder in ("vera", "plain"):
        np.testing.assert_allclose(stock_peft_logits(base, tmp_path / folder), live, atol=1e-4)
    np.testing.assert_allclose(opened_logits("torch", base, tmp_path / "plain"), live, atol=1e-4)


def damaged(change: Callable[[dict[str, Any]], None], source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return folder


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda tensors: tensors.pop("base_model.vera_A"), "adapter-without-projections"),
        (
            lambda tensors: tensors.update({"base_model.vera_A": np.ones((3, 128), np.float32)}),
            "damaged-adapter",
        ),
        (
            lambda tensors: tensors.pop("base_model.model.model.layers.0.mlp.up_proj.vera_lambda_d"),
            "damaged-adapter",
        ),
        (
            lambda tensors: tensors.update({"base_model.vera_B": np.full((128, 8), np.nan, np.float32)}),
            "non-finite-adapter",
        ),
        (
            lambda tensors: tensors.update({"base_model.model.x.lora_A.weight": np.ones(1, np.float32)}),
            "foreign-adapter",
        ),
    ],
)
def test_a_damaged_vera_adapter_is_named(
    trained: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], code: str
) -> None:
    with pytest.raises(ModelError) as caught:
        read_adapter(damaged(change, trained / "adapter", tmp_path / "damaged"))
    assert caught.value.problems[0].code == code


def test_an_adapter_of_another_base_is_named(trained: Path, tiny_gpt2: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such module"):
        export_adapter(trained, tmp_path / "plain", ExportOptions("peft", str(tiny_gpt2)))
    assert not (tmp_path / "plain").exists()
