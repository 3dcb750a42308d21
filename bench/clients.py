"""Whether adapters and merged models that soup-xb saves mean the same in other programs, by numbers.

    make clients
    python bench/clients.py --only rsLoRA "rank_pattern*" vllm-0.31
    python bench/clients.py --adapters FOLDER --models FOLDER --exports FOLDER

Adapters are trained, exported and merged by `soupx` (`client_cases.py`). Each program opens them in an environment of
its own and computes the logits of one text, or vLLM the log-probabilities of its tokens. A table shows the largest
difference to transformers 5 with PEFT on the same base, all in float32 on the CPU; where a program refuses, its words.
Further tables show whether greedy answers stop where a base's end-of-text is not the chat template's end of a turn, and
whether the saved tokenizer opens. The command fails where a program computes something else in silence.

Environments and results lie in `.clients/`, or in the folder that CLIENTS_DIR names; an answer is asked once for the
same files.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from client_cases import CASES, PROJECT, Case, Made, make
from client_cells import (
    CLIENTS,
    REFERENCE,
    Cell,
    Client,
    Desk,
    Prompt,
    Question,
    UnopenedError,
    ask,
    cached,
    show,
)
from client_job import Task
from client_table import answers_table, differs, numbers_table, tokenizer_table, versions_text
from tokenizers import Tokenizer

from soup_xb.demo.base import prepare_base

TEXT = """\
Bread is made of flour, water, salt and yeast. The baker weighs 500 grams of flour and warms 320 grams of water to
about 30 degrees. She stirs the yeast into the water, waits until it foams, and pours it over the flour. Then she
kneads the dough for ten minutes, until it is smooth and no longer sticks to the table. "Patience," she says, "is half
of the work." The dough rests under a cloth for an hour and doubles its size. Two folds, a round shape, another rest:
meanwhile the oven reaches 230 degrees. Steam keeps the crust soft while the loaf grows, so she throws a cup of water
on the hot floor and shuts the door at once. After 35 minutes the bread is brown, and it sounds hollow when she knocks
on its underside. It has to cool on a rack before anybody may cut it: def loaf(flour): return flour * 1.68
"""
QUESTION = "What is the capital of France?"


@dataclass(frozen=True)
class Row:
    """A line of the tables: what a case made, or given folders. `asks` is what is asked of the clients."""

    name: str
    made: Made
    asks: Sequence[str] = ("numbers",)

    @property
    def is_model(self) -> bool:
        """Whether the clients open a whole model."""
        return self.made.model is not None or "model" in self.made.refused


def main() -> None:
    """Make what is missing, ask what was not asked, and print the tables."""
    options = parse()
    base = prepare_base()
    prompt = Prompt(TEXT, Tokenizer.from_file(str(base / "tokenizer.json")).encode(TEXT).ids, QUESTION)
    desk = Desk(options.clients.resolve(), prompt)
    clients = [client for client in CLIENTS if chosen(client.name, options.only, client_names())]
    rows = list(given_rows(options, base)) or list(default_rows(desk.clients, options))
    cells = fill(desk, clients, rows)
    print_tables(desk, clients, rows, cells)
    wrong = [cell for cell in cells if differs(cell)]
    for cell in wrong:
        show(f"differs in silence: {cell.row} in {cell.client}, by {cell.difference:.3g}")
    sys.exit(1 if wrong else 0)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[], help="clients and rows, by name or pattern")
    parser.add_argument("--adapters", type=Path, help="a folder of PEFT adapters instead of the default ones")
    parser.add_argument(
        "--models", type=Path, help="a folder of merged models; their adapters have the same name"
    )
    parser.add_argument(
        "--exports", type=Path, help="a folder of mlx-lm exports; their adapters have the same name"
    )
    parser.add_argument(
        "--keep", action="store_true", help="take what was made, though the source has changed"
    )
    default = Path(os.environ.get("CLIENTS_DIR") or PROJECT / ".clients")
    parser.add_argument("--clients", type=Path, default=default, help="environments and results; %(default)s")
    return parser.parse_args()


def default_rows(clients: Path, options: argparse.Namespace) -> Iterable[Row]:
    """What soupx makes of the cases."""
    for case in CASES:
        if not chosen(case.name, options.only, [case.name for case in CASES]):
            continue
        show(f"soupx: {case.name}")
        made = make(case, clients, keep=options.keep)
        yield Row(case.name, made, asked_of(case))


def asked_of(case: Case) -> Sequence[str]:
    """Tokenizers are asked for once of each kind of folder, and answers of chats alone."""
    asks = ("answer",) if case.chats else ("numbers",)
    return (*asks, "tokenizer") if case.name in ("plain", "merged", "merged by mlx") else asks


def given_rows(options: argparse.Namespace, base: Path) -> Iterable[Row]:
    """The folders that the command line names: of `--adapters`, then the models without an adapter."""
    adapters, models, exports = (
        {file.name: file for file in sorted(place.resolve().iterdir()) if file.is_dir()} if place else {}
        for place in (options.adapters, options.models, options.exports)
    )
    for name in {**adapters, **models}:
        if not chosen(name, options.only, [*adapters, *models]):
            continue
        adapter = adapters.get(name)
        if adapter is not None and (adapter / "adapter" / "adapter_config.json").is_file():
            adapter = adapter / "adapter"
        made = Made(base_of(adapter, base), adapter, models.get(name), exports.get(name))
        yield Row(name, made, ("numbers", "tokenizer"))


def base_of(adapter: Path | None, base: Path) -> Path:
    """The folder that an adapter names as its base, where there is such a folder."""
    if adapter is None:
        return base
    named = Path(read_settings(adapter).get("base_model_name_or_path") or "")
    return named if (named / "config.json").is_file() else base


def fill(desk: Desk, clients: Sequence[Client], rows: Sequence[Row]) -> list[Cell]:
    """Every cell of the tables, from earlier runs or asked now."""
    cells: list[Cell] = []
    wanted = [(row, asks) for row in rows for asks in row.asks]
    for client in clients:
        missing = []
        for row, asks in wanted:
            if not asked(client, row, asks):
                continue
            if refused := soupx_refusal(client, row):
                cells.append(Cell(row.name, client.name, asks, "", refused=refused))
                continue
            question = Question(row.name, client, task_of(client, row, asks), reference_task(row))
            cell = cached(desk, question)
            if cell is None:
                missing.append(question)
            else:
                cells.append(cell)
        cells += ask(desk, client, missing)
    return cells


def asked(client: Client, row: Row, asks: str) -> bool:
    """The reference has no difference to itself; the base's tokenizer serves an adapter in most programs."""
    if asks == "numbers":
        return client is not REFERENCE or row.is_model
    if asks == "tokenizer" and not row.is_model:
        return client.script == REFERENCE.script
    # An adapter brings no chat to llama.cpp: it is the base's file that tells the end.
    return asks != "answer" or row.is_model or client.name != "llama.cpp"


def soupx_refusal(client: Client, row: Row) -> str:
    """Why soupx made nothing that this client could open."""
    needed = ["adapter"] if not client.mlx_lm or row.is_model else ["adapter", "mlx_lm"]
    said = [row.made.refused[what] for what in (*needed, "model") if what in row.made.refused]
    return f"soupx: {said[0]}" if said else ""


def task_of(client: Client, row: Row, asks: str) -> Task:
    """What a client opens for a row."""
    made = row.made
    if made.model is not None:
        return Task(asks, str(made.base), "", model=str(made.model))
    adapter = made.mlx_lm if client.mlx_lm else made.adapter
    return Task(asks, str(made.base), "", adapter=str(adapter))


def reference_task(row: Row) -> Task:
    """The adapter on its base in transformers 5 and PEFT; for a given model without an adapter the model itself."""
    made = row.made
    if made.adapter is None:
        return Task("numbers", str(made.base), "", model=str(made.model))
    return Task("numbers", str(made.base), "", adapter=str(made.adapter), rope=noted_rope(made))


def noted_rope(made: Made) -> dict[str, Any] | None:
    """How the adapter's settings say that the base's positions were stretched, in transformers' words."""
    noted = read_settings(made.adapter).get("soup_xb_rope_parameters") if made.adapter else None
    if noted is None or noted["rope_type"] != "yarn":
        return noted
    longest = json.loads((made.base / "config.json").read_text("utf-8"))["max_position_embeddings"]
    return {"original_max_position_embeddings": longest, **noted}


def print_tables(desk: Desk, clients: Sequence[Client], rows: Sequence[Row], cells: Sequence[Cell]) -> None:
    """To the standard output, as Markdown."""
    found = {asks: cells_of(cells, asks) for asks in ("numbers", "answer", "tokenizer")}
    # With --only a table may have no cell at all.
    names = {
        asks: [row.name for row in rows if any(row.name == name for name, _ in found[asks])] for asks in found
    }
    models = {row.name for row in rows if row.is_model}
    adapters = [name for name in names["numbers"] if name not in models]
    others = [client for client in clients if client is not REFERENCE]
    print(
        f"Largest difference to {REFERENCE.title} over {len(desk.prompt.tokens)} tokens: logits, "
        "in vLLM log-probabilities.\n"
    )
    if adapters:
        moved = {row.name: moves(desk, row) for row in rows if row.name in adapters}
        print(numbers_table("adapter", adapters, others, found["numbers"], moved), end="\n\n")
    if merged := [name for name in names["numbers"] if name in models]:
        print(numbers_table("model", merged, clients, found["numbers"]), end="\n\n")
    if names["answer"]:
        print(f"Greedy answers to “{desk.prompt.question}”.\n")
        print(answers_table(names["answer"], clients, found["answer"]), end="\n\n")
    if names["tokenizer"]:
        print("Saved tokenizers, on the same text.\n")
        print(
            tokenizer_table(names["tokenizer"], clients, found["tokenizer"], desk.prompt.tokens), end="\n\n"
        )
    print(versions_text(cells, clients))


def moves(desk: Desk, row: Row) -> str:
    """How far the adapter moves a logit of the base at most: what a program would be off by that ignored it."""
    if "adapter" in row.made.refused or row.made.adapter is None:
        return "-"
    try:
        tuned = desk.numbers_of(reference_task(row))
        base = desk.numbers_of(Task("numbers", str(row.made.base), ""))
    except UnopenedError as error:
        return f"refused: {error}"
    return f"{np.abs(np.asarray(tuned) - np.asarray(base)).max():.1f}"


def cells_of(cells: Iterable[Cell], asks: str) -> dict[tuple[str, str], Cell]:
    """By row and client."""
    return {(cell.row, cell.client): cell for cell in cells if cell.asks == asks}


def chosen(name: str, only: Sequence[str], names: Sequence[str]) -> bool:
    """Whether `--only` takes this one of `names`: it takes all where it names none of them."""
    own = [pattern for pattern in only if any(fnmatch.fnmatchcase(known, pattern) for known in names)]
    return not own or any(fnmatch.fnmatchcase(name, pattern) for pattern in own)


def client_names() -> list[str]:
    """As `--only` takes them."""
    return [client.name for client in CLIENTS]


def read_settings(adapter: Path) -> dict[str, Any]:
    """An adapter's settings file."""
    settings: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    return settings


if __name__ == "__main__":
    main()
