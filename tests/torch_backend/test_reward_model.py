"""A reward model: a head that stock libraries load with the adapter, and that a resumed run goes on with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve
from safetensors.numpy import load_file, save_file

from soup_xb.core.adapter.extras import check_head, head_start
from soup_xb.core.adapter.peft_file import HEAD_KEY, read_adapter
from soup_xb.core.errors import ModelError
from soup_xb.core.rows.batches import collate, score_places
from soup_xb.core.rows.examples import Source
from soup_xb.core.rows.row import TokenSequence

Soupx = Callable[..., Any]
WAYS: dict[str, dict[str, Any]] = {
    "random": {},
    "pissa": {"init_strategy": "pissa"},
    "dora": {"use_dora": True},
    "vera": {"use_vera": True},
}


@pytest.fixture
def config(tmp_path: Path, tiny_llama: Path) -> Callable[..., Path]:
    """`config(**training)`: a file that trains a reward model on polite and curt answers."""
    rows = [
        {"prompt": f"{index}+{index % 5}=", "chosen": f"{index + index % 5}, sir", "rejected": "Whatever!"}
        for index in range(20)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def write(backend: str = "torch", **training: Any) -> Path:
        content = {
            "base": str(tiny_llama),
            "task": "reward",
            "backend": backend,
            "data": {"train": str(tmp_path / "pairs.jsonl"), "val_split": 0.2, "max_length": 64},
            "training": {"max_steps": 6, "lr": 5e-3, "lora": {"r": 4}, **training},
            "output": str(tmp_path / "out"),
        }
        (tmp_path / "soup.yaml").write_text(json.dumps(content))
        return tmp_path / "soup.yaml"

    return write


@pytest.mark.parametrize(
    ("backend", "way"), [*(("torch", way) for way in WAYS), *(("mlx", way) for way in WAYS if way != "vera")]
)
def test_stock_libraries_load_the_head_and_give_the_live_scores(
    soupx: Soupx, config: Callable[..., Path], tmp_path: Path, tiny_llama: Path, backend: str, way: str
) -> None:
    import transformers
    from peft import PeftModel

    from soup_xb.core.config.load import load_config
    from soup_xb.runs.rewards import open_reward_model

    # VeRA's alpha has no meaning, and its vectors want a higher rate.
    lora = {"r": 4, **WAYS[way]}
    done = soupx("train", config(backend, lora=lora, lr=0.02 if way == "vera" else 5e-3))
    assert done.code == 0, done.err
    adapter = tmp_path / "out" / "adapter"
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1)
    stock = PeftModel.from_pretrained(base, adapter).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(adapter)
    texts = ["3+3=6, sir<|im_end|>", "3+3=Whatever!<|im_end|>", "9+4=13<|im_end|>"]
    expected = []
    for text in texts:
        with torch.no_grad():
            expected.append(stock(**tokenizer(text, return_tensors="pt")).logits.item())
    loaded = load_config(config())
    judge_of = evolve(
        loaded.config, training=evolve(loaded.config.training, reward_model=str(tmp_path / "out"))
    )
    rows = []
    for text in texts:
        ids = np.array(tokenizer(text).input_ids)
        rows.append(TokenSequence(ids, np.zeros(ids.size, dtype=bool), Source("rows.jsonl", 1)))
    with open_reward_model(judge_of, backend) as judge:
        live = judge.judge.scores(collate(rows, 0))
    np.testing.assert_allclose(live, expected, atol=2e-5)
    assert expected[0] > expected[1]


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_a_resumed_run_ends_with_the_same_bytes(
    soupx: Soupx, config: Callable[..., Path], tmp_path: Path, backend: str
) -> None:
    file = config(backend, save_steps=2, lora={"r": 4, "dropout": 0.2})
    assert soupx("train", file).code == 0
    out = tmp_path / "out"
    whole = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    (out / "adapter").rename(tmp_path / "aside")
    for step in ("00000004", "00000006"):
        (out / "checkpoints" / f"step-{step}").rename(tmp_path / step)
    resumed = soupx("train", file, "--resume")
    assert resumed.code == 0, resumed.err
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == whole
    events = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    [last] = [event for event in events if event["event"] == "step" and event["step"] == 6]
    assert {"reward_accuracy", "reward_margin"} <= last["means"].keys()


def test_a_reward_model_writes_nothing(soupx: Soupx, config: Callable[..., Path], tmp_path: Path) -> None:
    assert soupx("train", config(max_steps=1)).code == 0
    for command in (
        ("generate", "--adapter", tmp_path / "out", "--prompt", "hello"),
        (
            "train",
            config(),
            "--set",
            f"adapter={tmp_path / 'out'}",
            "--set",
            "task=orpo",
            "--output",
            tmp_path / "b",
        ),
    ):
        refused = soupx(*command)
        assert refused.code == 4, refused.err
        assert "error[adapter-is-reward-model]" in refused.err
    card = (tmp_path / "out" / "adapter" / "README.md").read_text()
    assert "AutoModelForSequenceClassification" in card
    assert "vllm" not in card


def test_a_head_that_is_not_the_trained_one_is_not_published(
    soupx: Soupx, config: Callable[..., Path], tmp_path: Path
) -> None:
    assert soupx("train", config(max_steps=1)).code == 0
    folder = tmp_path / "out" / "adapter"
    head = read_adapter(folder).head
    assert head is not None
    check_head(folder, head)
    with pytest.raises(ModelError, match="not the one that was trained"):
        check_head(folder, head + 1)
    weights = folder / "adapter_model.safetensors"
    save_file({**load_file(weights), HEAD_KEY: np.full((1, 64), np.nan, dtype=np.float32)}, weights)
    with pytest.raises(ModelError, match="finite"):
        read_adapter(folder)


def test_the_start_of_the_head_is_a_function_of_the_seed() -> None:
    np.testing.assert_array_equal(head_start(64, 1), head_start(64, 1))
    assert (head_start(64, 1) != head_start(64, 2)).any()
    assert head_start(4096, 1).std() == pytest.approx(0.02, rel=0.05)


def test_a_row_is_scored_where_stock_transformers_looks() -> None:
    rows = [
        TokenSequence(ids, [False] * len(ids), Source("rows.jsonl", 1))
        for ids in ([5, 6, 7, 2], [8, 9], [2, 2])
    ]
    batch = collate(rows, 0)
    assert score_places(batch, None).tolist() == [3, 1, 1]
    assert score_places(batch, 2).tolist() == [2, 1, 0]
