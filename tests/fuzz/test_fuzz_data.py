"""No data file does anything but become rows or be refused in our own words, and soon."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutation import SAMPLE, full, spoiled

from soup_xb.core.errors import SoupError
from soup_xb.core.tasks import TASKS
from soup_xb.data.dataset import tokenize_file
from soup_xb.data.tokenizer import ChatTokenizer, open_tokenizer

USER, ASSISTANT = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello. 😀"}
ROWS: list[dict[str, Any]] = [
    {"text": "Once upon a time"},
    {"messages": [USER, ASSISTANT]},
    {"messages": [{"role": "system", "content": "Be short."}, USER, ASSISTANT, USER, ASSISTANT]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
    {"prompt": "The cap", "completion": "ital"},
    {"prompt": [USER], "completion": [ASSISTANT]},
    {"prompt": [USER], "answer": "4"},
    {"instruction": "Add.", "input": "1 and 2", "output": "3", "history": [["a", "b"]], "system": "Count."},
]
LINES = ["\n".join(json.dumps(row) for row in rows) for rows in ([row] * 3 for row in ROWS)]
TABLES = ["text\na\nb\n", 'prompt,completion\n"a,b",c\nd,"e\nf"\n', "instruction,output\nAdd,3\n"]
SEEDS = [*LINES, *(json.dumps([row, row]) for row in ROWS)]
PIECES = [
    *"{}[]:,\"'\\\n\r\t\0 ",
    *(
        "null",
        "true",
        "5",
        "1e999",
        "NaN",
        "-Infinity",
        "9" * 5000,
        "\ufeff",
        "\ud800",
        "\\ud800",
        "\\u0000",
        "\x1b",
    ),
    *(
        '"role"',
        '"content"',
        '"text"',
        '"weight": 0',
        '"tool_calls": [1]',
        '"tools": [{"name": "x"}]',
        '"tool_calls": [{"name": "x", "arguments": {}}]',
        '"name": "x"',
        '"from"',
        '"messages"',
    ),
    *(
        "assistant",
        "wizard",
        "<|im_end|>",
        "<|im_start|>",
        "é",
        "😀",
        "\u2028",
        "[" * 2000,
        '{"a":' * 500,
        "a," * 300,
    ),
    *("\uf8f5", "x" * 5000, '"chosen": "a", "rejected": "b"', "\n\n\n"),
]
# Any JSON at all where a text, a turn or a list of turns belongs.
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([USER, ASSISTANT]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
COLUMNS = st.sampled_from(
    sorted({name for row in ROWS for name in row} | {"role", "content", "chosen", "label", ""})
)
ANY_ROW = st.dictionaries(COLUMNS, VALUES, max_size=5)
# Mostly a file is what its name says, and its format is found by itself.
NAMES = st.sampled_from(
    ["rows.jsonl"] * 6 + ["rows.json"] * 2 + ["rows.csv"] * 2 + ["rows.tsv", "rows.parquet"]
)
FORMAT = st.sampled_from(["auto"] * 8 + [*TASKS["sft"].formats])


@st.composite
def files(draw: st.DrawFn) -> tuple[str, bytes]:
    """A file's name and its content."""
    name = draw(NAMES)
    if name.endswith("sv"):
        text = draw(spoiled(TABLES, PIECES))
    elif draw(st.booleans()):
        rows = draw(st.lists(ANY_ROW | st.sampled_from(ROWS), min_size=1, max_size=4))
        text = "\n".join(json.dumps(row) for row in rows)
    else:
        text = draw(spoiled(SEEDS, PIECES))
    content = text.encode("utf-8", "surrogatepass")
    if name.endswith(".parquet"):
        content = _parquet(text, draw(st.integers(0, 400)), draw(st.binary(max_size=4)))
    elif draw(st.integers(0, 9)) == 0:
        place = draw(st.integers(0, len(content)))
        content = content[:place] + draw(st.binary(min_size=1, max_size=4)) + content[place:]
    return name, content


def _parquet(text: str, place: int, damage: bytes) -> bytes:
    """The text as a Parquet file with one column, some bytes of it overwritten."""
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    rows = text.encode("utf-8", "replace").decode("utf-8").split("\n")
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), file)
    content = file.getvalue()
    return content[:place] + damage + content[place + len(damage) :]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> ChatTokenizer:
    return open_tokenizer(tiny_llama)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("fuzz")


def read(place: Path, given_file: tuple[str, bytes], format: str, tokenizer: ChatTokenizer) -> None:
    """What `soupx data` does with a file, and what must hold for every row that comes out."""
    name, content = given_file
    (place / name).write_bytes(content)
    tokens = tokenize_file(place / name, format, tokenizer, 64)
    assert tokens.rows
    for notice in tokens.notices:
        assert notice.render()
    for row in tokens.rows:
        for sequence in row.sequences:
            assert 0 < sequence.length <= 64
            # A prompt has nothing to learn: the model's own answers to it will.
            assert (sequence.target_tokens > 0) != (row.kind == "prompt")
            assert not sequence.trained[0]


@SAMPLE
@given(given_file=files(), format=FORMAT)
def test_a_spoiled_file_becomes_rows_or_is_refused(
    given_file: tuple[str, bytes],
    format: str,
    met: Callable[[str], Any],
    place: Path,
    tokenizer: ChatTokenizer,
) -> None:
    with met("data files")(given_file):
        read(place, given_file, format, tokenizer)


@pytest.mark.torture
@full(5_000)
@given(given_file=files(), format=FORMAT)
def test_five_thousand_spoiled_files(
    given_file: tuple[str, bytes],
    format: str,
    met: Callable[[str], Any],
    place: Path,
    tokenizer: ChatTokenizer,
) -> None:
    with met("data files, all of them")(given_file):
        read(place, given_file, format, tokenizer)


def test_the_search_sees_every_kind_of_answer(place: Path, tokenizer: ChatTokenizer) -> None:
    """The seeds by themselves are good files: what is refused above was refused for its damage."""
    for number, rows in enumerate(LINES):
        read(place, (f"{number}.jsonl", rows.encode()), "auto", tokenizer)
    with pytest.raises(SoupError):
        read(place, ("a.jsonl", b"{"), "auto", tokenizer)
