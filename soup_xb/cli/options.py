"""Options that several commands share, and the loading of the file that they name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from soup_xb.core.config.load import LoadedConfig, load_config

Command = TypeVar("Command", bound=Callable[..., Any])

DEFAULT_FILE = Path("soup.yaml")
BACKENDS = click.Choice(["auto", "torch", "mlx"])


def config_options(command: Command) -> Command:
    """FILE (or --config FILE), --set and --backend."""
    for decorate in (
        click.option("--backend", type=BACKENDS, help="The engine; wins over the file."),
        click.option(
            "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a key of the file."
        ),
        click.option("--config", "named", type=click.Path(path_type=Path), help="The same as naming FILE."),
        click.argument("file", type=click.Path(path_type=Path), required=False),
    ):
        command = decorate(command)
    return command


def json_option(command: Command) -> Command:
    """--json."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")(command)


def _read_names(_context: click.Context, _option: click.Parameter, texts: tuple[str, ...]) -> dict[str, str]:
    """`--columns ours=theirs,…` as `data.columns` has it."""
    names: dict[str, str] = {}
    for text in (part for whole in texts for part in whole.split(",")):
        ours, equals, theirs = (part.strip() for part in text.partition("="))
        if not (ours and equals and theirs):
            raise click.BadParameter(f"{text!r} is not NAME=COLUMN, such as instruction=question")
        names[ours] = theirs
    return names


def columns_option(command: Command) -> Command:
    """--columns: our names for the file's columns, ours -> theirs."""
    help = (
        "Columns of the file by other names than ours, as `data.columns`: instruction=question,output=answer."
    )
    decorate = click.option(
        "--columns", multiple=True, metavar="NAME=COLUMN", callback=_read_names, help=help
    )
    return decorate(command)


def load(
    file: Path | None, named: Path | None, backend: str | None, overrides: tuple[str, ...]
) -> LoadedConfig:
    """The config that the command line means. Raises ConfigError with every problem of the file."""
    if file is not None and named is not None and file != named:
        raise click.UsageError(f"two files: {file} and --config {named}")
    if backend is not None:
        overrides = (*overrides, f"backend={backend}")
    return load_config(file or named or DEFAULT_FILE, overrides)
