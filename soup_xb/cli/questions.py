"""The questions of `soupx init` on a terminal: what is to be taught, on which machine, from which base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from attrs import frozen

from soup_xb.core.config.load import parse_config
from soup_xb.core.config.schema import TrainingConfig
from soup_xb.core.templates import Template

_NO_GPU = "no GPU: this computer's processor"
# Where memory is scarce, rows pass one at a time, and long ones are cut.
_MACHINES: Mapping[str, Mapping[str, Any]] = {
    "an Apple silicon Mac": {},
    "a GPU with up to 12 GB (in 4 bits, which needs soup-xb[quantization])": {
        "training.quantization": "4bit",
        "training.batch_size": 1,
    },
    "a GPU with 16 GB or more": {},
    _NO_GPU: {"training.batch_size": 1, "data.max_length": 512},
}
_CHAT_BASES = {
    "Qwen/Qwen3-0.6B": "0.6 billion weights, for a processor or a first try",
    "Qwen/Qwen3-1.7B": "1.7 billion, 4 GB to download",
    "Qwen/Qwen3-4B-Instruct-2507": "4 billion, 8 GB",
    "meta-llama/Llama-3.2-3B-Instruct": "3 billion, 6 GB; its licence is accepted on its page first",
}
_EXPERT_BASES = {
    "allenai/OLMoE-1B-7B-0125-Instruct": "7 billion weights, 1 active, 14 GB to download",
    "Qwen/Qwen3-30B-A3B-Instruct-2507": "30 billion, 3 active, 61 GB",
}
# Tasks whose bases are of another kind, the usual one first.
_BASES_OF_TASKS: Mapping[str, Mapping[str, str]] = {
    "pretrain": {
        "Qwen/Qwen3-0.6B-Base": "0.6 billion weights, for a processor or a first try",
        "Qwen/Qwen3-1.7B-Base": "1.7 billion, 4 GB to download",
        "Qwen/Qwen3-4B-Base": "4 billion, 8 GB",
        "meta-llama/Llama-3.2-3B": "3 billion, 6 GB; its licence is accepted on its page first",
    },
    "embedding": {
        "sentence-transformers/all-MiniLM-L6-v2": "23 million weights, for any machine",
        "BAAI/bge-base-en-v1.5": "110 million, 0.4 GB to download",
        "Qwen/Qwen3-Embedding-0.6B": "0.6 billion, 1.2 GB, more than a hundred languages",
    },
    "vision": {
        "HuggingFaceTB/SmolVLM-500M-Instruct": "half a billion weights, 1 GB to download",
        "Qwen/Qwen2.5-VL-3B-Instruct": "3 billion, 8 GB",
    },
    "audio": {
        "openai/whisper-small": "0.24 billion weights, 1 GB to download; writes down what is said",
        "openai/whisper-large-v3-turbo": "0.8 billion, 1.6 GB",
        "Qwen/Qwen2-Audio-7B-Instruct": "8 billion, 17 GB; answers about a sound",
    },
}


@frozen
class Answers:
    """What the person said: the template, the values to put into it, and a file of their own rows, if any."""

    template: str
    values: Mapping[str, Any]
    rows: str


def ask(templates: Sequence[Template]) -> Answers:
    """Ask on the terminal. Raises click.Abort when the person stops."""
    names = [template.name for template in templates]
    lines = [f"{template.name}: {template.description}" for template in templates]
    usual = names.index("chat") if "chat" in names else 0
    template = templates[_choose("What do you want to teach?", lines, usual)]
    rows = _ask_for_rows()
    machines = list(_MACHINES)
    machine = machines[_choose("Which machine trains it?", machines)]
    values = dict(_MACHINES[machine])
    if template.task == "embedding":
        # The rows of a micro-batch are told from each other, and encoders fit any machine.
        values = {}
    elif values.get("training.batch_size") == 1:
        config = parse_config(template.folder.read(template.file), template.file).config
        values["training.gradient_accumulation_steps"] = _rows_of_a_step(config.training)
        _keep_shorter(values, template.task, config.data.max_length)
    values["base"] = _ask_for_base(template, machine)
    if rows:
        values |= {"data.train": rows, "data.format": "auto"}
    return Answers(template.name, values, rows)


def bases_for(template: Template) -> Mapping[str, str]:
    """The bases that suit a template's task, and how large they are."""
    return _EXPERT_BASES if template.name == "moe" else _BASES_OF_TASKS.get(template.task, _CHAT_BASES)


def _rows_of_a_step(training: TrainingConfig) -> int:
    """Batch times accumulation: what was learned from them at one time stays so in smaller pieces."""
    return training.batch_size * training.gradient_accumulation_steps


def _keep_shorter(values: dict[str, Any], task: str, max_length: int) -> None:
    """A machine's length never makes rows longer, and pictures cannot be cut."""
    if task == "vision" or values.get("data.max_length", 0) > max_length:
        values.pop("data.max_length", None)


def _ask_for_rows() -> str:
    """A file of the person's own, or the empty text for sample rows."""
    while True:
        question = "\nWhere are your rows? A file; Enter takes the sample rows that come with the template"
        path: str = click.prompt(question, default="", show_default=False, err=True).strip()
        if not path or Path(path).expanduser().is_file():
            return path and str(Path(path).expanduser())
        click.echo(f"there is no file {path}", err=True)


def _ask_for_base(template: Template, machine: str) -> str:
    known = bases_for(template)
    names = list(known)
    lines = [f"{name} ({size})" for name, size in known.items()]
    usual = 0 if machine == _NO_GPU else _usual(template, names)
    chosen = _choose("Which base?", [*lines, "another: a name on huggingface.co, or a folder"], usual)
    if chosen < len(names):
        return names[chosen]
    other: str = click.prompt("Its name", err=True)
    return other.strip()


def _usual(template: Template, names: Sequence[str]) -> int:
    """A small chat model where that will do, else the template's own base where it is offered."""
    if bases_for(template) is _CHAT_BASES and template.name not in ("code", "medical"):
        return 1
    own = parse_config(template.folder.read(template.file), template.file).config.base
    return names.index(own) if own in names else 0


def _choose(question: str, lines: Sequence[str], usual: int = 0) -> int:
    """The index of the line that the person takes."""
    click.echo(f"\n{question}", err=True)
    for number, line in enumerate(lines, start=1):
        click.echo(f"  {number}  {line}", err=True)
    chosen: int = click.prompt("Number", type=click.IntRange(1, len(lines)), default=usual + 1, err=True)
    return chosen - 1
