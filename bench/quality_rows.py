"""Rows for `quality.py`: docstrings of the standard library, short, and held out by source file."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from rows import Row, file_rows, source_files

SPLIT_SEED = 7
# Short rows, so that one step is cheap, with something to learn in each: tokens of a whole row, at most, and of its
# answer, at least.
LONGEST_ROW, SHORTEST_ANSWER = 64, 16
# `data.max_length`, far above: no row is cut.
LONGEST = 2 * LONGEST_ROW
HELD_OUT_OF_A_FILE = 2


def write_rows(base: Path, results: Path, eval_rows: int) -> None:
    """Training and held-out rows from different source files, without a docstring in two rows.

    Ends the benchmark where the folder holds another number of held-out rows, which no loss may be compared with.
    """
    held_out_file = results / "eval.jsonl"
    if held_out_file.is_file():
        found = len(held_out_file.read_text("utf-8").splitlines())
        if found != eval_rows:
            sys.exit(f"{results} has runs with {found} held-out rows, not {eval_rows}; name another folder")
        return
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    files = source_files()
    random.Random(SPLIT_SEED).shuffle(files)
    seen: set[str] = set()
    parts: dict[str, list[Row]] = {"train": [], "eval": []}
    for path in files:
        # A whole file goes to one side, since methods of one class say nearly the same, and only a few of its rows are
        # held out, so that these come from many files.
        held_out = len(parts["eval"]) < eval_rows
        side: list[Row] = []
        for row in file_rows(path):
            prompt = f"{row['instruction'].split('`')[1]}\n{row['input']}\n"
            whole, answer = (
                len(tokenizer.encode(text).ids) for text in (prompt + row["output"], row["output"])
            )
            if whole < LONGEST_ROW and answer >= SHORTEST_ANSWER and row["output"] not in seen:
                seen.add(row["output"])
                side.append({"prompt": prompt, "completion": row["output"]})
        if held_out:
            parts["eval"] += random.Random(path.name).sample(side, min(len(side), HELD_OUT_OF_A_FILE))
        else:
            parts["train"] += side
    parts["eval"] = parts["eval"][:eval_rows]
    for name, side in parts.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in side)
        (results / f"{name}.jsonl").write_text(text, "utf-8")
