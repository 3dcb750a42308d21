"""What a saved adapter says of its task, LoRA and VeRA alike, and adapters that say nothing, as PEFT writes some."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from media_bases import TEMPLATE

Soupx = Callable[..., Any]
Config = Callable[..., Path]
TASKS = {
    "sft": "CAUSAL_LM",
    "reward": "SEQ_CLS",
    "embedding": "FEATURE_EXTRACTION",
    "vision": None,
    "audio": None,
}
TEXTS = {
    "sft": [{"prompt": f"{index}?", "completion": "Yes."} for index in range(6)],
    "reward": [{"prompt": f"{index}?", "chosen": "Yes.", "rejected": "No!"} for index in range(6)],
    "embedding": [{"anchor": f"what {index}", "positive": f"that {index}"} for index in range(6)],
}


@pytest.fixture
def config(
    tmp_path: Path,
    tiny_llama: Path,
    tiny_encoder: Path,
    media_base: Callable[[str], Path],
    pictures: Path,
    tones: Path,
) -> Config:
    """`config(task, output, lora)` writes a config that trains two steps, on the base that fits the task."""

    def write(task: str, output: str, **lora: Any) -> Path:
        rows = {"vision": pictures, "audio": tones}.get(task, tmp_path / "rows.jsonl")
        if task in TEXTS:
            rows.write_text("".join(json.dumps(row) + "\n" for row in TEXTS[task]))
        bases = {"embedding": tiny_encoder, "vision": media_base("llava"), "audio": media_base("whisper")}
        content = {
            "base": str(bases.get(task, tiny_llama)),
            "task": task,
            "backend": "torch",
            "data": {"train": str(rows), "max_length": 96},
            "training": {"max_steps": 2, "lr": 1e-2, "batch_size": 2, "lora": {"r": 2, **lora}},
            "output": str(tmp_path / output),
        }
        (tmp_path / f"{output}.yaml").write_text(json.dumps(content))
        return tmp_path / f"{output}.yaml"

    return write


def settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def told(soupx: Soupx, adapter: Path, file: Path) -> Any:
    """What `soupx eval` says of an adapter on the rows that it was trained on; an error's code where it refuses."""
    done = soupx("eval", adapter, "--data", json.loads(file.read_text())["data"]["train"], "--json")
    return json.loads(done.out) if not done.code else done.err.split("]")[0]


@pytest.mark.parametrize("task", [pytest.param("sft", marks=pytest.mark.slow), *list(TASKS)[1:]])
def test_vera_s_file_and_the_lora_that_it_equals_are_for_the_task_that_a_lora_is_for(
    soupx: Soupx, config: Config, tmp_path: Path, task: str
) -> None:
    lora, vera = config(task, "lora"), config(task, "vera", use_vera=True)
    for file in (lora, vera):
        done = soupx("train", file)
        assert done.code == 0, done.err
    adapter, exported = tmp_path / "vera" / "adapter", tmp_path / "exported"
    done = soupx("export", adapter, "--to", "peft", "--output", exported)
    assert done.code == 0, done.err
    saved = settings(tmp_path / "lora" / "adapter")
    for key in ("task_type", "modules_to_save"):
        assert settings(adapter)[key] == settings(exported)[key] == saved[key]
    assert saved["task_type"] == TASKS[task]
    found, expected = told(soupx, exported, vera), told(soupx, adapter, vera)
    if isinstance(expected, dict):
        assert found["adapter"] == pytest.approx(expected["adapter"], rel=1e-4)
    else:
        assert found == expected == "error[adapter-is-reward-model"


@pytest.mark.parametrize("task", [*list(TASKS)[:3], pytest.param("vision", marks=pytest.mark.slow), "audio"])
def test_an_adapter_without_a_task_is_read_as_what_it_is_everywhere(
    soupx: Soupx, config: Config, tmp_path: Path, task: str
) -> None:
    file = config(task, "out")
    assert soupx("train", file).code == 0
    adapter = tmp_path / "out" / "adapter"
    written, before = settings(adapter), told(soupx, adapter, file)
    (adapter / "adapter_config.json").write_text(json.dumps({**written, "task_type": None}))
    assert told(soupx, adapter, file) == before
    warm = soupx("train", file, "--set", f"adapter={adapter}", "--output", tmp_path / "warm")
    assert warm.code == 0, warm.err
    words = {
        "generate": ("generate", "--adapter", adapter, "--prompt", "hi", "--max-new-tokens", "2"),
        "export": ("export", adapter, "--to", "mlx-lm", "--output", tmp_path / "mlx"),
        "merge": ("merge", adapter, "--output", tmp_path / "merged"),
    }
    codes = {name: soupx(*command).err for name, command in words.items()}
    found = {name: err.split("]")[0].partition("error[")[2] for name, err in codes.items()}
    reward, files = "adapter-is-reward-model", "files-not-exported"
    assert (
        found
        == {
            "sft": {"generate": "", "export": "", "merge": ""},
            "reward": {"generate": reward, "export": reward, "merge": reward},
            "embedding": {"generate": "embeds-only", "export": "embeds-only", "merge": ""},
            "vision": {"generate": "prompt-is-text", "export": files, "merge": ""},
            "audio": {"generate": "prompt-is-text", "export": files, "merge": ""},
        }[task]
    )


def test_an_encoder_s_adapter_of_another_tool_without_a_task_embeds(
    soupx: Soupx, config: Config, tmp_path: Path
) -> None:
    file = config("embedding", "out")
    assert soupx("train", file).code == 0
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "out" / "adapter" / name, alone)
    (alone / "adapter_config.json").write_text(json.dumps({**settings(alone), "task_type": None}))
    expected = told(soupx, tmp_path / "out", file)
    assert told(soupx, alone, file) == expected
    assert expected["adapter"]["loss"] != expected["base"]["loss"]


def test_an_adapter_that_hears_is_evaluated_on_sounds_where_its_base_sees_too(
    soupx: Soupx, config: Config, media_base: Callable[[str], Path], tmp_path: Path
) -> None:
    file = config("audio", "out")
    content = json.loads(file.read_text())
    content["base"] = str(media_base("gemma-4-audio"))
    content["data"]["chat_template"] = TEMPLATE.replace("MARK", "<|audio|>")
    file.write_text(json.dumps(content))
    done = soupx("train", file)
    assert done.code == 0, done.err
    found = told(soupx, tmp_path / "out", file)
    assert found["adapter"]["loss"] < found["base"]["loss"]
    (tmp_path / "out" / "adapter" / "media.json").write_text('{"kind": "smell"}')
    assert told(soupx, tmp_path / "out", file) == "error[damaged-adapter"
