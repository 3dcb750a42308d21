"""`soupx demo`: fine-tune a small real model on a shipped dataset, and show the difference."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from soup_xb.cli.options import BACKENDS, json_option

if TYPE_CHECKING:
    from soup_xb.demo.trial import Trial
    from soup_xb.runs.finish import Outcome

CONFIG = "soup.yaml"
SHOWN = 4
# A base without the format tends to ramble; the table shows how it begins.
SHOWN_LETTERS = 240


@click.command()
@click.option("--backend", type=BACKENDS, help="The engine; by default the one that fits this machine.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("soupx-demo"),
    show_default=True,
    help="Output folder.",
)
@click.option("--overwrite", is_flag=True, help="Replace the run that the output folder holds.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a key of the demo's config."
)
@json_option
def command(
    backend: str | None, output: Path, overwrite: bool, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Teach SmolLM2-135M an answer format in a minute or two, and judge it on 20 new questions."""
    from soup_xb.cli.progress import ProgressListener
    from soup_xb.core.config.load import dump_config
    from soup_xb.core.disk import write_text
    from soup_xb.demo.base import prepare_base
    from soup_xb.demo.trial import demo_config, hold_trials
    from soup_xb.runs.resume import TrainOptions
    from soup_xb.runs.train import train

    chosen = (f"backend={backend}",) if backend else ()
    _say("preparing the base model (once on this machine)")
    loaded = demo_config(prepare_base(), output, (*chosen, *overrides))
    with ProgressListener(0, loaded.config.training.logging_steps, sys.stderr) as progress:
        outcome = train(loaded, TrainOptions(overwrite=overwrite), [progress])
    _say("asking the base and the tuned model 20 questions that are not in the data")
    # A config to play with: it names the prepared base and the shipped data by their places on this machine.
    write_text(outcome.folder / CONFIG, dump_config(loaded.config))
    trials = hold_trials(outcome.adapter, outcome.record.backend, _say_verdicts)
    if as_json:
        click.echo(json.dumps(_summary(outcome, trials), indent=2, ensure_ascii=False))
        return
    _show_table(trials[:SHOWN])
    _show_end(outcome, trials)


def _say(text: str) -> None:
    click.echo(text, err=True)


def _say_verdicts(trial: Trial) -> None:
    words = {True: "yes", False: "no "}
    _say(f"  base {words[trial.base_passes]}  tuned {words[trial.tuned_passes]}  {trial.prompt}")


def _summary(outcome: Outcome, trials: tuple[Trial, ...]) -> dict[str, object]:
    return {
        "backend": outcome.record.backend,
        "steps": outcome.record.steps,
        "train_seconds": outcome.record.train_seconds,
        "tokens_per_second": outcome.record.tokens_per_second,
        "prompts": len(trials),
        "base": sum(trial.base_passes for trial in trials),
        "tuned": sum(trial.tuned_passes for trial in trials),
        "adapter": str(outcome.adapter),
        "report": str(outcome.report),
        "answers": [{"prompt": trial.prompt, "base": trial.base, "tuned": trial.tuned} for trial in trials],
    }


def _show_table(trials: tuple[Trial, ...]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_lines=True, expand=True)
    for title, ratio in (("prompt", 1), ("base", 2), ("tuned", 2)):
        table.add_column(title, ratio=ratio)
    for trial in trials:
        base = trial.base if len(trial.base) <= SHOWN_LETTERS else trial.base[:SHOWN_LETTERS] + "…"
        # Text and not str: brackets in an answer are no markup.
        table.add_row(Text(trial.prompt), Text(base), Text(trial.tuned))
    Console().print(table)


def _show_end(outcome: Outcome, trials: tuple[Trial, ...]) -> None:
    from soup_xb.core.text import duration_text
    from soup_xb.demo.trial import shipped

    summary = _summary(outcome, trials)
    click.echo(
        f"answers in the format: base {summary['base']}/{len(trials)}, tuned {summary['tuned']}/{len(trials)}"
    )
    click.echo(f"trained in {duration_text(outcome.record.train_seconds)} on {outcome.record.backend}")
    click.echo(f"adapter: {outcome.adapter}\nreport:  {outcome.report}\n")
    click.echo("next:")
    click.echo(f'  soupx generate --adapter {outcome.folder} --compare --prompt "Why do we sneeze?"')
    click.echo(f"  soupx eval {outcome.folder} --data {shipped('data/train.jsonl')}")
    click.echo(f"  soupx plan {outcome.folder / CONFIG}")
    click.echo(f"  soupx train {outcome.folder / CONFIG} --set training.lora.r=16 --output again")
