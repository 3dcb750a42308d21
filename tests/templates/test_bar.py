"""The bar for a template: its file passes the check, and its sample rows train on a tiny base of its kind."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from soup_xb.core.config.load import parse_config
from soup_xb.core.config.support import check_supported
from soup_xb.core.errors import ConfigError
from soup_xb.core.tasks import TASKS
from soup_xb.core.templates import Template, list_templates, load_sample, load_template, shipped_folder

TEMPLATES = list_templates(shipped_folder())
every_template = pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
VOCABULARY = 320
# A token is a byte here: declared tools alone are longer than other rows, and documents are meant to be.
LENGTHS = {"tool-calling": 2048, "longcontext": 4096}


@pytest.fixture(scope="module")
def tiny_experts(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A mixture of four experts in two blocks, with the tokenizer of the tiny Llama."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("tiny-experts")
    config = transformers.OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in tiny_llama.glob("*token*"):
        shutil.copy(file, folder)
    for file in tiny_llama.glob("*.jinja"):
        shutil.copy(file, folder)
    return folder


# ChatML with tools: a declaration in the first system turn, calls as JSON, answers in turns of the user.
TOOL_TEMPLATE = """
{%- if tools -%}
  {{- '<|im_start|>system\n' -}}
  {%- for tool in tools -%}{{- tool | tojson + '\n' -}}{%- endfor -%}
  {{- '<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
  {{- '<|im_start|>' + ('user' if message['role'] == 'tool' else message['role']) + '\n' + message['content'] -}}
  {%- for call in message['tool_calls'] or [] -%}{{- '<call>' + call['function'] | tojson + '</call>' -}}{%- endfor -%}
  {{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""


@pytest.fixture(scope="module")
def tiny_caller(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """The tiny Llama with a chat template that knows tools."""
    folder = tmp_path_factory.mktemp("tiny-caller")
    shutil.copytree(tiny_llama, folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").write_text(TOOL_TEMPLATE, "utf-8")
    return folder


@pytest.fixture(scope="module")
def tiny_bases(
    tiny_llama: Path,
    tiny_experts: Path,
    tiny_caller: Path,
    tiny_encoder: Path,
    media_base: Callable[[str], Path],
) -> Callable[[str], Path]:
    """The base that a template's rows are trained on."""
    special = {"moe": tiny_experts, "tool-calling": tiny_caller, "embedding": tiny_encoder}
    media = {"vision": "llava", "audio": "whisper"}
    return lambda name: media_base(media[name]) if name in media else special.get(name, tiny_llama)


def test_the_registry_holds_the_templates_whose_task_trains_today() -> None:
    assert {template.name for template in TEMPLATES} >= {"chat", "code", "medical", "moe"}


@every_template
def test_the_file_passes_the_check_and_is_what_the_manifest_says(template: Template) -> None:
    loaded = parse_config(load_template(template.name), template.file)
    assert loaded.warnings == ()
    assert loaded.config.task == template.task
    assert template.task in TASKS
    for backend in ("torch", "mlx"):
        try:
            check_supported(loaded, backend)
        except ConfigError as refused:
            assert backend not in template.backends, refused
    check_supported(loaded, "torch")


@every_template
def test_every_line_that_a_person_may_change_says_what_it_does(template: Template) -> None:
    lines = load_template(template.name).splitlines()
    assert lines[0] == "# yaml-language-server: $schema=soup.schema.json"
    silent = {"data", "training", "lora", "rope_scaling", "format", "save_total_limit", "output"}
    for number, line in enumerate(lines):
        key = re.match(r" *([a-z_]+):", line)
        if key and key[1] not in silent:
            assert "#" in line or lines[number - 1].lstrip().startswith("#"), f"{number + 1}: {line}"
    text = "\n".join(lines)
    assert "Change `data.train` first" in text
    assert re.search(r"\d+ (to [\d,]+ )?rows", text), "how many rows"
    assert re.search(r"# Memory to expect with \S+: about \d+ GB", text), "how much memory"


@every_template
def test_the_sample_rows_are_whole_and_distinct(template: Template) -> None:
    rows = [json.loads(line) for line in load_sample(template.name).splitlines()]
    assert 8 <= len(rows) <= 20
    assert len({json.dumps(row) for row in rows}) == len(rows)


def train_judge(base: Any, soupx: Callable[..., Any]) -> None:
    """The reward model that the template's first command makes, on the tiny base."""
    assert soupx("init", "--template", "dpo", "--with-data", "--output", "judge.yaml").code == 0
    values = {
        "base": base,
        "task": "reward",
        "output": "./reward-output",
        "training.max_steps": 1,
        "training.beta": "null",
        "data.max_length": 256,
    }
    words = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    made = soupx("train", "judge.yaml", *words)
    assert made.code == 0, made.err


@every_template
@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_the_sample_rows_train_for_three_steps(
    template: Template,
    backend: str,
    tiny_bases: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    soupx: Callable[..., Any],
) -> None:
    if backend not in template.backends:
        pytest.skip(f"the manifest does not promise {backend}")
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    monkeypatch.chdir(tmp_path)
    assert soupx("init", "--template", template.name, "--with-data").code == 0
    changes = {
        "base": f"'{tiny_bases(template.name)}'",
        "training.max_steps": 3,
        "training.epochs": "null",
        "training.batch_size": 1,
        "training.gradient_accumulation_steps": 1,
        "data.max_length": LENGTHS.get(template.name, 256),
    }
    if TASKS[template.task].samples:
        changes |= {"training.group_size": 2, "training.max_new_tokens": 8}
    if template.task == "grpo":
        # Of what a random model writes, nothing but letters could earn anything.
        changes["training.answer_pattern"] = "'[a-m]'"
    if template.task == "rlhf":
        train_judge(changes["base"], soupx)
    words = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    done = soupx("train", "--backend", backend, *words)
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "output" / "run.json").read_text())
    assert (record["status"], record["steps"], record["backend"]) == ("finished", 3, backend)
    adapted = load_file(tmp_path / "output" / "adapter" / "adapter_model.safetensors")
    assert any(".experts." in name for name in adapted) == (template.name == "moe")
    assert not [name for name in adapted if ".gate." in name], "the router is left as it is"
