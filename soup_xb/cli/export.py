"""`soupx export`: an adapter in another library's form."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("adapter", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--to", "form", required=True, type=click.Choice(["mlx-lm", "peft"]), help="The form to write.")
@click.option(
    "--output", required=True, type=click.Path(path_type=Path), help="A folder that does not exist yet."
)
@click.option("--base", help="Base to name in the adapter's settings, where OUT does not name it.")
@click.option(
    "--compact",
    is_flag=True,
    help="With --to peft: each module's own rank and alpha, which PEFT and vLLM 0.32 read.",
)
def command(adapter: Path, form: str, output: Path, base: str | None, compact: bool) -> None:
    """Write OUT (a run's output folder, a PEFT or an mlx-lm adapter) for stock mlx-lm, or for PEFT and its readers.

    In PEFT's form all modules get one rank and one alpha, which vLLM, llama.cpp and others read as PEFT does. A VeRA
    adapter becomes the plain LoRA that it equals.
    """
    from soup_xb.runs.export import ExportOptions, export_adapter

    if compact and form != "peft":
        raise click.UsageError("--compact is for --to peft.")
    for problem in export_adapter(adapter, output, ExportOptions(form, base, compact)):
        click.echo(problem.render("note"), err=True)
    click.echo(str(output))
