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
from peft import LoraConfig, get_peft_model
from processes import in_two_processes
from safetensors.numpy import load_file, save_file

from soup_xb.backends.torch.processes import Processes
from soup_xb.backends.torch.starts import weight_starts
from soup_xb.core.errors import CheckpointError, ModelError
from soup_xb.core.run.events import StepEvent
from soup_xb.core.run.loop import Hooks, run_loop
from soup_xb.core.run.session import GenerationSettings

Attached = Callable[..., Any]
STRATEGIES = ("pissa", "olora")


def train(
    session: Any, plan: Any, save: Callable[[int], None] = lambda step: None, done: int = 0
) -> list[Any]:
    events: list[Any] = []
    run_loop(plan, session, Hooks(events.append, save, lambda: 0), done)
    return [event for event in events if isinstance(event, StepEvent)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("quantization", ["none", "4bit", "8bit"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_start_is_the_base_to_the_bit(
    attached: Attached, strategy: str, quantization: str, precision: str
) -> None:
    session, plan = attached({"init_strategy": strategy}, quantization=quantization, precision=precision)
    tokens = plan.rows[0].sequences[0].tokens[None]
    np.testing.assert_array_equal(session.logits(tokens), session.logits(tokens, adapter=False))
    assert all(np.abs(arrays["lora_A"]).max() > 0 for arrays in session.factors().values())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_factors_and_training_are_those_of_peft_s_own_start(
    attached: Attached, tiny_llama: Path, strategy: str
) -> None:
    session, plan = attached({"init_strategy": strategy}, max_steps=3, max_grad_norm=0.0, weight_decay=0.0)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    names = [adapter.name for adapter in plan.adapters.modules]
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=names, init_lora_weights=strategy)
    peft = get_peft_model(model, settings)
    theirs = {name: peft.get_submodule(f"base_model.model.{name}") for name in names}
    for name, layer in theirs.items():
        start = session._adapters.starts[name]
        a, b = (factors["default"].weight.detach().numpy() for factors in (layer.lora_A, layer.lora_B))
        # Random weights have close singular values: float32's rounding turns the last directions by a few 1e-6,
        # as much as the BLAS in the process wills. A wrong triplet would show at 1e-2.
        np.testing.assert_allclose(start.b @ start.a, b @ a, atol=1e-5)
        # Singular vectors are theirs up to sign; the rule for signs is ours, so their factors are set to ours.
        layer.lora_A["default"].weight.data = torch.from_numpy(start.a.copy())
        layer.lora_B["default"].weight.data = torch.from_numpy(start.b.copy())
    trained = [parameter for parameter in peft.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
    for step, event in enumerate(train(session, plan), 1):
        losses = 0.0
        for batch in plan.micro_batches(step):
            logits = peft(torch.from_numpy(batch.tokens.astype(np.int64))).logits
            picked = logits.reshape(-1, logits.shape[-1])[
                torch.from_numpy(batch.positions[batch.weights != 0])
            ]
            losses += torch.nn.functional.cross_entropy(
                picked, torch.from_numpy(batch.targets[batch.weights != 0]), reduction="sum"
            )
        loss = losses / plan.target_tokens(step)
        assert event.loss == pytest.approx(loss.item(), abs=2e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = plan.learning_rates.at(step)
        optimizer.step()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_saved_adapter_is_plain_lora_on_the_untouched_base(
    attached: Attached, stock_logits: Callable[..., Any], strategy: str, rslora: bool
) -> None:
    lora = {"init_strategy": strategy, "use_rslora": rslora, "rank_pattern": {"q_proj": 3}, "r": 4}
    session, plan = attached(lora)
    train(session, plan)
    tokens = plan.rows[0].sequences[0].tokens[None]
    live, base = session.logits(tokens), session.logits(tokens, adapter=False)
    np.testing.assert_allclose(stock_logits(session, plan, tokens), live, atol=1e-4)
    assert np.abs(live - base).max() > 1e-2
    ranks = {arrays["lora_A"].shape[0] for arrays in session.factors().values()}
    assert ranks == {6, 8}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_the_adapter_the_base_is_exact_after_training(attached: Attached, strategy: str) -> None:
    session, plan = attached({"init_strategy": strategy})
    tokens = plan.rows[0].sequences[0].tokens[None]
    base, loss = session.logits(tokens), session.evaluate(plan.eval_micro_batches())
    answer = session.generate(tokens[0][:6], GenerationSettings(5, 0.0, (2,)))
    train(session, plan)
    np.testing.assert_array_equal(session.logits(tokens, adapter=False), base)
    assert session.evaluate(plan.eval_micro_batches(), adapter=False) == loss
    again = session.generate(tokens[0][:6], GenerationSettings(5, 0.0, (2,)), adapter=False)
    assert again.tolist() == answer.tolist()
    assert session.evaluate(plan.eval_micro_batches()) != loss


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_merged_model_gives_the_live_logits(attached: Attached, tmp_path: Path, strategy: str) -> None:
    session, plan = attached({"init_strategy": strategy})
    train(session, plan)
    session.save_merged(tmp_path)
    tokens = plan.rows[0].sequences[0].tokens[None]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        merged = model(torch.tensor(tokens, dtype=torch.int64)).logits.numpy()
    np.testing.assert_allclose(merged, session.logits(tokens), atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_resumed_run_goes_on_to_the_same_bytes(
    attached: Attached, tmp_path: Path, strategy: str, dropout: float
) -> None:
    lora = {"init_strategy": strategy, "dropout": dropout}
    whole, plan = attached(lora, save_steps=3)

    def save(step: int) -> None:
        if step == 3:
            whole.save_state(tmp_path)

    losses = [event.loss for event in train(whole, plan, save)]
    second, _ = attached(lora)
    second.load_state(tmp_path)
    assert [event.loss for event in train(second, plan, done=3)] == losses[3:]
    for name, arrays in whole.factors().items():
        for factor, array in arrays.items():
            assert array.tobytes() == second.factors()[name][factor].tobytes()


def test_a_checkpoint_of_another_start_is_refused(attached: Attached, tmp_path: Path) -> None:
    plain, _ = attached()
    plain.save_state(tmp_path)
    started, _ = attached({"init_strategy": "pissa"})
    with pytest.raises(CheckpointError, match="has no start"):
        started.load_state(tmp_path)


def test_dropout_sees_the_factors_and_not_the_frozen_rest(attached: Attached) -> None:
    # The residual form, W x - scale B0 A0 x + scale B A drop(x), by hand on one layer.
    session, plan = attached({"init_strategy": "pissa", "dropout": 0.5})
    train(session, plan)
    name = plan.adapters.modules[0].name
    layer, start = session._adapters.layers[name], session._adapters.starts[name]
    x = torch.randn(3, 5, 64)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    a0, b0 = torch.from_numpy(start.a), torch.from_numpy(start.b)
    session._adapters.train(True)
    with torch.no_grad():
        torch.manual_seed(0)
        live = layer(x)
        torch.manual_seed(0)
        dropped = torch.nn.functional.dropout(x, 0.5)
        rest = layer.base_layer.weight - 2.0 * b0 @ a0
        expected = x @ rest.T + 2.0 * dropped @ a.T @ b.T
    torch.testing.assert_close(live, expected, atol=1e-5, rtol=0)
    session._adapters.train(False)
    assert not torch.allclose(layer(x), live)


def test_starts_are_the_same_whichever_process_computes_them(
    attached: Attached, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, plan = attached({"init_strategy": "pissa"})
    alone = session._adapters.starts
    parts: list[list[torch.Tensor]] = []
    monkeypatch.setattr(Processes, "sum_", lambda self, tensors: parts.append(tensors))
    monkeypatch.setattr(Processes, "largest", lambda self, value: value)
    model = transformers.AutoModelForCausalLM.from_pretrained(session.settings.base)
    for process in range(2):
        weight_starts(model, plan.adapters, Processes(process, 2))
    summed = [one + two for one, two in zip(*parts, strict=True)]
    expected = [torch.from_numpy(x) for start in alone.values() for x in (start.a, start.b)]
    assert all(torch.equal(one, two) for one, two in zip(summed, expected, strict=True))


def test_a_conv1d_base_starts_from_its_transposed_weight(tmp_path: Path, attached: Attached) -> None:
    config = transformers.GPT2Config(
        vocab_size=320, n_embd=48, n_layer=1, n_head=2, n_positions=128, bos_token_id=1, eos_token_id=2
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    session, plan = attached({"init_strategy": "pissa", "target_modules": ("c_attn",)}, base=tmp_path)
    name = plan.adapters.modules[0].name
    start = session._adapters.starts[name]
    weight = model.get_submodule(name).weight.detach().T.numpy().astype(np.float64)
    left, values, right = np.linalg.svd(weight, full_matrices=False)
    np.testing.assert_allclose(2.0 * start.b @ start.a, (left[:, :4] * values[:4]) @ right[:4], atol=1e-5)
    tokens = plan.rows[0].sequences[0].tokens[None]
    np.testing.assert_array_equal(session.logits(tokens), session.logits(tokens, adapter=False))


def test_a_base_with_values_that_are_not_finite_is_named(attached: Attached, tiny_llama: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    _, plan = attached({"init_strategy": "pissa"})
    name = plan.adapters.modules[3].name
    with torch.no_grad():
        model.get_submodule(name).weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=f"`{name}` has values that are not finite"):
        weight_starts(model, plan.adapters, Processes())


def test_a_weight_that_is_no_matrix_of_its_sides_is_named(attached: Attached, tiny_llama: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    _, plan = attached({"init_strategy": "pissa"})
    name = plan.adapters.modules[3].name
    module = model.get_submodule(name)
    module.weight = torch.nn.Parameter(module.weight.detach()[:-1])
    with pytest.raises(ModelError, match=f"the weight of `{name}` is .*, not a matrix"):
        weight_starts(model, plan.adapters, Processes())


WORKER = """
import json, sys
from pathlib import Path
from soup_xb.core.errors import ModelError
sys.path.insert(0, sys.argv[3])
import conftest
attached = next(conftest.attached.__wrapped__(Path(sys.argv[1])))
place = Path(sys.argv[4])
try:
    attached({"init_strategy": sys.argv[2]})
except ModelError as error:
    import torch.distributed as dist
    (place / f"result-{dist.get_rank()}.json").write_text(json.dumps([error.problems[0].code, str(error)]))
"""


def test_a_weight_that_is_not_finite_stops_both_processes(
    attached: Attached, tiny_llama: Path, tmp_path: Path
) -> None:
    """Each looks at every second module: the first one does not wait for the share of the second."""
    _, plan = attached()
    name, base = plan.adapters.modules[3].name, tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    weights = load_file(base / "model.safetensors")
    weights[f"{name}.weight"][0, 0] = np.inf
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "worker.py").write_text(WORKER, "utf-8")
    done = in_two_processes("torch", tmp_path / "worker.py", base, "pissa", Path(__file__).parent, tmp_path)
    assert done.codes == (0, 0), done.err[-3000:]
    results = [json.loads(file.read_text()) for file in sorted(tmp_path.glob("result-*.json"))]
    assert len(results) == 2 and results[0] == results[1]
    assert results[0][0] == "non-finite-base" and f"`{name}`" in results[0][1]
