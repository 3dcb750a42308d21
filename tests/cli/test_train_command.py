"""`soupx train` from file to adapter, on a real tiny model, as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import free_ports, in_two_processes, pair_of_free_ports
from safetensors.numpy import load_file, save_file

Config = Callable[..., Path]
Soupx = Callable[..., Any]


@pytest.fixture
def config(tmp_path: Path, tiny_llama: Path, chat_file: Path) -> Config:
    """Writes a small config; keyword arguments are lines of `training`."""

    def write(**training: Any) -> Path:
        settings = {"max_steps": 6, "lr": 0.005, "batch_size": 4, "lora": {"r": 4}, **training}
        content = {
            "base": str(tiny_llama),
            "backend": "torch",
            "data": {"train": str(chat_file), "val_split": 0.1, "max_length": 128},
            "training": settings,
            "output": str(tmp_path / "out"),
        }
        file = tmp_path / "soup.yaml"
        file.write_text(json.dumps(content, indent=1))
        return file

    return write


def in_a_process(*words: object, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "soup_xb", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def steps(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == "step"]


def adapter(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_a_run_leaves_what_the_design_says(soupx: Soupx, config: Config, tmp_path: Path) -> None:
    done = soupx("train", config(save_steps=4, eval_steps=3), "--json", "--prompt", "What is 3 and 4?")
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    out = tmp_path / "out"
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == summary["status"] == "finished"
    assert (record["steps"], record["backend"], record["seed"]) == (6, "torch", 42)
    assert record["config"]["training"]["lora"]["r"] == 4
    assert record["tokens_per_second"] > 0
    assert [step["step"] for step in steps(out)] == [1, 2, 3, 4, 5, 6]
    assert steps(out)[-1]["loss"] < steps(out)[0]["loss"]
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "eval"] == [3, 6]
    assert [event["step"] for event in events if event["event"] == "save"] == [4, 6]
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    report = (out / "report.html").read_text()
    assert "What is 3 and 4?" in report
    assert "http://" not in report.replace("http://www.w3.org", "")
    settings = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert settings["target_modules"] == [
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ]
    assert (out / "adapter" / "README.md").read_text().startswith("---")


def test_a_run_repeats_itself(soupx: Soupx, config: Config, tmp_path: Path) -> None:
    file = config()
    assert soupx("train", file).code == 0
    assert soupx("train", file, "--output", tmp_path / "again").code == 0
    first, second = adapter(tmp_path / "out"), adapter(tmp_path / "again")
    assert all(first[key].tobytes() == second[key].tobytes() for key in first)


def test_resuming_a_finished_run_says_so(soupx: Soupx, config: Config) -> None:
    file = config()
    assert soupx("train", file).code == 0
    again = soupx("train", file, "--resume")
    assert again.code == 0
    assert "already complete at step 6" in again.out


def test_a_longer_run_goes_on_and_tells_what_changed(soupx: Soupx, config: Config, tmp_path: Path) -> None:
    assert soupx("train", config(save_steps=6, scheduler="constant")).code == 0
    longer = soupx("train", config(save_steps=6, scheduler="constant", max_steps=9), "--resume")
    assert longer.code == 0, longer.err
    assert "`training.max_steps` was 6 and is 9" in longer.err
    assert [step["step"] for step in steps(tmp_path / "out")] == list(range(1, 10))


def test_a_changed_setting_or_changed_data_stops_a_resume(
    soupx: Soupx, config: Config, chat_file: Path, tmp_path: Path
) -> None:
    file = config(save_steps=3)
    assert soupx("train", file).code == 0
    checkpoint = tmp_path / "out" / "checkpoints" / "step-00000003"
    changed = soupx("train", file, "--resume-from", checkpoint, "--set", "training.lr=0.1")
    assert changed.code == 5
    assert "error[changed-setting]" in changed.err
    assert "`training.lr` was 0.005 and is 0.1" in changed.err
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(chat_file.read_text().splitlines()[:40]))
    changed = soupx("train", file, "--resume-from", checkpoint, "--set", f"data.train={other}")
    assert changed.code == 5
    assert "error[changed-" in changed.err


def test_training_into_a_folder_that_holds_a_run_is_refused(soupx: Soupx, config: Config) -> None:
    file = config()
    assert soupx("train", file).code == 0
    again = soupx("train", file)
    assert again.code == 7
    assert "--resume" in again.err
    assert "--overwrite" in again.err
    assert soupx("train", file, "--overwrite").code == 0


def test_a_warm_start_begins_where_the_adapter_ended(soupx: Soupx, config: Config, tmp_path: Path) -> None:
    file = config(max_steps=30)
    assert soupx("train", file).code == 0
    warm = soupx(
        "train", file, "--set", f"adapter={tmp_path / 'out'}", "--set", "training.lora.alpha=8",
        "--output", tmp_path / "warm",
    )  # fmt: skip
    assert warm.code == 0, warm.err
    cold, begun = steps(tmp_path / "out"), steps(tmp_path / "warm")
    assert begun[0]["loss"] < cold[0]["loss"] - 0.2


@pytest.mark.parametrize(("first", "second"), [("mlx", "torch"), ("torch", "mlx")])
def test_training_goes_on_with_the_other_engine(
    soupx: Soupx, config: Config, tmp_path: Path, chat_file: Path, first: str, second: str
) -> None:
    file = config(max_steps=20)
    assert soupx("train", file, "--backend", first).code == 0
    losses = {}
    for engine in (first, second):
        done = soupx("eval", tmp_path / "out", "--data", chat_file, "--backend", engine, "--json")
        assert done.code == 0, done.err
        losses[engine] = json.loads(done.out)["adapter"]["loss"]
    assert losses[first] == pytest.approx(losses[second], abs=1e-5)
    warm = soupx(
        "train",
        file,
        "--backend",
        second,
        "--set",
        f"adapter={tmp_path / 'out'}",
        "--output",
        tmp_path / "warm",
    )
    assert warm.code == 0, warm.err
    assert steps(tmp_path / "warm")[0]["loss"] < steps(tmp_path / "out")[0]["loss"] - 0.2


def test_eval_and_generate_read_what_train_wrote(
    soupx: Soupx, config: Config, tmp_path: Path, chat_file: Path
) -> None:
    assert soupx("train", config(max_steps=30)).code == 0
    done = soupx("eval", tmp_path / "out", "--data", chat_file, "--backend", "torch", "--json")
    assert done.code == 0, done.err
    figures = json.loads(done.out)
    assert figures["adapter"]["loss"] < figures["base"]["loss"]
    assert figures["adapter"]["target_tokens"] == figures["base"]["target_tokens"] > 0
    assert figures["base"]["perplexity"] == pytest.approx(np.exp(figures["base"]["loss"]))
    words = ("generate", "--adapter", tmp_path / "out", "--prompt", "What is 3?", "--max-new-tokens", 8)
    answer = soupx(*words, "--compare", "--backend", "torch", "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out).keys() == {"prompt", "answer", "base"}


def test_eval_agrees_with_stock_peft(
    soupx: Soupx, config: Config, tmp_path: Path, chat_file: Path, tiny_llama: Path
) -> None:
    import torch
    import transformers
    from peft import PeftModel

    assert soupx("train", config(max_steps=30)).code == 0
    done = soupx("eval", tmp_path / "out", "--data", chat_file, "--backend", "torch", "--json")
    model = PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "out" / "adapter"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "adapter")
    total, count = 0.0, 0
    for line in chat_file.read_text().splitlines():
        messages = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
        text = prompt + messages[1]["content"] + "<|im_end|>"
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        with torch.no_grad():
            logits = model(ids).logits[0, start - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, ids[0, start:], reduction="sum").item()
        count += ids.shape[1] - start
    figures = json.loads(done.out)["adapter"]
    assert figures["target_tokens"] == count
    assert figures["loss"] == pytest.approx(total / count, abs=1e-5)


def test_plan_shows_the_run_without_weights(
    soupx: Soupx, config: Config, tmp_path: Path, tiny_llama: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in tiny_llama.iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    file = config(save_steps=2, warmup_ratio=0.3, lora={"r": 4, "rank_pattern": {"q_proj": 8}})
    done = soupx("plan", file, "--set", f"base={bare}", "--json")
    assert done.code == 0, done.err
    plan = json.loads(done.out)
    assert (plan["steps"], plan["save_steps"]) == (6, [2, 4, 6])
    assert {row["name"]: row["rank"] for row in plan["modules"]}["q_proj"] == 8
    assert plan["learning_rate"]["curve"][0][1] == pytest.approx(0.005)
    assert plan["memory_bytes"]["total"] > 0
    assert "q_proj" in soupx("plan", file, "--set", f"base={bare}").out


def test_two_processes_have_the_losses_of_one(soupx: Soupx, config: Config, tmp_path: Path) -> None:
    file = config(gradient_accumulation_steps=2, max_steps=8, eval_steps=4, save_steps=4)
    assert soupx("train", file, "--output", tmp_path / "one").code == 0
    (port,) = free_ports(1)
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port))
    process = in_a_process("train", file, "--output", tmp_path / "two", launcher=launcher)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    one, two = steps(tmp_path / "one"), steps(tmp_path / "two")
    assert [step["loss"] for step in two] == pytest.approx([step["loss"] for step in one], abs=1e-5)
    assert [step["grad_norm"] for step in two] == pytest.approx([step["grad_norm"] for step in one], rel=1e-3)
    assert [step["target_tokens"] for step in two] == [step["target_tokens"] for step in one]
    done = in_two_processes("torch", "-m", "soup_xb", "train", file, "--output", tmp_path / "two", "--resume")
    assert done.codes == (0, 0), done.err
    assert done.out.count("already complete at step 8") == 1


def test_two_mlx_processes_have_the_losses_of_one(soupx: Soupx, config: Config, tmp_path: Path) -> None:
    """mlx.launch hides exit codes, so `run.json` tells how it went."""
    file = config(gradient_accumulation_steps=2, max_steps=6, eval_steps=3, save_steps=3)
    words = ("train", file, "--backend", "mlx", "--output")
    alone = soupx(*words, tmp_path / "one")
    assert alone.code == 0, alone.err
    start = "from mlx._distributed_utils.launch import main; main()"
    port = str(pair_of_free_ports())
    launcher = ("-c", start, "-n", "2", "--backend", "ring", "-p", port, "--", sys.executable)
    _, errors = in_a_process(*words, tmp_path / "two", launcher=launcher).communicate(timeout=240)
    assert json.loads((tmp_path / "two" / "run.json").read_text())["status"] == "finished", errors
    one, two = steps(tmp_path / "one"), steps(tmp_path / "two")
    assert [step["loss"] for step in two] == pytest.approx([step["loss"] for step in one], abs=1e-5)
    assert [step["grad_norm"] for step in two] == pytest.approx([step["grad_norm"] for step in one], rel=1e-3)


@pytest.mark.parametrize("backend", ["torch", "mlx"])
@pytest.mark.parametrize("packing", ["false", "true"])
def test_two_processes_divide_by_the_weights_of_all_turns(
    soupx: Soupx, config: Config, chat_file: Path, tmp_path: Path, backend: str, packing: str
) -> None:
    plain, weighted = tmp_path / "plain.jsonl", tmp_path / "weighted.jsonl"
    with plain.open("w", encoding="utf-8") as bare, weighted.open("w", encoding="utf-8") as weighing:
        for number, line in enumerate(chat_file.read_text("utf-8").splitlines()):
            turns = json.loads(line)["messages"]
            turns += [
                {"role": "user", "content": "Again?"},
                {"role": "assistant", "content": "a" * (number % 7 + 1)},
            ]
            bare.write(json.dumps({"messages": turns}) + "\n")
            said = [turn for turn in turns if turn["role"] == "assistant"]
            said[0]["weight"], said[-1]["weight"] = (0, 0.25, 1, 3)[number % 4], (2, None, 0.5)[number % 3]
            weighing.write(json.dumps({"messages": turns}) + "\n")
    file = config(gradient_accumulation_steps=2, max_steps=4, eval_steps=2)

    def words(name: str, data: Path) -> tuple[object, ...]:
        settings = (f"data.train={data}", f"data.packing={packing}", f"output={tmp_path / name}")
        return ("train", file, "--backend", backend, *(word for one in settings for word in ("--set", one)))

    for name, data in (("none", plain), ("one", weighted)):
        done = soupx(*words(name, data))
        assert done.code == 0, done.err
    ended = in_two_processes(backend, "-m", "soup_xb", *words("two", weighted))
    assert ended.codes == (0, 0), ended.err
    none, one, two = (steps(tmp_path / name) for name in ("none", "one", "two"))
    for key, margin in (("loss", 1e-5), ("grad_norm", 1e-3), ("target_tokens", 0)):
        assert [step[key] for step in two] == pytest.approx([step[key] for step in one], abs=margin)
    assert [step["loss"] for step in none] != pytest.approx([step["loss"] for step in one], abs=1e-3)
    held_out = [
        [event["loss"] for event in map(json.loads, file) if event["event"] == "eval"]
        for file in ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two"))
    ]
    assert held_out[1] == pytest.approx(held_out[0], abs=1e-5)
    assert held_out[0]


def test_a_batch_that_does_not_split_over_the_processes_is_refused(
    soupx: Soupx, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    done = soupx("train", config(batch_size=3))
    assert done.code == 2
    assert "error[batch-not-divisible]" in done.err


def test_a_loss_that_is_not_finite_stops_the_run(soupx: Soupx, config: Config, tmp_path: Path) -> None:
    file = config()
    assert soupx("train", file).code == 0
    weights = tmp_path / "out" / "adapter" / "adapter_model.safetensors"
    save_file({key: array * np.float32(1e18) for key, array in load_file(weights).items()}, weights)
    done = soupx("train", file, "--set", f"adapter={tmp_path / 'out'}", "--output", tmp_path / "next")
    assert done.code == 6, done.err
    assert "error[non-finite-" in done.err
    assert "train.jsonl:" in done.err
    assert "step 1:" in done.err
    assert json.loads((tmp_path / "next" / "run.json").read_text())["status"] == "failed"
    assert not (tmp_path / "next" / "adapter").exists()
