"""What a user can get wrong about a run: one message, the right exit code, no traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

Soupx = Callable[..., Any]


@pytest.fixture
def workplace(tmp_path: Path, tiny_llama: Path, chat_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a config, its data and a base of its own, to be spoiled."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_llama, tmp_path / "base")
    shutil.copy(chat_file, tmp_path / "train.jsonl")
    content = {
        "base": "./base",
        "backend": "torch",
        "data": {"train": "train.jsonl", "max_length": 128},
        "training": {"max_steps": 2, "lora": {"r": 4}},
        "output": "out",
    }
    (tmp_path / "soup.yaml").write_text(json.dumps(content))
    return tmp_path


def no_file(place: Path) -> None:
    (place / "soup.yaml").unlink()


def no_data(place: Path) -> None:
    (place / "train.jsonl").unlink()


def empty_data(place: Path) -> None:
    (place / "train.jsonl").write_text("")


def cut_data(place: Path) -> None:
    text = (place / "train.jsonl").read_text()
    (place / "train.jsonl").write_text(text[:-20])


def strange_columns(place: Path) -> None:
    (place / "train.jsonl").write_text('{"colour": "red", "taste": "sweet"}\n')


def no_assistant(place: Path) -> None:
    (place / "train.jsonl").write_text('{"messages": [{"role": "user", "content": "Hello"}]}\n' * 3)


def no_base(place: Path) -> None:
    shutil.rmtree(place / "base")


def no_base_config(place: Path) -> None:
    (place / "base" / "config.json").unlink()


def broken_base_config(place: Path) -> None:
    (place / "base" / "config.json").write_text("{")


def cut_weights(place: Path) -> None:
    file = place / "base" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def pickled_weights(place: Path) -> None:
    (place / "base" / "model.safetensors").rename(place / "base" / "pytorch_model.bin")


def missing_weight(place: Path) -> None:
    file = place / "base" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})


def unknown_type(place: Path) -> None:
    change_base(place, model_type="frobnicator")


def remote_code(place: Path) -> None:
    change_base(place, model_type="frobnicator", auto_map={"AutoModelForCausalLM": "evil.Model"})
    (place / "base" / "evil.py").write_text("raise SystemExit('the code of a model folder ran')")


def change_base(place: Path, **values: object) -> None:
    file = place / "base" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def no_chat_template(place: Path) -> None:
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        file = place / "base" / name
        if file.suffix == ".jinja":
            file.unlink(missing_ok=True)
            continue
        settings = json.loads(file.read_text())
        settings.pop("chat_template", None)
        file.write_text(json.dumps(settings))


def output_is_a_file(place: Path) -> None:
    (place / "out").write_text("mine")


def adapter_with_nan(place: Path) -> None:
    adapter_of(place)
    file = place / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = np.nan
    save_file(tensors, file)


def adapter_of_another_base(place: Path) -> None:
    adapter_of(place)
    file = place / "adapter" / "adapter_model.safetensors"
    save_file({key.replace("layers.0", "layers.7"): value for key, value in load_file(file).items()}, file)


def adapter_of(place: Path) -> None:
    """A saved adapter that fits the base, named in the config."""
    from soup_xb.cli.main import main

    main.main(["train", "--output", "first"], standalone_mode=False)
    shutil.copytree(place / "first" / "adapter", place / "adapter")
    content = json.loads((place / "soup.yaml").read_text())
    (place / "soup.yaml").write_text(json.dumps({**content, "adapter": "adapter"}))


ROWS = [
    (no_file, (), 2, "config-not-found", "soup.yaml"),
    (None, ("--set", "training.lora.target_modules=q_pro"), 2, "pattern-without-module", "q_proj"),
    (None, ("--set", "training.lora.rank_pattern={w_proj: 4}"), 2, "pattern-without-module", "w_proj"),
    (None, ("--set", "training.lora.target_modules=(.w"), 2, "bad-pattern", "not a regular expression"),
    (None, ("--set", "task=ppo"), 2, "unknown-choice", "must be one of sft"),
    (None, ("--set", "training.precision=fp16"), 2, "torch-no-fp16", "bf16"),
    (None, ("--backend", "cuda"), 2, "usage", "cuda"),
    (no_data, (), 3, "", "train.jsonl"),
    (empty_data, (), 3, "", "train.jsonl"),
    (cut_data, (), 3, "", "train.jsonl:50"),
    (strange_columns, (), 3, "", "colour"),
    (no_assistant, (), 3, "", "assistant"),
    (no_base, (), 4, "base-not-found", "./base"),
    (no_base_config, (), 4, "base-config", "config.json"),
    (broken_base_config, (), 4, "base-config", "config.json"),
    (cut_weights, (), 4, "damaged-weights", "model.safetensors"),
    (pickled_weights, (), 4, "foreign-weights", "pickle"),
    (missing_weight, (), 4, "incomplete-weights", "model.layers.0.mlp.up_proj.weight"),
    (unknown_type, (), 4, "unknown-model-type", "frobnicator"),
    (remote_code, (), 4, "remote-code", "AutoModelForCausalLM"),
    (no_chat_template, (), 4, "no-chat-template", "data.chat_template"),
    (adapter_with_nan, (), 4, "non-finite-adapter", "not finite"),
    (adapter_of_another_base, (), 4, "adapter-does-not-fit", "layers."),
    (None, ("--set", "adapter=nowhere"), 4, "adapter-not-found", "nowhere"),
    (None, ("--resume-from", "nowhere"), 5, "no-checkpoint", "nowhere"),
    (output_is_a_file, (), 7, "output-is-file", "out"),
]


@pytest.mark.parametrize(
    ("spoil", "words", "code", "name", "text"),
    ROWS,
    ids=[f"{spoil.__name__ if spoil else '-'.join(words)}" for spoil, words, *_ in ROWS],
)
def test_each_mistake_has_one_message_and_its_exit_code(
    soupx: Soupx,
    workplace: Path,
    spoil: Callable[[Path], None] | None,
    words: tuple[str, ...],
    code: int,
    name: str,
    text: str,
) -> None:
    if spoil is not None:
        spoil(workplace)
    answer = soupx("train", *words)
    assert answer.code == code, answer.err
    errors = [line for line in answer.err.splitlines() if line.startswith("error[")]
    assert len(errors) == 1, answer.err
    assert f"error[{name}" in errors[0]
    assert text in answer.err
    assert "Traceback" not in answer.err
    assert not (workplace / "out" / "adapter").exists()


def test_a_run_that_failed_before_its_first_step_does_not_block_the_next(
    soupx: Soupx, workplace: Path
) -> None:
    no_chat_template(workplace)
    assert soupx("train").code == 4
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
    answer = soupx("train", "--set", f"data.chat_template={json.dumps(template)}")
    assert answer.code == 0, answer.err


def test_the_code_in_a_model_folder_of_a_known_type_is_never_imported(soupx: Soupx, workplace: Path) -> None:
    change_base(workplace, auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"})
    (workplace / "base" / "evil.py").write_text("raise SystemExit('the code of a model folder ran')")
    answer = soupx("train")
    assert answer.code == 0, answer.err


def test_a_lack_of_memory_names_the_ways_out(
    soupx: Soupx, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model asks the allocator for far more than any machine has: the real error, in the real place."""
    import torch

    from soup_xb.backends.torch import outputs

    def greedy(*_: object) -> torch.Tensor:
        return torch.empty(2**55)

    monkeypatch.setattr(outputs, "token_logps", greedy)
    answer = soupx("train")
    assert answer.code == 7, answer.err
    assert "error[out-of-memory] out of memory while training" in answer.err
    assert "gradient_checkpointing" in answer.err
    monkeypatch.undo()
    monkeypatch.chdir(workplace)
    # Nothing was learned, so nothing stands in the way of the next try.
    assert soupx("train").code == 0
    assert soupx("train").code == 7
