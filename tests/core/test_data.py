"""Reading rows: every kind of file, and every kind of damage."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from soup_xb.core.errors import DataError
from soup_xb.core.rows.files import READERS, read_rows

A, B = {"text": "über 😀"}, {"text": "two\nlines"}


def write(tmp_path: Path, name: str, content: bytes | str) -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows(path: Path) -> list[tuple[int, dict]]:
    return [(source.line, row) for source, row in read_rows(path)]


def failure(path: Path) -> tuple[str, str, str]:
    """Code, place and message of the error, the place without its folder."""
    with pytest.raises(DataError) as caught:
        rows(path)
    problem = caught.value.problems[0]
    return problem.code, problem.where.removeprefix(f"{path.parent}/"), problem.message


JSON_A, JSON_B = json.dumps(A, ensure_ascii=False), json.dumps(B)


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("a.jsonl", f"{JSON_A}\n{JSON_B}\n", (1, 2)),
        ("a.ndjson", f"{JSON_A}\r\n\r\n  \n{JSON_B}", (1, 4)),
        ("a.jsonl", f"\ufeff{JSON_A}\n{JSON_B}", (1, 2)),
        ("a.jsonl", f"\n[{JSON_A},\n{JSON_B}]\n", (2, 3)),
        ("a.JSONL", f"[{JSON_A}, {JSON_B}]", (1, 1)),
        ("a.json", f"\ufeff[\n  {JSON_A},\n\n  {JSON_B}\n]\n", (2, 4)),
        ("a.json", f"{JSON_A}\n{JSON_B}\n", (1, 2)),
        ("a.json", json.dumps(A, indent=2) + "\n" + json.dumps(B, indent=2), (1, 4)),
        ("a.csv", '\ufefftext\nüber 😀\n\n"two\nlines"\n', (2, 4)),
        ("a.tsv", 'text\r\nüber 😀\r\n"two\nlines"', (2, 3)),
        # As spreadsheets write tables: columns and rows without content, a line that tells the separator.
        ("a.csv", 'text,,\nüber 😀,,\n,,\n"two\nlines",,\n', (2, 4)),
        ("a.csv", 'text\nüber 😀,\n"two\nlines",,\n', (2, 3)),
        ("a.csv", 'sep=;\ntext\nüber 😀\n"two\nlines"\n', (3, 4)),
    ],
)
def test_rows_are_read_with_their_lines(tmp_path, name, content, lines):
    assert rows(write(tmp_path, name, content)) == [(lines[0], A), (lines[1], B)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "a;b\n1;2, 3\n"),
        ("a.csv", "a\tb\n1\t2, 3\n"),
        ("a.csv", "a|b\n1|2, 3\n"),
        ("a.csv", "sep=;\r\na;b\r\n1;2, 3\r\n"),
        ("a.csv", 'a,b\n1,"2, 3"\n'),
        ("a.csv", '"a";"b"\n1;"2, 3"\n'),
        ("a.tsv", "a\tb\n1\t2, 3\n"),
        ("a.tsv", "a;b\n1;2, 3\n"),
    ],
)
def test_the_separator_of_a_table_is_found(tmp_path, name, text):
    assert [row for _, row in rows(write(tmp_path, name, text))] == [{"a": "1", "b": "2, 3"}]


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("id;question, long;answer\n1;a;b\n", ["id", "question, long", "answer"]),
        ("text\none; two; three\n", ["text"]),
        ("a,b; c\n1,2; 3\n", ["a", "b; c"]),
        (",text\n0,a\n", ["Unnamed: 0", "text"]),
        (",,text\n0,x,a\n", ["Unnamed: 0", "Unnamed: 1", "text"]),
        ("Unnamed: 0,text\n0,a\n", ["Unnamed: 0", "text"]),
        (",Unnamed: 0,text\n0,0,a\n", ["Unnamed: 1", "Unnamed: 0", "text"]),
    ],
)
def test_the_columns_of_a_table_are_those_of_its_first_line(tmp_path, text, columns):
    assert [list(row) for _, row in rows(write(tmp_path, "a.csv", text))] == [columns]


@pytest.mark.parametrize(
    ("name", "content", "encoding"),
    [
        ("a.csv", "text\ncafé\n".encode("cp1252"), "CP1252"),
        ("a.csv", "text\n“quoted” – 5 €\n".encode("cp1252"), "CP1252"),
        ("a.tsv", "text\ncafé\n".encode("utf-16"), "UTF-16"),
        ("a.csv", "text\ncafé\n".encode("utf-16-le"), "UTF-16LE"),
        ("a.csv", "text\ncafé\n".encode("utf-16-be"), "UTF-16BE"),
        ("a.csv", "text\ncafé\n".encode("utf-32"), "UTF-32"),
        ("a.jsonl", '{"text": "café"}\n'.encode("cp1252"), "CP1252"),
        ("a.jsonl", '{"text": "café"}\n'.encode("utf-16-le"), "UTF-16LE"),
        ("a.json", '[{"text": "café"}]'.encode("utf-16"), "UTF-16"),
        ("a b.json", '[{"text": "café"}]'.encode("cp1252"), "CP1252"),
    ],
)
def test_another_encoding_is_named_with_the_command_that_converts_it(tmp_path, name, content, encoding):
    path = write(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        rows(path)
    problem = caught.value.problems[0]
    assert problem.code == "not-utf8"
    (command,) = re.findall(r"`(iconv [^`]*)`", problem.help)
    assert f"-f {encoding} -t UTF-8" in command
    subprocess.run(command, shell=True, check=True)
    assert len(rows(path.with_name(f"{path.stem}-utf8{path.suffix}"))) == 1


@pytest.mark.parametrize(
    "text", ["Привет, мир".encode("cp1251"), "über ".encode() + b"\xff", b"caf\xe9 \x81"]
)
def test_bytes_that_are_likely_something_else_are_not_called_cp1252(tmp_path, text):
    path = write(tmp_path, "a.csv", b"text\n" + text + b"\n")
    with pytest.raises(DataError) as caught:
        rows(path)
    assert "iconv" not in caught.value.problems[0].help


def test_parquet_rows_have_the_number_of_the_row(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([A, B]), tmp_path / "a.parquet")
    assert rows(tmp_path / "a.parquet") == [(1, A), (2, B)]


def test_json_lines_are_streamed(tmp_path):
    reader = read_rows(write(tmp_path, "a.jsonl", f"{JSON_A}\nnot json\n"))
    assert next(reader)[1] == A
    with pytest.raises(DataError):
        next(reader)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", f'{JSON_A}\n{{"text": "cut o', ("cut-off", "a.jsonl:2", "ends in the middle")),
        ("a.jsonl", f'{JSON_A}\n{{"text": "cut"', ("cut-off", "a.jsonl:2", "ends in the middle")),
        ("a.jsonl", f"[{JSON_A},\n{JSON_B}", ("cut-off", "a.jsonl:2", "ends in the middle")),
        ("a.json", f'[{JSON_A},\n{{"text": "cu', ("cut-off", "a.json:2", "ends in the middle")),
        ("a.json", f"[{JSON_A},\n", ("cut-off", "a.json:2", "ends in the middle")),
        ("a.jsonl", f"{JSON_A}\n%garbage%\n{JSON_B}\n", ("bad-json", "a.jsonl:2", "column 1")),
        ("a.jsonl", f'{JSON_A}\n{{"text": "cut o\n{JSON_B}\n', ("bad-json", "a.jsonl:2", "column 10")),
        ("a.jsonl", f"{JSON_A} {JSON_B}\n", ("bad-json", "a.jsonl:1", "text after the object")),
        ("a.json", f"[{JSON_A}\n{JSON_B}]", ("bad-json", "a.json:2", "`,` or `]` is missing")),
        ("a.json", f"[{JSON_A}]\n[]", ("bad-json", "a.json:2", "after the end of the array")),
        ("a.json", '[\n{"text":\n nope}]', ("bad-json", "a.json:3", "Expecting value")),
        ("a.jsonl", f"{JSON_A}\n".encode() + b'{"text": "\xff"}\n', ("not-utf8", "a.jsonl:2", "0xff")),
        ("a.jsonl", JSON_A.encode("utf-16"), ("not-utf8", "a.jsonl:1", "UTF-16")),
        ("a.json", b'[{"text": "a"},\n{"text": "\xe9"}]', ("not-utf8", "a.json:2", "0xe9")),
        ("a.csv", b"text\nfine\n\xe9\n", ("not-utf8", "a.csv:3", "0xe9")),
        ("a.jsonl", f'{JSON_A}\n["text"]\n', ("row-not-object", "a.jsonl:2", "got a list")),
        ("a.jsonl", "[1]\n", ("row-not-object", "a.jsonl:1", "got a number")),
        ("a.jsonl", "null\n", ("row-not-object", "a.jsonl:1", "got null")),
        ("a.jsonl", '{"text": NaN}\n', ("bad-json", "a.jsonl:1", "NaN is not JSON")),
        ("a.jsonl", '{"text": -Infinity}\n', ("bad-json", "a.jsonl:1", "-Infinity is not JSON")),
        ("a.jsonl", f'{{"id": {"9" * 5000}}}\n', ("bad-json", "a.jsonl:1", "5,000 digits")),
        ("a.jsonl", f'{{"a": {"[" * 100_000}', ("bad-json", "a.jsonl:1", "nested too deep")),
        ("a.jsonl", '{"a": 1, "a": 2}\n', ("bad-json", "a.jsonl:1", "`a` is given twice")),
        ("a.csv", "a,b\n1,2\n1,2,3\n", ("ragged-row", "a.csv:3", "has 3 fields")),
        ("a.csv", 'a,b\n1,"2\n\n3"\n1\n', ("ragged-row", "a.csv:5", "has 1 field,")),
        ("a.csv", 'a,b\n1,"2\n', ("bad-csv", "a.csv:2", "unexpected end")),
        ("a.csv", "a,a\n1,2\n", ("bad-columns", "a.csv:1", "`a` is named twice")),
        ("a.csv", "a,\n1,2\n", ("bad-columns", "a.csv:1", "no name")),
        ("a.parquet", b"PAR1 not really", ("bad-parquet", "a.parquet", "not a whole Parquet file")),
        ("a.txt", "text", ("unknown-file-type", "a.txt", "`.txt`")),
        ("a.jsonl.gz", b"\x1f\x8b", ("unknown-file-type", "a.jsonl.gz", "`.gz`")),
        ("data", "text", ("unknown-file-type", "data", "`data`")),
    ],
)
def test_damage_is_named_with_its_place(tmp_path, name, content, expected):
    code, place, message = failure(write(tmp_path, name, content))
    assert (code, place) == expected[:2]
    assert expected[2] in message


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b"\n\n"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_file_without_rows_is_an_error(tmp_path, name, content):
    assert failure(write(tmp_path, name, content))[0] == "data-empty"


def test_an_empty_array_a_bare_header_and_an_empty_table_hold_no_rows(tmp_path):
    assert failure(write(tmp_path, "a.json", "[ ]"))[0] == "data-empty"
    assert failure(write(tmp_path, "a.csv", "text\n"))[0] == "data-empty"
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], "string")}), tmp_path / "a.parquet")
    assert failure(tmp_path / "a.parquet")[0] == "data-empty"


def test_a_truncated_parquet_file_is_named(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([A] * 5000), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    for length in (0, 3, len(whole) // 2, len(whole) - 1):
        assert failure(write(tmp_path, "cut.parquet", whole[:length]))[0] == "bad-parquet"


def test_a_missing_file_names_the_closest_one_and_a_folder_is_refused_at_once(tmp_path):
    write(tmp_path, "train.jsonl", JSON_A)
    with pytest.raises(DataError, match=r"did you mean `train\.jsonl`"):
        read_rows(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        read_rows(tmp_path)


def test_a_csv_field_may_be_as_long_as_a_document(tmp_path):
    import csv

    before = csv.field_size_limit()
    assert rows(write(tmp_path, "a.csv", "text\n" + "a" * 200_000 + "\n")) == [(2, {"text": "a" * 200_000})]
    assert csv.field_size_limit() == before


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    suffix=st.sampled_from(sorted(READERS)),
    content=st.binary(max_size=200)
    | st.lists(JSON.map(json.dumps)).map(lambda rows: "\n".join(rows).encode()),
)
@example(suffix=".json", content=b'[{"a": 1},')
@example(suffix=".csv", content=b'"\r"\x00')
def test_whatever_the_bytes_only_a_data_error_comes_out(tmp_path, suffix, content):
    path = write(tmp_path, f"fuzz{suffix}", content)
    try:
        read = rows(path)
    except DataError as error:
        assert str(path) in str(error)
    else:
        assert read
        assert all(isinstance(row, dict) for _, row in read)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(st.text(), JSON, max_size=4), min_size=1, max_size=5))
def test_json_rows_come_back_as_they_were_written(tmp_path, written):
    written = json.loads(json.dumps(written).replace("NaN", "0").replace("Infinity", "0"))
    lines = "\n".join(json.dumps(row) for row in written)
    for name, content in (("a.jsonl", lines), ("b.json", json.dumps(written, indent=1)), ("c.json", lines)):
        assert [row for _, row in rows(write(tmp_path, name, content))] == written


def test_nan_in_a_table_counts_as_null_at_every_depth(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    nan = float("nan")
    call = {"function": {"name": "f", "arguments": {"x": nan, "y": 1.5}}}
    columns = {
        "input": [nan, 2.0],
        "turns": [[{"weight": nan, "calls": [call]}], [{"weight": 0.5, "calls": [call]}]],
        "text": ["nan", "NaN"],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    first, second = (row for _, row in read_rows(tmp_path / "rows.parquet"))
    read = {"function": {"name": "f", "arguments": {"x": None, "y": 1.5}}}
    assert first == {"input": None, "turns": [{"weight": None, "calls": [read]}], "text": "nan"}
    assert second == {"input": 2.0, "turns": [{"weight": 0.5, "calls": [read]}], "text": "NaN"}


def test_lines_that_end_as_on_an_old_mac_are_told_in_words(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_bytes(b"instruction,output\ra,b\rc,d\r")
    with pytest.raises(DataError, match="ends with a carriage return alone"):
        list(read_rows(file))
