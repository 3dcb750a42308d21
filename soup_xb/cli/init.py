"""`soupx init`: a first config from a template, with sample rows if asked for."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

import click

from soup_xb.cli.options import DEFAULT_FILE
from soup_xb.core.disk import disk_errors, write_bytes
from soup_xb.core.errors import ConfigError, Problem
from soup_xb.core.templates import list_templates, load_sample, load_template

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
    from soup_xb.cli.questions import ask
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
