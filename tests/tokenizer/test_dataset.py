"""Files -> token rows: counts, notices, the split, and hub datasets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soup_xb.core.config.schema import DataConfig
from soup_xb.core.errors import DataError, ModelError
from soup_xb.core.rows.examples import Source
from soup_xb.core.rows.row import Row, text_row
from soup_xb.data.dataset import load_dataset, load_file, split_rows, tokenize_file
from soup_xb.data.hub import hub_rows
from soup_xb.data.tokenizer import open_tokenizer


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def chat(question: str, answer: str | None = None) -> dict:
    turns = [{"role": "user", "content": question}]
    return {"messages": turns + ([{"role": "assistant", "content": answer}] if answer is not None else [])}


def codes(notices) -> list[str]:
    return [notice.code for notice in notices]


def lines(rows) -> list[int]:
    return [row.source.line for row in rows]


def test_a_file_becomes_rows_in_order_and_everything_left_out_is_named(opened, tmp_path):
    rows = [
        chat("What is the capital of France?", "Paris."),
        chat("And of Italy?"),
        chat("And of Italy?", "Rome. " * 50) | {"id": 2},
        chat("What is the capital of France? " * 20, "Paris."),
        chat("yes?", ""),
    ]
    file = tokenize_file(Path(write(tmp_path / "a.jsonl", rows)), "auto", opened("byte-level", "chatml"), 64)
    assert lines(file.rows) == [1, 3]
    assert (file.format, file.count, file.unlearnable, file.truncated) == ("messages", 5, 3, 1)
    by_code = {notice.code: notice.message for notice in file.notices}
    assert list(by_code) == ["data-format", "extra-columns", "rows-without-targets", "truncated"]
    assert by_code["data-format"].startswith("messages: the first row has the column")
    assert "`id` (in 1)" in by_code["extra-columns"]
    assert "3 rows left out" in by_code["rows-without-targets"]
    for place, reason in ((2, "no assistant turn"), (4, "beyond max_length"), (5, "is empty")):
        assert f"a.jsonl:{place} (" in by_code["rows-without-targets"]
        assert reason in by_code["rows-without-targets"]
    assert by_code["truncated"].startswith("1 row cut at 64 tokens")


def test_many_places_are_counted_and_the_first_few_named(opened, tmp_path):
    rows = [chat("yes?", "no"), *(chat("yes?") for _ in range(1200)), chat("yes?", "no")]
    found, notices = load_file(
        Path(write(tmp_path / "a.jsonl", rows)), "auto", opened("byte-level", "chatml"), 99
    )
    assert lines(found) == [1, 1202]
    left_out = next(notice for notice in notices if notice.code == "rows-without-targets")
    assert left_out.message.startswith("1,200 rows left out")
    assert left_out.message.endswith("and 1,197 more")
    assert len(left_out.message) < 500


def test_a_file_in_which_no_row_teaches_anything_is_an_error_with_the_reasons(opened, tmp_path):
    path = write(tmp_path / "a.jsonl", [chat("yes?"), chat("no?"), chat("yes?", " ")])
    with pytest.raises(DataError) as caught:
        load_file(Path(path), "auto", opened("byte-level", "chatml"), 99)
    problem = caught.value.problems[0]
    assert (problem.code, problem.where) == ("nothing-to-learn", path)
    assert "any of the 3 rows" in problem.message
    assert "no assistant turn (2)" in problem.message


def test_turns_that_the_template_changes_or_hides_are_told(opened, tmp_path):
    rows = [chat("yes?", "<think>a</think>no")]
    rows[0]["messages"] += chat("no?", "<think>b</think>yes")["messages"]
    _, notices = load_file(Path(write(tmp_path / "a.jsonl", rows)), "auto", opened("byte-level", "qwen3"), 99)
    assert "rewritten-turns" in codes(notices)
    upper = "{% for m in messages %}{{ m.content | upper if m.role == 'user' else m.content + eos_token }}{% endfor %}"
    tokenizer = open_tokenizer(opened("byte-level", None).base, upper)
    _, notices = load_file(Path(write(tmp_path / "b.jsonl", [chat("yes?", "no")])), "auto", tokenizer, 99)
    assert "hidden-turns" in codes(notices)


def test_files_are_joined_in_order_and_each_may_have_its_own_format(opened, tmp_path):
    one = write(tmp_path / "a.jsonl", [chat("yes?", "no")])
    two = write(tmp_path / "b.jsonl", [{"instruction": "yes?", "output": "no"}])
    held_out = write(tmp_path / "c.jsonl", [{"text": "Rome"}])
    data = DataConfig(train=(one, two), eval=(held_out,))
    dataset = load_dataset(data, opened("byte-level", "chatml"), seed=0)
    assert [row.source.file for row in dataset.train] == [one, two]
    first, second = (row.sequences[0].tokens.tolist() for row in dataset.train)
    assert first == second
    assert [row.source.file for row in dataset.evaluation] == [held_out]
    assert dataset.format == "messages, alpaca"
    assert codes(dataset.notices) == ["data-format"] * 3


def test_the_template_s_notices_come_once_and_only_with_conversations(opened, tmp_path):
    tokenizer = opened("byte-level", "plain_words")
    chats = [write(tmp_path / name, [chat("yes?", "no")]) for name in ("a.jsonl", "b.jsonl")]
    text = write(tmp_path / "c.jsonl", [{"text": "Rome"}])
    with_chats = load_dataset(DataConfig(train=tuple(chats)), tokenizer, seed=0)
    assert codes(with_chats.notices).count("no-end-token") == 1
    assert "no-end-token" not in codes(load_dataset(DataConfig(train=(text,)), tokenizer, seed=0).notices)


def test_conversations_on_a_base_without_a_template_stop_the_load(opened, tmp_path):
    path = write(tmp_path / "a.jsonl", [chat("yes?", "no")])
    with pytest.raises(ModelError, match="no chat template"):
        load_dataset(DataConfig(train=(path,)), opened("byte-level", None), seed=0)


def test_the_split_is_a_function_of_the_seed_alone(opened, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": f"Paris {number}"} for number in range(10)])
    tokenizer = opened("byte-level", None)

    def split(seed: int) -> tuple[list[int], list[int]]:
        dataset = load_dataset(DataConfig(train=(path,), val_split=0.3), tokenizer, seed)
        return lines(dataset.train), lines(dataset.evaluation)

    # Golden, printed by this very call: another machine or NumPy must give the same rows.
    assert split(42) == ([1, 2, 4, 6, 8, 9, 10], [3, 5, 7])
    assert split(43) != split(42)


def blank_rows(count: int) -> list[Row]:
    return [text_row([1, 2], [False, True], Source("a.jsonl", line)) for line in range(1, count + 1)]


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 60), st.floats(0.001, 0.5), st.integers(0, 2**32 - 1))
def test_every_row_is_on_one_side_in_order_and_no_side_is_empty(count, share, seed):
    train, held_out = split_rows(blank_rows(count), share, seed)
    assert sorted(lines(train) + lines(held_out)) == list(range(1, count + 1))
    assert (lines(train), lines(held_out)) == (sorted(lines(train)), sorted(lines(held_out)))
    assert len(held_out) == max(1, int(count * share + 1e-9))
    assert train


def test_a_share_that_a_float_cannot_hold_is_not_rounded_down():
    assert len(split_rows(blank_rows(100), 0.29, 0)[1]) == 29


@pytest.mark.parametrize(("count", "share"), [(1, 0.1), (0, 0.1), (1, 0.99)])
def test_too_few_rows_to_split_is_an_error(count, share):
    with pytest.raises(DataError) as caught:
        split_rows(blank_rows(count), share, 0)
    assert (caught.value.problems[0].code, caught.value.problems[0].where) == (
        "too-few-rows",
        "data.val_split",
    )


@pytest.fixture
def local_copy(tmp_path, monkeypatch) -> str:
    """A dataset that the datasets library finds under `owner/name`: a folder in the current directory."""
    (tmp_path / "owner" / "name").mkdir(parents=True)
    write(tmp_path / "owner" / "name" / "train.jsonl", [{"text": "Rome"}, {"text": "Paris", "id": 3}])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return "owner/name"


def test_a_hub_dataset_s_rows_are_numbered_from_one(local_copy):
    rows = [(str(source), row["text"]) for source, row in hub_rows(local_copy, None, "train")]
    assert rows == [("owner/name:1", "Rome"), ("owner/name:2", "Paris")]


@pytest.mark.parametrize(("subset", "split"), [(None, "dev"), ("small", "train")])
def test_a_split_or_subset_that_a_dataset_does_not_have_is_named(local_copy, subset, split):
    with pytest.raises(DataError) as caught:
        hub_rows(local_copy, subset, split)
    problem = caught.value.problems[0]
    assert (problem.code, problem.where) == ("dataset-not-loaded", local_copy)
    assert f"split `{split}`" in problem.message


def test_without_a_network_a_hub_dataset_is_an_error_that_says_how_to_fetch_it(tmp_path):
    code = (
        "from soup_xb.data.hub import hub_rows; from soup_xb.core.errors import DataError\n"
        "try: hub_rows('owner/name', None, 'train')\n"
        "except DataError as error: print(error)"
    )
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=offline, check=True
    )
    assert done.stdout.startswith("error[dataset-not-cached] owner/name: ")
    assert "hf download --repo-type dataset owner/name" in done.stdout


@pytest.mark.parametrize("entry", ["./owner/name", "rows.jsonl", "owner/rows.jsonl", "rows"])
def test_what_is_spelled_like_a_file_is_never_looked_up_on_the_hub(opened, entry):
    with pytest.raises(DataError, match="no such file") as caught:
        load_dataset(DataConfig(train=(entry,)), opened("byte-level", None), seed=0)
    assert caught.value.problems[0].code == "data-missing"
