"""`soupx check`: every problem of a config file at once, nothing loaded."""

from __future__ import annotations

import json
import platform
from importlib.util import find_spec
from pathlib import Path

import click
from attrs import asdict

from soup_xb.cli.options import config_options, json_option, load
from soup_xb.core.config.load import LoadedConfig, config_dict
from soup_xb.core.config.support import check_supported, choose_backend
from soup_xb.core.errors import Problem, SoupError


@click.command()
@config_options
@json_option
def command(
    file: Path | None,
    named: Path | None,
    overrides: tuple[str, ...],
    backend: str | None,
    as_json: bool,
) -> None:
    """Check FILE (default: soup.yaml): every problem at once, without base, data or network."""
    try:
        loaded = load(file, named, backend, overrides)
        engine, reason = _backend(loaded)
        check_supported(loaded, engine)
    except SoupError as error:
        if as_json:
            click.echo(json.dumps({"ok": False, "problems": _plain(error.problems)}, indent=2))
        raise
    if as_json:
        result = {
            "ok": True,
            "file": loaded.source,
            "backend": {"name": engine, "reason": reason},
            "config": config_dict(loaded.config),
            "warnings": _plain(loaded.warnings),
            "problems": [],
        }
        click.echo(json.dumps(result, indent=2))
        return
    for warning in loaded.warnings:
        click.echo(warning.render("warning"), err=True)
    click.echo(_summary(loaded, engine))


def _backend(loaded: LoadedConfig) -> tuple[str, str]:
    """The backend that a run on this machine would take; a check does not need it installed."""
    if loaded.config.backend != "auto":
        return loaded.config.backend, "asked for"
    return choose_backend(
        loaded,
        system=platform.system(),
        machine=platform.machine(),
        installed=lambda package: not package.startswith("mlx") or find_spec(package) is not None,
    )


def _plain(problems: tuple[Problem, ...]) -> list[dict[str, str]]:
    return [asdict(problem) for problem in problems]


def _summary(loaded: LoadedConfig, engine: str) -> str:
    config, training, lora = loaded.config, loaded.config.training, loaded.config.training.lora
    length = f"{training.max_steps} steps" if training.max_steps else f"{training.epochs} epochs"
    targets = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    rows = training.batch_size * training.gradient_accumulation_steps
    return "\n".join(
        (
            f"{loaded.source}: ok · {config.task} on {engine} · {config.base}",
            f"  {length}, {rows} rows a step, lr {training.lr:g} {training.scheduler}",
            f"  LoRA rank {lora.r}, alpha {lora.alpha} on {targets}",
        )
    )
