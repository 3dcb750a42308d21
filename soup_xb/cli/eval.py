"""`soupx eval`: the measures of an adapter's task on a file, of the base and of the adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from soup_xb.cli.options import BACKENDS, columns_option, json_option
from soup_xb.core.tasks import FORMATS

if TYPE_CHECKING:
    from soup_xb.core.run.session import LossSum


@click.command()
@click.argument("adapter", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Rows to evaluate on.")
@click.option(
    "--format", "data_format", type=click.Choice(("auto", *FORMATS)), default="auto", show_default=True
)
@columns_option
@click.option("--base", help="Hub id or folder of the base; by default the adapter's own.")
@click.option("--batch-size", type=click.IntRange(1, 65536), default=4, show_default=True)
@click.option(
    "--max-length",
    type=click.IntRange(2),
    help="Longer rows are cut; by default the run's own for the measures of its task, else 2048.",
)
@click.option(
    "--reward",
    "rewards",
    multiple=True,
    metavar="REWARD",
    help="What judges sampled answers, in place of the run's `training.rewards`.",
)
@click.option("--backend", type=BACKENDS, default="auto", show_default=True)
@json_option
def command(  # noqa: PLR0913 - one parameter an option
    adapter: Path,
    data: Path,
    data_format: str,
    columns: dict[str, str],
    base: str | None,
    batch_size: int,
    max_length: int | None,
    rewards: tuple[str, ...],
    backend: str,
    as_json: bool,
) -> None:
    """Evaluate OUT, a run's output folder or an adapter folder, against its untouched base.

    Rows as the run's task learns from them (pairs, judged answers, prompts) give that task's measures: accuracy and
    margin, or what sampled answers earn. Other rows give loss and perplexity.
    """
    from soup_xb.backends import available_backend
    from soup_xb.runs.adapters import TrainedOptions
    from soup_xb.runs.evaluate import Held, evaluate

    held = Held(data, data_format, columns, batch_size, max_length, rewards)
    found = evaluate(TrainedOptions(available_backend(backend), adapter, base), held)
    for problem in found.notices:
        click.echo(problem.render("note"), err=True)
    figures = {name: _figures(loss, found.examples) for name, loss in found.figures.items()}
    if as_json:
        click.echo(json.dumps(figures, indent=2))
        return
    widths = {name: max(10, len(name) + 1) for name in figures["adapter"]}
    click.echo(f"{'':8}" + "".join(f" {name.replace('_', ' '):>{width}}" for name, width in widths.items()))
    for label, row in figures.items():
        cells = (f" {_shown(row[name]):>{width}}" for name, width in widths.items())
        click.echo(f"{label:8}" + "".join(cells))


def _figures(loss: LossSum, examples: str) -> dict[str, float]:
    from soup_xb.core.run.loop import perplexity

    if loss.examples:
        return {"loss": loss.mean, **loss.means, examples: loss.examples}
    return {"loss": loss.mean, "perplexity": perplexity(loss.mean), "target_tokens": loss.target_tokens}


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
