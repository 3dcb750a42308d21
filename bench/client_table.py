"""The clients' cells as Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from client_cells import Cell, Client

# Float32 in different orders of summing makes up to a tenth of it.
BOUND = 2e-3
LONGEST_REFUSAL = 80

Cells = Mapping[tuple[str, str], Cell]


def numbers_table(
    first: str,
    rows: Sequence[str],
    clients: Sequence[Client],
    cells: Cells,
    moved: Mapping[str, str] | None = None,
) -> str:
    """A row each, a client a column; what is further than `BOUND` from the reference is bold.

    `moved` is a column of its own: how far each adapter moves the base's logits.
    """
    head = [first, *(["moves logits by"] if moved else []), *titles(clients)]
    lead = {row: [row, *([moved[row]] if moved else [])] for row in rows}
    return markdown(head, [[*lead[row], *shown(row, clients, cells, number_text)] for row in rows])


def answers_table(rows: Sequence[str], clients: Sequence[Client], cells: Cells) -> str:
    """Where each greedy answer stopped."""
    return markdown(
        ["model", *titles(clients)], [[row, *shown(row, clients, cells, answer_text)] for row in rows]
    )


def tokenizer_table(
    rows: Sequence[str], clients: Sequence[Client], cells: Cells, tokens: Sequence[int]
) -> str:
    """Whether the saved tokenizer opens, and cuts the text as the base's does."""

    def text(cell: Cell) -> str:
        same = cell.told is not None and list(cell.told["ids"]) == list(tokens)
        return "same ids" if same else "**other ids**"

    return markdown(["folder", *titles(clients)], [[row, *shown(row, clients, cells, text)] for row in rows])


def versions_text(cells: Iterable[Cell], clients: Sequence[Client]) -> str:
    """A line for each client: its packages, and the day of its oldest cell here."""
    found = list(cells)
    lines = []
    for client in clients:
        own = [cell for cell in found if cell.client == client.name and cell.versions]
        if own:
            packages = ", ".join(f"{name} {version}" for name, version in own[-1].versions.items())
            lines.append(f"- {client.title}: {packages} ({min(cell.date for cell in own)})")
    return "\n".join(lines)


def differs(cell: Cell) -> bool:
    """Whether a client computes something else, in silence."""
    return cell.difference is not None and not cell.difference <= BOUND


def number_text(cell: Cell) -> str:
    """The difference with two digits, bold above the bound."""
    if cell.difference is None:
        return "-"
    # Small ones as powers of ten, so that a row is read at a glance.
    text = f"{cell.difference:.2g}" if cell.difference < 0.01 else f"{cell.difference:.2f}"
    return f"**{text}**" if differs(cell) else text


def answer_text(cell: Cell) -> str:
    """After how many tokens it stopped."""
    told = cell.told or {}
    return f"stops after {told['tokens']}" if told["stopped"] else f"**goes on** ({told['tokens']} tokens)"


def shown(row: str, clients: Sequence[Client], cells: Cells, text: Callable[[Cell], str]) -> list[str]:
    """The row's cells by `text`, refusals in their own words, a dash where nobody asked."""
    written = []
    for client in clients:
        cell = cells.get((row, client.name))
        if cell is None:
            written.append("-")
        elif cell.refused is not None:
            written.append(f"refused: {short(cell.refused)}")
        else:
            written.append(text(cell))
    return written


def short(text: str) -> str:
    """One line that breaks no table.

    >>> short("ValueError: a | b\\nmore")
    'ValueError: a \\\\| b more'
    """
    line = re.sub(r"\s+", " ", text).replace("|", "\\|")
    return line if len(line) <= LONGEST_REFUSAL else f"{line[: LONGEST_REFUSAL - 1]}…"


def titles(clients: Sequence[Client]) -> list[str]:
    """The head of the columns."""
    return [client.title for client in clients]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
