"""`soupx plan`: everything that a run decides before it starts, without loading weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from soup_xb.cli.options import config_options, json_option, load

if TYPE_CHECKING:
    from soup_xb.core.base.coverage_text import CoverageRow

_HELD = {
    "none": "each with the whole base",
    "fsdp": "each with its part of the base and the blocks that compute",
}


@click.command()
@config_options
@click.option("--processes", type=click.IntRange(1, 65536), default=1, show_default=True)
@json_option
def command(  # noqa: PLR0913 - one parameter an option
    file: Path | None,
    named: Path | None,
    overrides: tuple[str, ...],
    backend: str | None,
    processes: int,
    as_json: bool,
) -> None:
    """Show modules, ranks, steps, learning rates and memory of FILE (default: soup.yaml)."""
    loaded = load(file, named, backend, overrides)
    from soup_xb.backends import choose_backend
    from soup_xb.core.base.coverage_text import coverage_rows
    from soup_xb.core.config.support import refusals
    from soup_xb.core.run.memory import LargestBatch, estimate_memory
    from soup_xb.core.run.plan import plan_summary
    from soup_xb.runs.open import check_processes, open_run

    check_processes(loaded, processes)
    chosen = choose_backend(loaded)
    with open_run(loaded, chosen, weights=False) as run:
        for problem in (*loaded.warnings, *run.plan.warnings):
            click.echo(problem.render("warning"), err=True)
        for problem in run.session.notices()[1:]:
            click.echo(f"note: {problem.message}", err=True)
        facts, description = run.plan.rows.facts, run.session.describe()
        memory = estimate_memory(
            description,
            run.plan.adapters.modules,
            loaded.config.training,
            run.session.precision,
            LargestBatch.of(loaded.config, facts, description.vocabulary_size, processes),
        )
        summary = plan_summary(run.plan, run.coverage, memory, processes)
        covered = coverage_rows(run.coverage, chosen[0])
        summary["backend"] = {
            "name": chosen[0],
            "reason": chosen[1],
            "device": run.session.notices()[0].message,
        }
    summary["refused"] = {
        name: [problem.message for problem in refusals(loaded, name)] for name in ("torch", "mlx")
    }
    if as_json:
        click.echo(json.dumps(summary, indent=2))
        return
    _show(summary, covered)


def _show(summary: dict[str, Any], covered: Sequence[CoverageRow]) -> None:
    from soup_xb.core.run.plan import step_list
    from soup_xb.core.text import bytes_text

    rates, batch, memory = summary["learning_rate"], summary["batch"], summary["memory_bytes"]
    click.echo(f"backend    {summary['backend']['name']}: {summary['backend']['reason']}")
    click.echo(f"device     {summary['backend']['device']}")
    click.echo(f"rows       {summary['rows']['train']:,} to train on, {summary['rows']['eval']:,} held out")
    click.echo(
        f"steps      {summary['steps']:,} ({summary['epochs']:.2f} epochs), each {batch['micro_batches_per_step']} x "
        f"{batch['rows_per_micro_batch']} rows"
        + (f", {batch['rows_per_process']} a process" if batch["processes"] > 1 else "")
    )
    if batch["processes"] > 1:
        click.echo(f"processes  {batch['processes']}, {_HELD[batch['sharding']]}")
    for name in ("eval", "save", "restart"):
        click.echo(f"{name:10} {step_list(summary[f'{name}_steps'])}")
    click.echo(
        f"rate       {rates['scheduler']}, peak {rates['peak']:g}, {rates['warmup_steps']} warm-up steps"
    )
    click.echo("           " + "  ".join(f"{step}: {rate:.2e}" for step, rate in rates["curve"]))
    click.echo(f"\n{'modules':20} {'count':>6} {'rank':>5} {'alpha':>6} {'scale':>7} {'parameters':>14}")
    for row in summary["modules"]:
        click.echo(
            f"{row['name']:20} {row['count']:6} {row['rank']:5} {row['alpha']:6} {row['scale']:7.3g} "
            f"{row['parameters']:14,}"
        )
    click.echo(f"{'total':20} {'':6} {'':5} {'':6} {'':7} {summary['trained_parameters']:14,}")
    click.echo("\nreached")
    for one in covered:
        for text in (
            f"{one.label}: {one.texts[0]}",
            *(f"  {text}" for text in (*one.texts[1:], one.help) if text),
        ):
            click.echo(f"  {text}")
    click.echo(
        f"\nmemory     about {bytes_text(memory['total'])} a process: base {bytes_text(memory['base'])}, adapter and "
        f"optimizer {bytes_text(memory['adapter_and_optimizer'])}, activations {bytes_text(memory['activations'])}"
    )
    for name, refused in summary["refused"].items():
        for message in refused:
            click.echo(f"{name:10} {message}")
