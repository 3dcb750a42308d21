"""Instruction rows from the docstrings of the Python standard library: real text, no download.

    python bench/rows.py rows.jsonl --count 1300

The sources are parsed, never imported, so nothing runs. The same Python version gives the same rows.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SKIPPED_FOLDERS = {"__pycache__", "site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"}
SHORTEST, LONGEST = 40, 1200
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
Row = dict[str, str]


def docstring_rows(count: int) -> list[Row]:
    """`count` rows in alpaca form, spread evenly over all modules in alphabetical order.

    Raises ValueError where this Python has fewer docstrings.
    """
    rows = [row for path in source_files() for row in file_rows(path)]
    if len(rows) < count:
        raise ValueError(f"this Python's library has {len(rows)} docstrings, {count} are asked for")
    return [rows[index * len(rows) // count] for index in range(count)]


def pair_rows(base: Path, count: int, longest: int) -> list[Row]:
    """Prompts, each with its own docstring (chosen) and another row's (rejected); `longest` tokens of text at most."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    rows = [row for path in source_files() for row in file_rows(path)]
    short = [row for row in rows if len(tokenizer.encode("\n".join(row.values())).ids) <= longest]
    if len(short) < count:
        raise ValueError(f"this Python's library has {len(short)} rows so short, {count} are asked for")
    chosen = [short[index * len(short) // count] for index in range(count)]
    # Those of half the list away: neighbours are of one module, and often alike.
    rejected = [*chosen[count // 2 :], *chosen[: count // 2]]
    return [
        {
            "prompt": f"{row['instruction']}\n{row['input']}\n",
            "chosen": row["output"],
            "rejected": other["output"],
        }
        for row, other in zip(chosen, rejected, strict=True)
    ]


def source_files() -> list[Path]:
    """The public modules of the standard library, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(path for path in root.rglob("*.py") if _public(path.relative_to(root)))


def file_rows(path: Path) -> Iterator[Row]:
    """One row for each documented function, class and method of a file."""
    root = Path(sysconfig.get_paths()["stdlib"])
    module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    for name, definition in _definitions(ast.parse(path.read_bytes()), module):
        docstring = ast.get_docstring(definition) or ""
        if SHORTEST <= len(docstring) <= LONGEST:
            kind = "class" if isinstance(definition, ast.ClassDef) else "function"
            yield {
                "instruction": f"Explain the Python {kind} `{name}`.",
                "input": _signature(definition),
                "output": inspect.cleandoc(docstring),
            }


def _public(path: Path) -> bool:
    inside = not SKIPPED_FOLDERS.intersection(path.parts) and not path.parts[0].startswith(("_", "config-"))
    return inside and path.parts[0].removesuffix(".py") in sys.stdlib_module_names


def _definitions(tree: ast.AST, prefix: str) -> Iterator[tuple[str, Definition]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Definition):
            name = f"{prefix}.{node.name}"
            yield name, node
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node, name)


def _signature(definition: Definition) -> str:
    if isinstance(definition, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in definition.bases)
        return f"class {definition.name}({bases})" if bases else f"class {definition.name}"
    return f"def {definition.name}({ast.unparse(definition.args)})"


def main() -> None:
    """Write the rows to a JSONL file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--count", type=int, default=1300)
    options = parser.parse_args()
    rows = docstring_rows(options.count)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    options.output.write_text(text, encoding="utf-8")
    print(f"{len(rows)} rows in {options.output}")


if __name__ == "__main__":
    main()
