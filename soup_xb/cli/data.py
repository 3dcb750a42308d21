"""`soupx data`: what a data file holds, and which of its tokens would be trained on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from attrs import evolve

from soup_xb.cli.options import columns_option, json_option
from soup_xb.core.config.schema import KEYS
from soup_xb.core.errors import Problem
from soup_xb.core.tasks import FORMATS, TASKS

if TYPE_CHECKING:
    from soup_xb.core.rows.formats.detect import Formats
    from soup_xb.core.rows.row import TokenSequence
    from soup_xb.data.token_file import TokenFile

_BARS = 8
_BAR_WIDTH = 40
_SHOWN_CHARACTERS = 3000


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--base", help="Hub id or folder of the base whose tokenizer and chat template are used.")
@click.option(
    "--format", "data_format", type=click.Choice(("auto", *FORMATS)), default="auto", show_default=True
)
@click.option(
    "--task",
    type=click.Choice(list(TASKS)),
    help="Read the rows as this task does; for rows with pictures or sounds.",
)
@columns_option
@click.option("--max-length", type=click.IntRange(2), default=2048, show_default=True, help="In tokens.")
@click.option(
    "--train-on",
    type=click.Choice(KEYS["data.train_on"].choices),
    default="answers",
    show_default=True,
    help="As `data.train_on` of a config.",
)
@click.option("--chat-template", help="Jinja chat template to use instead of the base's: text or a file.")
@json_option
def command(  # noqa: PLR0913 - one parameter an option
    file: Path,
    base: str | None,
    data_format: str,
    task: str | None,
    columns: dict[str, str],
    max_length: int,
    train_on: str,
    chat_template: str | None,
    as_json: bool,
) -> None:
    """Show what FILE holds: its format and rows, and with --base its tokens and what is trained on."""
    if base is None:
        summary, notices = _rows(file, data_format, task, columns)
    else:
        from soup_xb.data.dataset import tokenize_as
        from soup_xb.data.hub import resolve_base
        from soup_xb.data.media import open_tokenizer_for
        from soup_xb.data.token_file import Reading

        tokenizer = open_tokenizer_for(TASKS[task].media if task else "", resolve_base(base), chat_template)
        reading = Reading(data_format, _formats(task), columns=columns)
        tokens = tokenize_as(file, reading, evolve(tokenizer, train_on=train_on), max_length)
        summary = {"file": str(file), **_counts(tokens), "example": _example(tokens, tokenizer)}
        notices = (*tokens.warnings, *tokens.notices)
    if as_json:
        summary["notices"] = [{"code": notice.code, "message": notice.message} for notice in notices]
        click.echo(json.dumps(summary, ensure_ascii=False, indent=2))
        return
    _print(summary)
    for notice in notices:
        # The format and its reason are on the first lines already.
        if notice.code != "data-format":
            click.echo(notice.render("note"))
    if "example" in summary:
        click.echo(f"\nfirst example, {summary['example']['source']}, trained tokens {_legend()}:")
        for side in (summary["example"], *summary["example"]["others"]):
            click.echo("\n" + (f"{side['name']}: " if side["name"] else "") + _marked(side["pieces"]))


def _formats(task: str | None) -> Formats:
    from soup_xb.core.rows.formats.every import EVERY_FORMAT, formats_named

    return formats_named(TASKS[task].formats, TASKS[task].media) if task else EVERY_FORMAT


def _rows(
    file: Path, data_format: str, task: str | None, columns: dict[str, str]
) -> tuple[dict[str, Any], tuple[Problem, ...]]:
    from soup_xb.core.rows.files import read_rows
    from soup_xb.core.rows.formats.detect import ExampleReader

    reader = ExampleReader(read_rows(file), data_format, str(file), _formats(task), columns)
    for _ in reader:
        pass
    detection = reader.detection
    summary = {
        "file": str(file),
        "format": detection.name,
        "reason": detection.reason,
        "rows": reader.count,
    }
    return summary, tuple(reader.notices())


def _counts(tokens: TokenFile) -> dict[str, Any]:
    lengths = sorted(tokens.rows.facts.lengths.tolist())
    return {
        "format": tokens.format,
        "reason": tokens.reason,
        "rows": tokens.count,
        "trained_rows": len(tokens.rows),
        "nothing_to_learn": tokens.unlearnable,
        "truncated": tokens.truncated,
        "tokens": int(tokens.rows.facts.tokens.sum()),
        "target_tokens": int(tokens.rows.facts.targets.sum()),
        "lengths": {
            "shortest": lengths[0],
            "median": lengths[len(lengths) // 2],
            "longest": lengths[-1],
            "histogram": _histogram(lengths),
        },
    }


def _histogram(lengths: list[int]) -> list[dict[str, int]]:
    """Rows by length, in classes of one width: `from` and `to` are both inside."""
    width = (lengths[-1] - lengths[0]) // _BARS + 1
    classes: dict[int, int] = {}
    for length in lengths:
        start = lengths[0] + (length - lengths[0]) // width * width
        classes[start] = classes.get(start, 0) + 1
    starts = range(lengths[0], lengths[-1] + 1, width)
    return [{"from": start, "to": start + width - 1, "rows": classes.get(start, 0)} for start in starts]


def _example(tokens: TokenFile, tokenizer: Any) -> dict[str, Any]:
    """The first row as text: each of its sides (`others` are those after the first) in pieces, trained or not."""
    row = tokens.rows[0]
    first, *others = (
        {"name": name, "pieces": _pieces(side, tokenizer)}
        for name, side in zip(row.sides, row.sequences, strict=True)
    )
    return {"source": str(row.source), **first, "others": others}


def _pieces(row: TokenSequence, tokenizer: Any) -> list[dict[str, Any]]:
    from itertools import groupby

    pairs = zip(row.tokens.tolist(), row.trained.tolist(), strict=True)
    return [
        {"text": tokenizer.decode([token for token, _ in run], special=True), "trained": trained}
        for trained, run in groupby(pairs, key=lambda pair: pair[1])
    ]


def _print(summary: dict[str, Any]) -> None:
    click.echo(f"format            {summary['format']} ({summary['reason']})")
    click.echo(f"rows              {summary['rows']:,}")
    if "tokens" not in summary:
        return
    tokens, targets = summary["tokens"], summary["target_tokens"]
    click.echo(f"trained rows      {summary['trained_rows']:,}")
    click.echo(f"nothing to learn  {summary['nothing_to_learn']:,}")
    click.echo(f"truncated         {summary['truncated']:,}")
    click.echo(f"tokens            {tokens:,}, of which trained {targets:,} ({targets / tokens:.0%})")
    lengths = summary["lengths"]
    click.echo(
        f"row length        {lengths['shortest']:,} to {lengths['longest']:,} tokens, "
        f"median {lengths['median']:,}\n"
    )
    most = max(bar["rows"] for bar in lengths["histogram"])
    wide = len(f"{lengths['histogram'][-1]['to']:,}")
    for bar in lengths["histogram"]:
        # A class that holds anything shows at least a sliver.
        drawn = "█" * round(bar["rows"] / most * _BAR_WIDTH) or ("▏" if bar["rows"] else "")
        click.echo(f"  {bar['from']:{wide},} – {bar['to']:{wide},}  {drawn} {bar['rows']:,}")
    click.echo()


def _in_colour() -> bool:
    import os

    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _legend() -> str:
    return f"in {click.style('green', fg='green')}" if _in_colour() else "between ‹ and ›"


def _marked(pieces: list[dict[str, Any]]) -> str:
    left, shown = _SHOWN_CHARACTERS, []
    for piece in pieces:
        text = _printable(piece["text"][:left])
        left -= len(piece["text"])
        if piece["trained"]:
            text = click.style(text, fg="green") if _in_colour() else f"‹{text}›"
        shown.append(text)
        if left <= 0:
            return (
                "".join(shown)
                + f"\n… and {sum(len(piece['text']) for piece in pieces) - _SHOWN_CHARACTERS:,} more characters"
            )
    return "".join(shown)


def _printable(text: str) -> str:
    """The text without what would steer the terminal."""
    return "".join(
        mark if mark.isprintable() or mark in "\n\t" else mark.encode("unicode_escape").decode()
        for mark in text
    )
