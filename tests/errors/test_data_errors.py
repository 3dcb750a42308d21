"""The error table, part two: what can be wrong with data files and their rows."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

USER = {"role": "user", "content": "Hello"}
ASSISTANT = {"role": "assistant", "content": "Hello."}
CHAT = {"messages": [USER, ASSISTANT]}
PAIR = {"prompt": "Hello", "chosen": "Hello.", "rejected": "What?"}
TEXT = '{"text": "Once upon a time"}\n'


def file(name: str, content: object) -> dict[str, Any]:
    """Writes a data file and looks at it: bytes, text, or a list of rows."""

    def write(place: Path) -> None:
        if isinstance(content, list):
            written = "".join(json.dumps(row) + "\n" for row in content).encode()
        else:
            written = content if isinstance(content, bytes) else str(content).encode()
        (place / name).write_bytes(written)

    return {"arrange": write, "argv": f"data {name}"}


def turn(**values: object) -> dict[str, Any]:
    """A conversation whose second turn has these keys."""
    return file("a.jsonl", [CHAT, {"messages": [USER, values]}])


def parquet(name: str, **columns: Any) -> dict[str, Any]:
    """Writes columns as Parquet and looks at the file."""

    def write(place: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(columns), place / name)

    return {"arrange": write, "argv": f"data {name}"}


def cut_parquet(place: Path) -> None:
    parquet("a.parquet", text=["a", "b"])["arrange"](place)
    content = (place / "a.parquet").read_bytes()
    (place / "a.parquet").write_bytes(content[:-12])


def year_36813(place: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    when = pyarrow.array([2**60], pyarrow.timestamp("us"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "when": when}), place / "a.parquet")


_SAYS_NEW = {"messages": [USER, {"role": "assistant", "content": "a <|new|>"}]}


def _rows(place: Path, rows: list[Any]) -> None:
    (place / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _grown(place: Path) -> None:
    """Gives the tokenizer more tokens than the base has embeddings for."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    more = [f"<|{number}|>" for number in range(320 - len(tokenizer))]
    tokenizer.add_special_tokens({"additional_special_tokens": [*more, "<|new|>"]})
    tokenizer.save_pretrained(place / "base")


def folder(place: Path) -> None:
    (place / "rows.jsonl").mkdir()


def loop(place: Path) -> None:
    (place / "loop.jsonl").symlink_to("loop.jsonl")


FILES = {
    "missing": {
        "argv": "data trains.jsonl",
        "code": "data-missing",
        "where": "trains.jsonl: ",
        "words": "no such file",
        "help": "did you mean `train.jsonl`?",
    },
    "missing, to train on": {"argv": "train --set data.train=nowhere.jsonl", "code": "data-missing"},
    "missing, of two": {"argv": "train --set 'data.train=[train.jsonl, two.jsonl]'", "code": "data-missing"},
    "missing, to evaluate on": {
        "argv": "train --set data.eval=no.jsonl",
        "code": "data-missing",
        "where": "no.jsonl: ",
    },
    "in a home that is not there": {
        "argv": "train --set data.train=~nobody-here/a.jsonl",
        "code": "data-missing",
    },
    "missing, told before a base is looked for": {
        "argv": "train --set base=no/such/base --set data.train=none.jsonl",
        "code": "data-missing",
    },
    "a folder": {
        "arrange": folder,
        "argv": "data rows.jsonl",
        "code": "data-is-folder",
        "help": "name a file",
    },
    "a pipe that nobody writes to": {
        "arrange": lambda place: os.mkfifo(place / "pipe.jsonl"),
        "argv": "data pipe.jsonl",
        "code": "data-not-a-file",
        "help": "write them to a file",
    },
    "a link to itself": {
        "arrange": loop,
        "argv": "data loop.jsonl",
        "code": "data-unreadable",
        "words": "symbolic links",
    },
    "a name that no disk takes": {
        "argv": f"data {'x' * 300}.jsonl",
        "code": "data-unreadable",
        "words": "too long",
    },
    "another kind": {**file("a.txt", TEXT), "code": "unknown-file-type", "help": ".parquet"},
    "compressed": {**file("a.jsonl.gz", b"\x1f\x8b\x08"), "code": "unknown-file-type", "help": "unpack"},
    "no ending": {**file("rows", TEXT), "code": "unknown-file-type"},
    "empty": {**file("a.jsonl", ""), "code": "data-empty", "where": "a.jsonl: "},
    "blank lines alone": {**file("a.jsonl", "\n \n\n"), "code": "data-empty"},
    "an empty array": {**file("a.json", "[]"), "code": "data-empty"},
    "a table's head alone": {**file("a.csv", "text\n"), "code": "data-empty"},
    "no network for a dataset of the hub": {
        "argv": "train --set data.train=nobody/nothing",
        "code": "dataset-not-cached",
        "where": "nobody/nothing: ",
        "help": "hf download --repo-type dataset nobody/nothing",
    },
    "no network for a dataset to be streamed": {
        "argv": "train --set data.train=nobody/nothing --set data.streaming=true",
        "code": "hub-unreachable",
        "where": "nobody/nothing: ",
        "help": "where there is a network",
    },
    "a folder to be streamed": {
        "arrange": lambda place: (place / "nobody" / "nothing").mkdir(parents=True),
        "argv": "train --set data.train=nobody/nothing --set data.streaming=true",
        "exit": 2,
        "code": "streaming-local-data",
        "words": "read where they are",
    },
}

JSON = {
    "cut-off last line": {
        **file("a.jsonl", TEXT + '{"text": "Once'),
        "code": "cut-off",
        "where": "a.jsonl:2: ",
        "words": "is cut off",
    },
    "cut-off array": {
        **file("a.json", '[{"text": "a"},\n{"text": "b"}'),
        "code": "cut-off",
        "where": "a.json:2: ",
    },
    "garbage in the middle": {
        **file("a.jsonl", TEXT + "garbage\n" + TEXT),
        "code": "bad-json",
        "where": "a.jsonl:2: ",
        "help": "each line holds one JSON object",
    },
    "a NUL line, as a crash leaves it": {
        **file("a.jsonl", TEXT + "\0\0\0\n"),
        "code": "bad-json",
        "where": "a.jsonl:2: ",
    },
    "not UTF-8": {
        **file("a.jsonl", TEXT.encode() + b'{"text": "caf\xe9"}\n'),
        "code": "not-utf8",
        "where": "a.jsonl:2: ",
        "words": "0xe9",
    },
    "UTF-16": {**file("a.jsonl", TEXT.encode("utf-16")), "code": "not-utf8", "words": "UTF-16"},
    "two objects on a line": {**file("a.jsonl", TEXT.strip() * 2), "code": "bad-json", "words": "column"},
    "single quotes": {**file("a.jsonl", "{'text': 'a'}\n"), "code": "bad-json"},
    "NaN": {**file("a.jsonl", '{"text": "a", "x": NaN}\n'), "code": "bad-json", "words": "NaN is not JSON"},
    "an integer of 5,000 digits": {**file("a.jsonl", '{"x": ' + "9" * 5000 + "}"), "code": "bad-json"},
    "a key twice": {
        **file("a.jsonl", '{"text": "a", "text": "b"}\n'),
        "code": "bad-json",
        "words": "`text` is given twice",
    },
    "nested 100,000 deep": {**file("a.jsonl", "[" * 100_000), "code": "bad-json", "words": "too deep"},
    "text after the array": {**file("a.json", '[{"text": "a"}] x'), "code": "bad-json"},
    "no comma between the rows": {**file("a.json", '[{"text": "a"} {"text": "b"}]'), "code": "bad-json"},
    "a row that is a list": {
        **file("a.jsonl", TEXT + "[1]\n"),
        "code": "row-not-object",
        "where": "a.jsonl:2: ",
    },
    "a row that is a number": {**file("a.jsonl", "5\n"), "code": "row-not-object", "words": "got a number"},
}

ROWS_OF_DATA = {
    "a missing field": {
        **file("a.jsonl", [{"text": "a"}, {"test": "b"}]),
        "code": "missing-field",
        "where": "a.jsonl:2: text: ",
        "words": "found `test`",
    },
    "a null field": {**file("a.jsonl", [{"text": None}]), "code": "null-field", "where": "a.jsonl:1: text: "},
    "a mistyped field": {
        **file("a.jsonl", [{"text": 5}]),
        "code": "mistyped-field",
        "words": "must be text, got a number",
    },
    "messages that are text": {
        **file("a.jsonl", [{"messages": "x"}]),
        "code": "mistyped-field",
        "words": "a list of turns",
    },
    "a turn that is text": {
        **file("a.jsonl", [{"messages": ["x"]}]),
        "code": "mistyped-field",
        "where": "a.jsonl:1: messages[0]: ",
    },
    "a turn without content": {
        **turn(role="assistant"),
        "code": "missing-field",
        "where": "a.jsonl:2: messages[1].content: ",
    },
    "a turn of a wizard": {**turn(role="wizard", content="x"), "code": "unknown-role", "help": "known roles"},
    "a slip in a role": {**turn(role="asistant", content="x"), "code": "unknown-role", "help": "`assistant`"},
    "a thought beside the words": {
        **turn(role="assistant", content="", reasoning_content="Hm."),
        "argv": "train --set data.train=a.jsonl",
        "exit": 4,
        "code": "template-without-thoughts",
        "words": "a.jsonl:2",
        "help": "`</think>`, or give a chat template",
    },
    "a thought in a user's turn": {
        **file("a.jsonl", [{"messages": [{**USER, "thinking": "Hm."}, ASSISTANT]}]),
        "code": "misplaced-thought",
        "where": "a.jsonl:1: messages[0]: ",
    },
    "a user's turn to be trained on": {
        **file("a.jsonl", [{"messages": [{**USER, "weight": 1}, ASSISTANT]}]),
        "code": "weighted-prompt",
        "help": "data.train_on: all",
    },
    "a weight in words": {
        **turn(role="assistant", content="a", train="yes"),
        "code": "mistyped-field",
        "where": "a.jsonl:2: messages[1].train: ",
    },
    "a weight below nothing": {**turn(role="assistant", content="a", weight=-0.5), "code": "weight-range"},
    "two weights that differ": {
        **turn(role="assistant", content="a", weight=0, loss=True),
        "code": "contradicting-keys",
    },
    "a token that the base has no embedding for": {
        "arrange": lambda place: (_grown(place), _rows(place, [CHAT, _SAYS_NEW])),
        "argv": "train",
        "code": "token-without-row",
        "where": "train.jsonl:2: ",
        "words": ("`<|new|>` (320)", "0 to 319"),
        "help": "resize_token_embeddings",
    },
    "a token that the base has no embedding for, on MLX": {
        "arrange": lambda place: (_grown(place), _rows(place, [CHAT, _SAYS_NEW])),
        "argv": "train --backend mlx",
        "code": "token-without-row",
        "where": "train.jsonl:2: ",
        "words": ("`<|new|>` (320)", "0 to 319"),
        "help": "resize_token_embeddings",
    },
    "a picture": {
        **turn(role="user", content=[{"type": "image"}]),
        "code": "unsupported-content",
        "words": "`image`",
    },
    "half a surrogate pair": {**turn(role="user", content="\ud800"), "code": "broken-text"},
    "an escape sequence in a role": {
        **turn(role="\x1b[31m", content="x"),
        "code": "unknown-role",
        "words": "u001b",
    },
    "an access token in a role": {
        **turn(role="hf_" + "aB3d" * 9, content="x"),
        "code": "unknown-role",
        "words": "`…`",
    },
    "a history that is no list": {
        **file("a.jsonl", [{"instruction": "a", "output": "b", "history": 5}]),
        "code": "mistyped-field",
        "where": "a.jsonl:1: history: ",
    },
    "two system prompts": {
        **file(
            "a.jsonl", [{"system": "a", "messages": [{"role": "system", "content": "b"}, USER, ASSISTANT]}]
        ),
        "code": "two-system-prompts",
    },
    "a text prompt with turns to complete": {
        **file("a.jsonl", [{"prompt": "a", "completion": [ASSISTANT]}]),
        "code": "mistyped-field",
    },
    "unknown columns": {
        **file("a.jsonl", [{"colour": "red", "taste": "sweet"}]),
        "code": "unknown-columns",
        "words": ("`colour`", "`taste`"),
        "help": "alpaca (instruction, output)",
    },
    "preference rows for a task that has none": {
        **file("a.jsonl", [PAIR]),
        "argv": "train --set data.train=a.jsonl",
        "code": "preference-rows",
        "where": "a.jsonl:1: ",
        "words": "task: dpo",
    },
    "conversations for a preference task": {
        "argv": "train --backend torch --set task=dpo",
        "code": "unknown-columns",
        "where": "train.jsonl:1: ",
    },
    "another format in the middle": {
        **file("a.jsonl", [CHAT, {"text": "a"}]),
        "code": "mixed-formats",
        "where": "a.jsonl:2: ",
    },
    "a format that it is not": {
        "argv": "data train.jsonl --format alpaca",
        "code": "mixed-formats",
        "where": "train.jsonl:1: ",
    },
}

TABLES = {
    "a ragged CSV": {
        **file("a.csv", "prompt,completion\na,b\nc\n"),
        "code": "ragged-row",
        "where": "a.csv:3: ",
        "words": "has 1 field",
    },
    "an unclosed quote in a CSV": {**file("a.csv", 'text\n"a'), "code": "bad-csv", "where": "a.csv:2: "},
    "a column twice": {**file("a.csv", "text,text\na,b\n"), "code": "bad-columns", "words": "named twice"},
    "a column without a name": {**file("a.csv", "text,\na,b\n"), "code": "bad-columns"},
    "a CSV in cp1252": {
        **file("a.csv", b"text\ncaf\xe9\n"),
        "code": "not-utf8",
        "where": "a.csv:2: ",
        "words": ("0xe9", "cp1252"),
        "help": "iconv -f CP1252 -t UTF-8 a.csv > a-utf8.csv",
    },
    "a CSV in UTF-16": {
        **file("a.csv", "text\ncafé\n".encode("utf-16")),
        "code": "not-utf8",
        "where": "a.csv:1: ",
        "words": "is UTF-16",
        "help": "iconv -f UTF-16 -t UTF-8 a.csv > a-utf8.csv",
    },
    "content in a column without a name": {
        **file("a.csv", "text,,\na,,\nb,,c\n"),
        "code": "bad-columns",
        "where": "a.csv:1: ",
    },
    "turns as Python shows them in a cell": {
        **file("a.csv", """messages\n"[{'role': 'user', 'content': 'Hi'}]"\n"""),
        "code": "bad-json",
        "where": "a.csv:2: messages: ",
        "help": "json.dumps",
    },
    "lists of turns that are not equally long": {
        **parquet("a.parquet", messages=[{"role": ["user"], "content": ["a", "b"]}]),
        "code": "ragged-lists",
        "where": "a.parquet:1: messages: ",
        "words": ("`role` 1", "`content` 2"),
    },
    "formats mixed in one table": {
        **parquet("a.parquet", text=["a", None], messages=[None, [USER, ASSISTANT]]),
        "code": "mixed-formats",
        "where": "a.parquet:2: ",
        "words": "format messages among rows of the format text",
    },
    "a verdict that is none": {
        **file("a.csv", "prompt,completion,label\na,b,maybe\n"),
        "argv": "data a.csv --task kto",
        "code": "mistyped-field",
        "where": "a.csv:2: label: ",
        "words": "true or false, or 1 or 0",
    },
    "columns of other names": {
        **file("a.csv", "question,answer\na,b\n"),
        "argv": "train --set data.train=a.csv",
        "code": "unknown-columns",
        "where": "a.csv:2: ",
        "help": "data.columns: {instruction: question, output: answer}",
    },
    "a named column that is not text": {
        **file("a.jsonl", [{"question": "a", "answer": 5}]),
        "argv": "train --set data.train=a.jsonl --set 'data.columns={instruction: question, output: answer}'",
        "code": "mistyped-field",
        "where": "a.jsonl:1: answer: ",
    },
    "no prompt before two answers": {
        **file("a.jsonl", [{"question": "a", "chosen": "b", "rejected": "c"}]),
        "argv": "data a.jsonl",
        "code": "missing-field",
        "where": "a.jsonl:1: prompt: ",
        "help": "--columns instruction=question",
    },
    "a truncated Parquet file": {
        "arrange": cut_parquet,
        "argv": "data a.parquet",
        "code": "bad-parquet",
        "words": "is not a whole Parquet file",
    },
    "text called Parquet": {**file("a.parquet", TEXT), "code": "bad-parquet"},
    "bytes in a Parquet column": {**parquet("a.parquet", text=[b"\xff"]), "code": "mistyped-field"},
    "a Parquet date that no calendar has": {
        "arrange": year_36813,
        "argv": "data a.parquet",
        "code": "bad-parquet",
    },
}

TRAINING = {
    "no assistant turn in any row": {
        **file("train.jsonl", [{"messages": [USER]}] * 3),
        "argv": "train",
        "code": "nothing-to-learn",
        "words": ("any of the 3 rows", "no assistant turn (3)"),
    },
    "every assistant turn empty": {
        **file("train.jsonl", [{"messages": [USER, {"role": "assistant", "content": " "}]}]),
        "argv": "train",
        "code": "nothing-to-learn",
    },
    "every answer beyond max_length": {
        "argv": "train --set data.max_length=8",
        "code": "nothing-to-learn",
        "words": "max_length",
    },
    "one row to split": {
        **file("train.jsonl", [CHAT]),
        "argv": "train --set data.val_split=0.5",
        "code": "too-few-rows",
        "help": "data.val_split",
    },
}

ACCEPTED = {
    "a byte order mark": {**file("a.jsonl", b"\xef\xbb\xbf" + TEXT.encode()), "exit": 0},
    "a JSON array called .jsonl": {**file("a.jsonl", '[{"text": "a"},\n{"text": "b"}]'), "exit": 0},
    "line ends of Windows": {**file("a.jsonl", TEXT.replace("\n", "\r\n") * 2), "exit": 0},
    "semicolons": {**file("a.csv", "prompt;completion\na;b\n"), "exit": 0},
    "an index of pandas": {
        **file("a.csv", ",prompt,completion\n0,a,b\n"),
        "exit": 0,
    },
    "turns as JSON text in a cell": {
        **file("train.csv", "messages\n" + '"' + json.dumps([USER, ASSISTANT]).replace('"', '""') + '"\n'),
        "argv": "train --set data.train=train.csv",
        "exit": 0,
    },
    "columns by other names": {
        **file("train.csv", ",question,answer\n" + "".join(f"{number},a,b\n" for number in range(9))),
        "argv": "train --set data.train=train.csv --set 'data.columns={instruction: question, output: answer}'",
        "exit": 0,
        "tells": "`Unnamed: 0`",
    },
    "nulls of a common schema": {
        **parquet(
            "train.parquet",
            messages=[[USER | {"name": None}, ASSISTANT | {"name": None}]] * 9,
            text=[None] * 9,
        ),
        "argv": "train --set data.train=train.parquet",
        "exit": 0,
        "tells": "27 null values count as absent: `messages` (18), `text` (9)",
    },
    "a field of 200,000 letters": {**file("a.csv", "text\n" + "x" * 200_000 + "\n"), "exit": 0},
    "some rows without an assistant": {
        **file("train.jsonl", [CHAT] * 9 + [{"messages": [USER]}]),
        "argv": "train",
        "exit": 0,
        "tells": ("1 row left out, with nothing to learn", "train.jsonl:10"),
    },
    "preference rows whose answers are the same": {
        **file("a.jsonl", [PAIR] * 8 + [{**PAIR, "rejected": "Hello."}] * 2),
        "argv": "train --backend torch --set task=dpo --set data.train=a.jsonl",
        "exit": 0,
        "tells": ("warning[equal-answers]", "2 rows left out"),
    },
    "columns that nothing is made of": {
        **file("train.jsonl", [{**CHAT, "source": "web"}] * 9),
        "argv": "train",
        "exit": 0,
        "tells": "`source` (in 9)",
    },
}

ROWS: dict[str, Any] = {
    f"{table}: {name}": {"exit": 3, **row}
    for table, rows in {
        "file": FILES,
        "json": JSON,
        "row": ROWS_OF_DATA,
        "table": TABLES,
        "training": TRAINING,
    }.items()
    for name, row in rows.items()
}


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """The datasets library waits between its tries to reach the hub."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("name", ROWS)
def test_wrong_data_is_answered_in_one_shape(name: str, check: Callable[[Any], Any]) -> None:
    check(ROWS[name])


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_tools_write_is_taken(name: str, check: Callable[[Any], Any]) -> None:
    check(ACCEPTED[name])


def test_a_dataset_whose_archives_may_hold_pickles_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The datasets library reads a folder as it reads the hub."""
    import datasets

    from soup_xb.core.errors import DataError
    from soup_xb.data.hub import hub_rows

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "train.tar", "w") as archive:
        entry = tarfile.TarInfo("weights.pth")
        entry.size = 2
        archive.addfile(entry, io.BytesIO(b"xx"))
    with pytest.raises(DataError) as caught:
        hub_rows(str(tmp_path / "set"), None, "train")
    (problem,) = caught.value.problems
    assert problem.code == "dataset-kind"
    assert "`webdataset`" in problem.message
