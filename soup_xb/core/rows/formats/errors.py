"""What is wrong with rows whose columns are not those of their format, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from soup_xb.core.errors import DataError
from soup_xb.core.rows.examples import Source

if TYPE_CHECKING:
    from soup_xb.core.rows.formats.detect import Formats


def unknown_columns(row: Mapping[str, Any], source: Source, formats: Formats) -> DataError:
    """The error of a first row that no format fits."""
    for told in (_pairs_for_another_task, _verdicts_for_another_task):
        if problem := told(row, source, formats):
            return problem
    return DataError(
        "unknown-columns",
        f"no known format has the columns {_listed(row)}",
        where=str(source),
        help=f"rename them: {known_formats(formats)}.",
    )


def _pairs_for_another_task(row: Mapping[str, Any], source: Source, formats: Formats) -> DataError | None:
    if not {"chosen", "rejected"} <= row.keys() or "preference" in formats:
        return None
    return DataError(
        "preference-rows",
        "preference rows (`chosen`, `rejected`) are for `task: dpo` and the other preference tasks",
        where=str(source),
        help="set `task`, or keep the chosen answer as a `completion` or an assistant turn.",
    )


def _verdicts_for_another_task(row: Mapping[str, Any], source: Source, formats: Formats) -> DataError | None:
    if not {"prompt", "completion", "label"} <= row.keys() or formats.keys() != {"preference"}:
        return None
    return DataError(
        "unpaired-rows",
        "is an answer with a verdict (`label`), and this task compares two answers (`chosen`, `rejected`)",
        where=str(source),
        help="use `task: kto` or `task: bco`, which learn from such rows.",
    )


def other_format(
    row: Mapping[str, Any], source: Source, format: str, missing: list[str], formats: Formats
) -> DataError:
    """The error of a row that lacks a column of its file's format."""
    if problem := _verdicts_for_another_task(row, source, formats):
        return problem
    fitting = [name for name, other in formats.items() if other.fits(row)]
    if fitting:
        return DataError(
            "mixed-formats",
            f"is a row of the format {fitting[0]} among rows of the format {format}",
            where=str(source),
            help="keep one format a file; `data.train` takes a list of files.",
        )
    return DataError(
        "missing-field",
        f"is missing; found {_listed(row)}",
        where=f"{source}: {missing[0]}",
        help=f"a row of the format {format} has {', '.join(f'`{name}`' for name in formats[format].required)}.",
    )


def _listed(row: Mapping[str, Any]) -> str:
    names = [f"`{str(name)[:40]}`" for name in row]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "(none)"


def known_formats(formats: Formats) -> str:
    """Each format with the columns that it needs."""
    return "; ".join(f"{name} ({', '.join(format_.required)})" for name, format_ in formats.items())
