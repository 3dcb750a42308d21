"""`soupx eval`: loss and perplexity, or accuracy, on a file, of the base and of the adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from soup_xb.cli.options import BACKENDS, columns_option, json_option
from soup_xb.core.tasks import TASKS

if TYPE_CHECKING:
    from soup_xb.core.run.session import LossSum

# What has a loss of its own, without another answer or a reward beside it.
_MEASURED = [task for task in TASKS.values() if task.kind in ("tokens", "embedding")]
FORMATS = ("auto", *dict.fromkeys(name for task in _MEASURED for name in task.formats))


@click.command()
@click.argument("adapter", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Rows to evaluate on.")
@click.option("--format", "data_format", type=click.Choice(FORMATS), default="auto", show_default=True)
@columns_option
@click.option("--base", help="Hub id or folder of the base; by default the adapter's own.")
@click.option("--batch-size", type=click.IntRange(1, 65536), default=4, show_default=True)
@click.option("--max-length", type=click.IntRange(2), default=2048, show_default=True)
@click.option("--backend", type=BACKENDS, default="auto", show_default=True)
@json_option
def command(  # noqa: PLR0913 - one parameter an option
    adapter: Path,
    data: Path,
    data_format: str,
    columns: dict[str, str],
    base: str | None,
    batch_size: int,
    max_length: int,
    backend: str,
    as_json: bool,
) -> None:
    """Evaluate OUT, a run's output folder or an adapter folder, against its untouched base."""
    from soup_xb.backends import available_backend
    from soup_xb.core.run.plan import held_out_batches
    from soup_xb.data.dataset import tokenize_as
    from soup_xb.data.token_file import Reading
    from soup_xb.runs.adapters import TrainedOptions, open_trained

    with open_trained(TrainedOptions(available_backend(backend), adapter, base)) as trained:
        if trained.embedding is not None:
            max_length = min(max_length, trained.embedding.max_length)
        reading = Reading(data_format, trained.formats, columns=columns)
        found = tokenize_as(data, reading, trained.tokenizer, max_length)
        for problem in found.notices:
            click.echo(problem.render("note"), err=True)
        batches = held_out_batches(found.rows, batch_size, trained.tokenizer.pad_id)
        figures = {}
        for name, with_adapter in (("base", False), ("adapter", True)):
            figures[name] = _figures(trained.session.evaluate(batches, adapter=with_adapter))
    if as_json:
        click.echo(json.dumps(figures, indent=2))
        return
    widths = {name: max(10, len(name) + 1) for name in figures["base"]}
    click.echo(f"{'':8}" + "".join(f" {name.replace('_', ' '):>{width}}" for name, width in widths.items()))
    for label, row in figures.items():
        cells = (f" {_shown(row[name]):>{width}}" for name, width in widths.items())
        click.echo(f"{label:8}" + "".join(cells))


def _figures(loss: LossSum) -> dict[str, float]:
    from soup_xb.core.run.loop import perplexity

    if loss.examples:
        return {"loss": loss.mean, **loss.means, "rows": loss.examples}
    return {"loss": loss.mean, "perplexity": perplexity(loss.mean), "target_tokens": loss.target_tokens}


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
