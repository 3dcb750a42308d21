"""`soupx init`: a first config from a template, with sample rows if asked for."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from attrs import frozen

from soup_xb.cli.options import DEFAULT_FILE
from soup_xb.core.config.load import parse_config
from soup_xb.core.config.schema import TrainingConfig
from soup_xb.core.disk import disk_errors, write_bytes
from soup_xb.core.errors import ConfigError, Problem
from soup_xb.core.tasks import TASKS
from soup_xb.core.templates import Template, list_templates, load_sample, load_template

# The first line of every template names it, for editors that read schemas.
SCHEMA = "soup.schema.json"


@click.command()
@click.option("--template", "name", help="The template to start from; `soupx templates` lists them.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=DEFAULT_FILE,
    show_default=True,
    help="File to write.",
)
@click.option("--with-data", is_flag=True, help="Write sample rows too, where the config reads them.")
@click.option("--force", is_flag=True, help="Overwrite what is there.")
@click.option("--templates-dir", type=click.Path(path_type=Path), help="Use this folder of templates alone.")
def command(name: str | None, output: Path, with_data: bool, force: bool, templates_dir: Path | None) -> None:
    """Write a first soup.yaml from a template. Without --template, a few questions on a terminal."""
    rows = ""
    if name is None:
        text, name, rows = _asked(templates_dir)
        with_data = with_data or not rows
    else:
        text = load_template(name, templates_dir)
    files: dict[Path, str | bytes] = {output: text}
    if with_data:
        from soup_xb.core.template_copy import load_sample_files, media_path, sample_path

        rows_file = sample_path(text, name)
        files[rows_file] = load_sample(name, templates_dir)
        for file, content in load_sample_files(name, templates_dir).items():
            files[media_path(rows_file, file)] = content
    write_files(files, force)
    _write_schema(output.parent / SCHEMA)
    for path in files:
        click.echo(f"wrote {path}", err=True)
    click.echo(f"next: {_next(output, with_data, rows)}", err=True)


def _asked(templates_dir: Path | None) -> tuple[str, str, str]:
    """The text that the answers make, the template's name, and the person's own rows if there are any."""
    templates = list_templates(templates_dir)
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        known = ", ".join(template.name for template in templates)
        raise ConfigError(
            "template-not-named",
            "there is no terminal to ask questions on",
            help=f"name a template, such as `soupx init --template chat`; there are: {known}.",
        )
    from soup_xb.core.template_copy import with_values

    answers = ask(templates)
    text = load_template(answers.template, templates_dir)
    return with_values(text, answers.values, answers.template), answers.template, answers.rows


def _next(output: Path, with_data: bool, rows: str) -> str:
    train = "soupx train" if output == DEFAULT_FILE else f"soupx train {shlex.quote(str(output))}"
    if rows:
        return f"soupx data {shlex.quote(rows)}   (are they read as you mean them?), then {train}"
    return train if with_data else f"put your rows where `data.train` says, then {train}"


def write_files(files: Mapping[Path, str | bytes], force: bool) -> None:
    """Write all files or, where one of them is there already and `force` is off, none. Raises ConfigError."""
    standing = [path for path in files if os.path.lexists(path)]
    for path in standing:
        if path.is_dir():
            raise ConfigError("output-is-folder", "is a folder, not a file", where=str(path))
    if standing and not force:
        raise ConfigError.of(_exists(path) for path in standing)
    for path, text in files.items():
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _put(path, text, force)


def _put(path: Path, content: str | bytes, force: bool) -> None:
    data = content.encode("utf-8") if isinstance(content, str) else content
    if force:
        write_bytes(path, data)
        return
    try:
        # Not even a file that appeared since we looked is overwritten.
        with path.open("xb") as file:
            file.write(data)
    except FileExistsError as error:
        raise ConfigError.of([_exists(path)]) from error


def _exists(path: Path) -> Problem:
    help = "write it anew with `--force`, or name another with `--output`."
    return Problem("file-exists", "is there already", str(path), help)


def _write_schema(path: Path) -> None:
    """The JSON Schema beside the config, for editors; one that is there stays."""
    from soup_xb.core.config.pages import config_schema

    text = json.dumps(config_schema(), indent=2) + "\n"
    if not os.path.lexists(path):
        with disk_errors(path):
            _put(path, text, force=False)
    elif not path.is_file() or path.stat().st_size != len(text) or path.read_text("utf-8") != text:
        click.echo(f"{path} is of another version; `soupx schema > {path}` renews it", err=True)


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
    if TASKS[template.task].embeds:
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
    if TASKS[task].media == "image" or values.get("data.max_length", 0) > max_length:
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
