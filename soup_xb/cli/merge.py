"""`soupx merge`: the full model, base and adapter in one."""

from __future__ import annotations

from pathlib import Path

import click

from soup_xb.cli.options import BACKENDS


@click.command()
@click.argument("adapter", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--output", required=True, type=click.Path(path_type=Path), help="A folder that does not exist yet."
)
@click.option("--base", help="Hub id or folder of the base; by default the adapter's own.")
@click.option("--precision", type=click.Choice(["base", "fp32", "bf16"]), default="base", show_default=True)
@click.option("--backend", type=BACKENDS, default="auto", show_default=True)
def command(adapter: Path, output: Path, base: str | None, precision: str, backend: str) -> None:
    """Fold OUT (a run's output folder or an adapter folder) into its base and write the whole model."""
    from soup_xb.backends import available_backend
    from soup_xb.runs.adapters import TrainedOptions
    from soup_xb.runs.export import merge_adapter

    options = TrainedOptions(available_backend(backend), adapter, base, precision)
    for problem in merge_adapter(options, output):
        click.echo(problem.render("note"), err=True)
    click.echo(str(output))
