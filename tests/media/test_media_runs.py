"""Runs on rows with pictures and sounds: the loss, the towers, exact resume, restarts, processes, the saved adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from processes import in_two_processes
from safetensors.numpy import load_file

AUTO = {
    "vision": transformers.AutoModelForImageTextToText,
    "whisper": transformers.AutoModelForSpeechSeq2Seq,
    "qwen-audio": transformers.AutoModelForMultimodalLM,
}
BASES = ["llava", "idefics3", "qwen-vl", "gemma-4", "whisper", "qwen-audio"]
SEEING = BASES[:4]


def rows_of(base: str, pictures: Path, tones: Path) -> tuple[str, Path]:
    return ("vision", pictures) if base in SEEING else ("audio", tones)


def stock(base: Path, name: str) -> Any:
    auto = AUTO.get(name, AUTO["vision"])
    return auto.from_pretrained(base, dtype=torch.float32).eval()


def logits(model: Any, batch: Any, name: str) -> torch.Tensor:
    tokens = {
        "decoder_input_ids" if name == "whisper" else "input_ids": torch.from_numpy(batch.tokens).long()
    }
    inputs = {key: torch.from_numpy(np.asarray(value)) for key, value in batch.inputs().items()}
    with torch.no_grad():
        return model(**tokens, **inputs, use_cache=False).logits.flatten(0, 1)


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("name", BASES)
def test_the_loss_is_the_stock_models_on_the_words_of_the_answers_alone(
    name: str, pictures: Path, tones: Path, config: Any, opened: Any, media_base: Callable[[str], Path]
) -> None:
    model = stock(media_base(name), name)
    with opened(config(name, *rows_of(name, pictures, tones), batch_size=8)) as run:
        (batch,) = run.plan.micro_batches(1)
        found = run.session.evaluate([batch])
        expected = torch.nn.functional.cross_entropy(
            logits(model, batch, name)[torch.from_numpy(batch.positions[batch.weights != 0])],
            torch.from_numpy(batch.targets[batch.weights != 0]),
        )
        assert found.mean == pytest.approx(expected.item(), abs=1e-5)
        words = [
            run.tokenizer.decode(one.tokens[one.trained], special=True)
            for row in run.plan.rows
            for one in row.sequences
        ]
        marks = run.tokenizer.maker.ids
        assert not np.isin(batch.targets[batch.weights != 0], marks).any()
    end = "<|endoftext|>" if name == "whisper" else "<|im_end|>"
    answers = [json.loads(line) for line in rows_of(name, pictures, tones)[1].read_text().splitlines()]
    told = [row["text"] if "text" in row else row["messages"][1]["content"] for row in answers]
    assert words == [f"{text}{end}" for text in told]


@pytest.mark.parametrize("name", ["llava", "idefics3", "qwen-vl", "gemma-4"])
def test_rows_together_give_the_logits_of_each_alone(
    name: str, pictures: Path, config: Any, opened: Any, media_base: Callable[[str], Path]
) -> None:
    model = stock(media_base(name), name)
    with opened(config(name, "vision", pictures, batch_size=8)) as run:
        (batch,) = run.plan.micro_batches(1)
        together = run.session.evaluate([batch]).total
        alone = run.session.evaluate([one for row in run.plan.rows for one in single(row)]).total
        assert together == pytest.approx(alone, abs=1e-4)
        changed = [one for row in run.plan.rows if row.sequences[0].media for one in single(row)]
        blind = logits_without_pictures(model, changed[0])
        assert not np.allclose(logits(model, changed[0], name).numpy(), blind, atol=1e-2)


def single(row: Any) -> list[Any]:
    from soup_xb.core.rows.batches import collate

    return [collate(row.sequences, 0)]


def logits_without_pictures(model: Any, batch: Any) -> np.ndarray[Any, Any]:
    """The logits where every mark of a picture is an ordinary word."""
    words = np.where(batch.tokens >= 259, 40, batch.tokens)
    with torch.no_grad():
        found: np.ndarray[Any, Any] = model(input_ids=torch.from_numpy(words).long()).logits[0].numpy()
    return found


@pytest.mark.parametrize(
    ("name", "pattern"), [("llava", "q_proj"), ("gemma-4", "q_proj"), ("whisper", "v_proj")]
)
def test_a_pattern_reaches_the_tower_which_is_trained_and_loads_in_stock_peft(
    name: str,
    pattern: str,
    pictures: Path,
    tones: Path,
    config: Any,
    opened: Any,
    soupx: Any,
    media_base: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    file = config(name, *rows_of(name, pictures, tones), lora={"target_modules": pattern})
    done = soupx("train", file)
    assert done.code == 0, done.err
    assert "no-gradient" not in done.err
    adapter = tmp_path / "out" / "adapter"
    saved = load_file(adapter / "adapter_model.safetensors")
    tower = {"llava": ".vision_tower.", "gemma-4": ".vision_tower.", "whisper": ".encoder."}[name]
    moved = [
        key for key, value in saved.items() if tower in key and "lora_B" in key and np.abs(value).max() > 0
    ]
    # LLaVA takes what its tower knows one layer before the end.
    assert len(moved) == (1 if name == "llava" else 2)
    model = peft.PeftModel.from_pretrained(stock(media_base(name), name), adapter).eval()
    with opened(file) as run:
        run.session.load_state(newest_state(tmp_path / "out", soupx, file), optimizer=False)
        (batch, *_) = run.plan.micro_batches(1)
        live = run.session.evaluate([batch]).mean
        expected = torch.nn.functional.cross_entropy(
            logits(model, batch, name)[torch.from_numpy(batch.positions[batch.weights != 0])],
            torch.from_numpy(batch.targets[batch.weights != 0]),
        )
        untrained = run.session.evaluate([batch], adapter=False).mean
    assert live == pytest.approx(expected.item(), abs=1e-5)
    assert abs(live - untrained) > 1e-3


def newest_state(out: Path, soupx: Any, file: Path) -> Path:
    """The state of the last step: the same run, writing a checkpoint there."""
    assert soupx("train", file, "--overwrite", "--set", "training.save_steps=4").code == 0
    (state,) = out.glob("checkpoints/step-00000004")
    return state


def test_auto_leaves_towers_and_encoders_alone(pictures: Path, tones: Path, config: Any, opened: Any) -> None:
    for name in ("llava", "whisper"):
        with opened(config(name, *rows_of(name, pictures, tones))) as run:
            names = [adapter.name for adapter in run.plan.adapters.modules]
        assert names
        assert not [one for one in names if "vision" in one or ".encoder." in one or "projector" in one]


@pytest.mark.parametrize("name", ["llava", "whisper"])
@pytest.mark.parametrize(
    "more",
    [
        {"gradient_accumulation_steps": 2, "lora": {"dropout": 0.1}},
        {"relora_steps": 2, "relora_warmup_ratio": 0.0, "lora": {"init_strategy": "pissa"}},
    ],
    ids=["dropout", "relora"],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    name: str, more: dict[str, Any], pictures: Path, tones: Path, config: Any, soupx: Any, tmp_path: Path
) -> None:
    file = config(name, *rows_of(name, pictures, tones), **more)
    assert soupx("train", file, "--set", "training.save_steps=3").code == 0
    whole = adapter_bytes(tmp_path / "out")
    (tmp_path / "out" / "checkpoints" / "step-00000003").rename(tmp_path / "kept")
    resumed = soupx("train", file, "--output", tmp_path / "again", "--resume-from", tmp_path / "kept")
    assert resumed.code == 0, resumed.err
    assert adapter_bytes(tmp_path / "again") == whole


def test_a_changed_picture_is_told_on_resume(pictures: Path, config: Any, soupx: Any, tmp_path: Path) -> None:
    from media_bases import save_picture

    file = config("llava", "vision", pictures, save_steps=2)
    assert soupx("train", file).code == 0
    (tmp_path / "out" / "checkpoints" / "step-00000002").rename(tmp_path / "kept")
    save_picture(tmp_path / "img" / "red.png", (1, 2, 3))
    resumed = soupx("train", file, "--output", tmp_path / "again", "--resume-from", tmp_path / "kept")
    assert resumed.code == 5
    assert "error[changed-data]" in resumed.err


@pytest.mark.parametrize("name", ["llava", "whisper"])
def test_two_processes_train_as_one_does(
    name: str, pictures: Path, tones: Path, config: Any, soupx: Any, tmp_path: Path
) -> None:
    file = config(name, *rows_of(name, pictures, tones), max_steps=3)
    assert soupx("train", file).code == 0
    one = losses(tmp_path / "out")
    done = in_two_processes("torch", "-m", "soup_xb", "train", file, "--overwrite")
    assert done.codes == (0, 0), done.err
    assert losses(tmp_path / "out") == pytest.approx(one, abs=1e-5)


def losses(out: Path) -> list[float]:
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [event["loss"] for event in events if event["event"] == "step"]


@pytest.mark.parametrize("name", ["llava", "whisper"])
def test_a_saved_adapter_is_evaluated_and_merged_with_its_processor(
    name: str, pictures: Path, tones: Path, config: Any, soupx: Any, tmp_path: Path
) -> None:
    task, rows = rows_of(name, pictures, tones)
    assert soupx("train", config(name, task, rows)).code == 0
    judged = soupx("eval", tmp_path / "out", "--data", rows, "--json")
    assert judged.code == 0, judged.err
    figures = json.loads(judged.out)
    assert figures["adapter"]["loss"] < figures["base"]["loss"]
    assert soupx("merge", tmp_path / "out", "--output", tmp_path / "merged").code == 0
    transformers.AutoProcessor.from_pretrained(tmp_path / "merged")
    assert stock(tmp_path / "merged", name)
    asked = soupx("generate", "--adapter", tmp_path / "out", "--prompt", "Hello?")
    assert asked.code == 2
    assert "error[prompt-is-text]" in asked.err
