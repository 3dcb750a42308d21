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
def command(adapter: Path, form: str, output: Path, base: str | None) -> None:
    """Write OUT (a run's output folder, a PEFT or an mlx-lm adapter) for stock mlx-lm or stock PEFT.

    A VeRA adapter becomes the plain LoRA that it equals.
    """
    from soup_xb.runs.export import export_adapter

    for problem in export_adapter(adapter, output, form, base):
        click.echo(problem.render("note"), err=True)
    click.echo(str(output))
