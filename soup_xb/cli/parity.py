"""`soupx parity`: the first steps on both engines, side by side."""

from __future__ import annotations

import json
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

import click

from soup_xb.cli.options import config_options, json_option, load

if TYPE_CHECKING:
    from soup_xb.runs.parity import Parity


@click.command()
@config_options
@click.option("--steps", type=click.IntRange(1, 100_000), default=20, show_default=True)
@click.option("--report", type=click.Path(path_type=Path), help="Write the curves to this HTML file.")
@click.option("--measure-into", type=click.Path(path_type=Path), hidden=True)
@json_option
def command(  # noqa: PLR0913 - one parameter an option
    file: Path | None,
    named: Path | None,
    overrides: tuple[str, ...],
    backend: str | None,
    steps: int,
    report: Path | None,
    measure_into: Path | None,
    as_json: bool,
) -> None:
    """Run the first steps of FILE (default: soup.yaml) on torch and on mlx, and compare the numbers.

    Exits with 0 where every loss, every mean (accuracy, reward, KL) and the base's logits agree within the bounds, with
    4 where not.
    """
    loaded = load(file, named, backend, overrides)
    from soup_xb.runs.parity import compare, measure

    if measure_into is not None:
        measure(loaded, steps, measure_into)
        return
    parity = compare(loaded, steps)
    if report is not None:
        _write_report(report, parity)
    click.echo(json.dumps(_summary(parity), indent=2) if as_json else _table(parity))
    if not parity.same:
        _refuse(parity)


def _summary(parity: Parity) -> dict[str, object]:
    return {
        "same": parity.same,
        "loss_difference": parity.loss_difference,
        # JSON has no infinity.
        "means_differences": {
            name: value if isfinite(value) else None for name, value in parity.means_differences.items()
        },
        "logits_difference": parity.logits_difference,
        "logits_bound": parity.logits_bound,
        "largest_logit": parity.largest_logit,
        "losses": parity.losses,
    }


def _table(parity: Parity) -> str:
    lines = [f"{'step':>5} {'torch':>12} {'mlx':>12} {'difference':>12}"]
    for step, (torch, mlx) in enumerate(zip(*parity.losses.values(), strict=True), start=1):
        lines.append(f"{step:5} {torch:12.6f} {mlx:12.6f} {abs(torch - mlx):12.2e}")
    lines.append(
        f"\nbase logits: {parity.logits_difference:.2e} apart (bound {parity.logits_bound:.2e}, "
        f"largest logit {parity.largest_logit:.1f})"
    )
    lines.append(f"losses: at most {parity.loss_difference:.2e} apart")
    for name, difference in parity.means_differences.items():
        lines.append(f"{name}: at most {difference:.2e} apart")
    if not parity.exact_settings:
        lines.append("dropout, bf16 and quantized bases are each engine's own: numbers differ there")
    lines.append("the engines agree" if parity.same else "the engines differ")
    return "\n".join(lines)


def _write_report(report: Path, parity: Parity) -> None:
    from html import escape

    from soup_xb.core.disk import disk_errors, write_text
    from soup_xb.runs.parity import curves_svg

    page = (
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>torch and mlx, side by side</title>"
        "<style>body{font:16px system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}svg{width:100%;height:auto}"
        "pre{overflow-x:auto}</style><h1>torch and mlx, side by side</h1>"
        f"{curves_svg(parity.losses)}<pre>{escape(_table(parity))}</pre></html>\n"
    )
    with disk_errors(report, len(page)):
        write_text(report, page)


def _refuse(parity: Parity) -> None:
    from soup_xb.core.errors import ModelError

    cure = (
        "report this base and file."
        if parity.exact_settings
        else "use fp32, dropout 0 and a plain base to compare."
    )
    widest = max(
        [("losses", parity.loss_difference), *parity.means_differences.items()], key=lambda one: one[1]
    )
    raise ModelError("engines-differ", f"{widest[0]}: {widest[1]:.2e} apart", help=cure)
