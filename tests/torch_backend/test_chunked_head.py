"""Logits of a few targets at a time give the loss and the gradients of all at once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from processes import in_two_processes

from soup_xb.backends.torch import head
from soup_xb.core.config.load import load_config
from soup_xb.core.objectives import head_chunks
from soup_xb.core.rows.batches import collate
from soup_xb.core.rows.examples import Source
from soup_xb.core.rows.packing import pack
from soup_xb.core.rows.row import Row, text_row
from soup_xb.runs.resume import TrainOptions
from soup_xb.runs.train import train as run_file

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES),
    "soft caps": transformers.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=5.0),
    "scaled logits": transformers.GraniteConfig(**SIZES, logits_scaling=7.0),
    "gpt2": transformers.GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}


def batch(packed: bool) -> head.BatchTensors:
    rng = np.random.default_rng(0)
    rows: Sequence[Row] = [
        text_row(rng.integers(3, 320, length), np.arange(length) > 2, Source("rows.jsonl", length))
        for length in (30, 17, 9)
    ]
    if packed:
        rows = pack(rows, 40)
    return head.BatchTensors.of(collate([row.sequences[0] for row in rows], 0), torch.device("cpu"))


def summed_loss(model: Any, tensors: head.BatchTensors) -> torch.Tensor:
    return -head.token_logps(model, tensors).sum()


def row_log_probabilities(model: Any, tensors: head.BatchTensors) -> torch.Tensor:
    return head.token_logps(model, tensors).sum(-1)


def heated(model: Any, tensors: head.BatchTensors) -> torch.Tensor:
    return head.token_logps(model, tensors, 0.7)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Chunks of seven targets, or all at once."""

    def choose(small: bool) -> None:
        monkeypatch.setattr(head_chunks, "MOST_AT_ONCE", 0 if small else 2**40)
        monkeypatch.setattr(head_chunks, "CHUNK", 7 * 320)

    return choose


def loss_and_gradient(model: Any, tensors: head.BatchTensors, of: Callable[..., Any]) -> tuple[Any, Any]:
    model.zero_grad()
    loss = of(model, tensors)
    loss.sum().backward()
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return loss.detach(), [end.weight.grad.clone() for end in ends]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_chunks_give_the_loss_and_the_gradients_of_the_whole(
    name: str, packed: bool, small_chunks: Callable[[bool], None]
) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    seen: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _m, _i, out: seen.append(out.shape[1]))
    for of in (summed_loss, row_log_probabilities, heated):
        results = []
        for small in (False, True):
            small_chunks(small)
            seen.clear()
            results.append(loss_and_gradient(model, batch(packed), of))
            assert (max(seen) <= 7) == small
        torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-6)
    assert "forward" not in vars(model.base_model), "the decoder has its own forward again"


def test_a_model_that_does_more_than_its_head_is_not_cut_into_chunks(
    small_chunks: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()
    small_chunks(False)
    plain = summed_loss(model, batch(False))
    usual = type(model).forward

    def forward(self: Any, input_ids: Any, **named: Any) -> Any:
        output = usual(self, input_ids=input_ids, **named)
        odd = torch.zeros_like(output.logits)
        odd[..., 5] = input_ids.float().mean()
        output.logits = output.logits + odd
        return output

    monkeypatch.setattr(type(model), "forward", forward)
    whole = summed_loss(model, batch(False))
    small_chunks(True)
    assert summed_loss(model, batch(False)).item() == whole.item()
    assert whole.item() != plain.item()


def test_training_in_chunks_is_training_on_the_whole(
    small_chunks: Callable[[bool], None], attached: Callable[..., Any]
) -> None:
    results = []
    for small in (False, True):
        small_chunks(small)
        session, plan = attached()
        results.append([train(session, plan, step) for step in (1, 2, 3)])
    np.testing.assert_allclose(results[0], results[1], rtol=2e-6)


def train(session: Any, plan: Any, step: int) -> float:
    from soup_xb.core.run.session import StepSettings

    settings = StepSettings(step, 5e-3, plan.target_tokens(step), plan.examples(step))
    loss: float = session.train_step(plan.micro_batches(step), settings).loss
    return loss


@pytest.mark.parametrize("packed", [False, True])
def test_a_row_of_one_document_has_no_mask_of_tokens_by_tokens(
    packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, bool]] = []
    usual = torch.nn.functional.scaled_dot_product_attention

    def attention(*inputs: Any, **named: Any) -> Any:
        seen.append((named.get("attn_mask"), named.get("is_causal", False)))
        return usual(*inputs, **named)

    model = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    summed_loss(model, batch(packed))
    assert len(seen) == 2
    for mask, causal in seen:
        if packed:
            assert mask.dtype == torch.bool
            assert mask[0, 0].shape == (39, 39)
        else:
            assert mask is None
            assert causal


@pytest.mark.parametrize("task", ["sft", pytest.param("dpo", marks=pytest.mark.slow)])
def test_processes_that_share_the_base_take_chunks_together_and_have_the_losses_of_one(
    task: str, tiny_llama: Path, tmp_path: Path
) -> None:
    """Seven rows and two a micro-batch: a process has fewer targets than the other, and in the end none."""
    answers = {"sft": ("completion",), "dpo": ("chosen", "rejected")}[task]
    rows = [
        {"prompt": f"{index}?", **{name: name * (1 + index % 4) for name in answers}} for index in range(9)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def config(sharding: str) -> Path:
        content = {
            "base": str(tiny_llama),
            "task": task,
            "backend": "torch",
            "data": {"train": str(tmp_path / "rows.jsonl"), "max_length": 128, "val_split": 0.2},
            "training": {
                "max_steps": 4, "eval_steps": 2, "batch_size": 2, "lr": 1e-2, "lora": {"r": 4},
                "sharding": sharding, "gradient_checkpointing": sharding == "fsdp",
            },
            "output": str(tmp_path / sharding),
        }  # fmt: skip
        (tmp_path / f"{sharding}.yaml").write_text(json.dumps(content))
        return tmp_path / f"{sharding}.yaml"

    def losses(folder: Path) -> list[float]:
        told = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [event["loss"] for event in told if event["event"] in ("step", "eval")]

    run_file(load_config(config("none")), TrainOptions(), [])
    done = in_two_processes("torch", Path(__file__).with_name("chunked_run.py"), "train", config("fsdp"))
    assert done.codes == (0, 0), done.err
    chunks = [int(found) for found in re.findall(r"at most (\d+) chunks", done.err)]
    assert len(chunks) == 2
    assert chunks[0] == chunks[1] > 3
    assert losses(tmp_path / "fsdp") == pytest.approx(losses(tmp_path / "none"), abs=1e-5)
