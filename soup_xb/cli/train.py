"""`soupx train`: fine-tune from one file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from soup_xb.cli.options import config_options, json_option, load
from soup_xb.core.run.stop import is_first_process

if TYPE_CHECKING:
    from soup_xb.runs.finish import Outcome


@click.command()
@config_options
@click.option("--output", type=click.Path(path_type=Path), help="Output folder; wins over the file.")
@click.option("--resume", is_flag=True, help="Go on from the newest whole checkpoint.")
@click.option("--resume-from", type=click.Path(path_type=Path), help="Go on from this checkpoint.")
@click.option(
    "--override-resume",
    "overrides_resume",
    multiple=True,
    metavar="KEY",
    help="Go on although this key differs from the checkpoint's (also: data, processes).",
)
@click.option(
    "--resume-weights-only",
    is_flag=True,
    help="A warm start: take the checkpoint's factors, and begin at step 1.",
)
@click.option("--overwrite", is_flag=True, help="Replace the run that the output folder holds.")
@click.option("--prompt", "prompts", multiple=True, help="Answered before and after, for the report.")
@json_option
def command(  # noqa: PLR0913 - one parameter an option
    file: Path | None,
    named: Path | None,
    overrides: tuple[str, ...],
    backend: str | None,
    output: Path | None,
    resume: bool,
    resume_from: Path | None,
    overrides_resume: tuple[str, ...],
    resume_weights_only: bool,
    overwrite: bool,
    prompts: tuple[str, ...],
    as_json: bool,
) -> None:
    """Fine-tune the base that FILE (default: soup.yaml) names, and save a portable adapter."""
    if output is not None:
        overrides = (*overrides, f"output={json.dumps(str(output))}")
    loaded = load(file, named, backend, overrides)
    from soup_xb.cli.progress import ProgressListener
    from soup_xb.runs.resume import ResumeRequest, TrainOptions
    from soup_xb.runs.train import train

    request = ResumeRequest(resume, resume_from, overrides_resume, resume_weights_only)
    options = TrainOptions(resume=request, overwrite=overwrite, prompts=prompts)
    with ProgressListener(0, loaded.config.training.logging_steps, sys.stderr) as progress:
        outcome = train(loaded, options, [progress])
    if not is_first_process():
        return
    if as_json:
        click.echo(json.dumps(_summary(outcome), indent=2))
        return
    if outcome.already_complete:
        click.echo(f"already complete at step {outcome.record.steps}")
    click.echo(f"adapter: {outcome.adapter}\nreport:  {outcome.report}")


def _summary(outcome: Outcome) -> dict[str, Any]:
    record = outcome.record
    return {
        "status": record.status,
        "backend": record.backend,
        "steps": record.steps,
        "train_seconds": record.train_seconds,
        "tokens_per_second": record.tokens_per_second,
        "peak_memory_bytes": record.peak_memory_bytes,
        "already_complete": outcome.already_complete,
        "output": str(outcome.folder),
        "adapter": str(outcome.adapter),
        "report": str(outcome.report),
    }
