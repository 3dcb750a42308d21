"""A data file as token rows: tokenized once by any number of processes, kept, and read again."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from soup_xb.core.config.schema import DataConfig
from soup_xb.core.errors import DataError
from soup_xb.core.rows.examples import Source
from soup_xb.core.rows.formats.detect import FORMATS
from soup_xb.core.rows.row import Row, TokenSequence
from soup_xb.core.tasks import TASKS
from soup_xb.data import token_file
from soup_xb.data.dataset import load_dataset, tokenize_as, tokenize_file
from soup_xb.data.spans import BATCH
from soup_xb.data.tokenize import RowTally
from soup_xb.data.workers import Batch

COUNT = 3 * BATCH + 17


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every file is large enough to be kept, in a cache of this test's own; the folder of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(token_file, "KEPT_FROM_BYTES", 1)
    return tmp_path / "cache" / "soupx" / "tokens"


def by_processes(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(token_file, "tokenizing_processes", lambda size: count)


def chats(count: int = COUNT) -> list[dict[str, Any]]:
    """Conversations, of which every hundredth has nothing to learn and every tenth is cut."""
    answers = ("Rome, of course. " * (40 if index % 10 == 3 else 1 + index % 5) for index in range(count))
    return [
        {
            "messages": [
                {"role": "user", "content": f"And of Italy, {index}?"},
                {"role": "assistant", "content": "" if index % 100 == 7 else answer},
            ]
        }
        for index, answer in enumerate(answers)
    ]


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def entries(kept: Path) -> list[Path]:
    return [path for path in kept.iterdir() if path.is_dir()]


def told(file: token_file.TokenFile) -> list[tuple[str, str]]:
    return [(notice.code, notice.message) for notice in file.notices if not notice.code.startswith("kept")]


def test_the_rows_and_what_is_told_of_them_are_the_same_by_any_number_of_processes(
    opened, tmp_path, monkeypatch
):
    path, tokenizer = write(tmp_path / "a.jsonl", chats()), opened("byte-level", "chatml")
    found = []
    for processes in (1, 2):
        by_processes(monkeypatch, processes)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / str(processes)))
        found.append(tokenize_file(path, "auto", tokenizer, 64))
    monkeypatch.setattr(token_file, "KEPT_FROM_BYTES", 2**40)
    found.append(tokenize_file(path, "auto", tokenizer, 64))
    first, *others = found
    assert {code for code, _ in told(first)} >= {"rows-without-targets", "truncated", "data-format"}
    assert first.count == COUNT == len(first.rows) + first.unlearnable
    for other in others:
        assert (told(other), other.count, other.truncated) == (told(first), first.count, first.truncated)
        assert other.rows.fingerprint == first.rows.fingerprint
        assert [row.source for row in other.rows] == [row.source for row in first.rows]


def test_a_second_start_tokenizes_nothing(opened, tmp_path, monkeypatch, kept):
    path, tokenizer = write(tmp_path / "a.jsonl", chats(40)), opened("byte-level", "chatml")
    first = tokenize_file(path, "auto", tokenizer, 64)
    monkeypatch.setattr(token_file, "tokenized", None)
    second = tokenize_file(path, "auto", tokenizer, 64)
    assert second.rows.fingerprint == first.rows.fingerprint
    assert told(second) == told(first)
    assert (second.count, second.unlearnable, second.truncated) == (
        first.count,
        first.unlearnable,
        first.truncated,
    )
    assert "read from" in second.notices[-1].message
    assert len(entries(kept)) == 1


def test_another_setting_file_or_template_has_an_entry_of_its_own(opened, tmp_path, kept):
    path = write(tmp_path / "a.jsonl", chats(40))
    changes = [(64, "chatml"), (65, "chatml"), (64, "qwen3")]
    for length, template in changes:
        tokenize_file(path, "auto", opened("byte-level", template), length)
    write(path, chats(41))
    tokenize_file(path, "auto", opened("byte-level", "chatml"), 64)
    assert len(entries(kept)) == 4


def test_other_columns_have_an_entry_of_their_own(opened, tmp_path, kept):
    rows = [chat | {"talk": chat["messages"][:2]} for chat in chats(40)]
    path, tokenizer = write(tmp_path / "a.jsonl", rows), opened("byte-level", "chatml")
    for columns in ({}, {"messages": "talk"}, {}):
        tokenize_as(path, token_file.Reading("auto", FORMATS, columns=columns), tokenizer, 64)
    assert len(entries(kept)) == 2


@pytest.mark.parametrize(("name", "value"), [("ROWS_VERSION", 10**6), ("__version__", "99.0")])
def test_a_version_that_makes_other_rows_has_an_entry_of_its_own(
    opened, tmp_path, kept, monkeypatch, name, value
):
    path, tokenizer = write(tmp_path / "a.jsonl", chats(40)), opened("byte-level", "chatml")
    tokenize_file(path, "auto", tokenizer, 64)
    monkeypatch.setattr(token_file, name, value)
    tokenize_file(path, "auto", tokenizer, 64)
    assert len(entries(kept)) == 2


def test_a_damaged_entry_is_tokenized_anew_with_a_notice(opened, tmp_path, kept):
    path, tokenizer = write(tmp_path / "a.jsonl", chats(40)), opened("byte-level", "chatml")
    first = tokenize_file(path, "auto", tokenizer, 64)
    [entry] = entries(kept)
    data = bytearray((entry / "tokens").read_bytes())
    data[7] ^= 1
    (entry / "tokens").write_bytes(data)
    second = tokenize_file(path, "auto", tokenizer, 64)
    assert [notice.code for notice in second.notices][-2:] == ["kept-tokens-damaged", "kept-tokens"]
    assert "`tokens` has other bytes" in second.notices[-2].message
    assert second.rows.fingerprint == first.rows.fingerprint


def test_where_nothing_can_be_kept_the_rows_stay_in_memory_with_a_notice(opened, tmp_path, monkeypatch):
    path, tokenizer = write(tmp_path / "a.jsonl", chats(40)), opened("byte-level", "chatml")
    kept_rows = tokenize_file(path, "auto", tokenizer, 64).rows
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    found = tokenize_file(path, "auto", tokenizer, 64)
    assert found.notices[-1].code == "tokens-not-kept"
    assert found.rows.fingerprint == kept_rows.fingerprint


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_is_the_first_that_one_process_would_meet(opened, tmp_path, monkeypatch, processes, kept):
    """The chat template refuses a row of the third batch; the fifth batch is not even JSON."""
    by_processes(monkeypatch, processes)
    rows = chats(5 * BATCH)
    rows[2 * BATCH + 5]["messages"][0]["role"] = "system"
    rows[2 * BATCH + 5]["messages"].insert(0, {"role": "user", "content": "Oh?"})
    path = write(tmp_path / "a.jsonl", rows[: 4 * BATCH])
    with path.open("a") as file:
        file.write("{broken\n")
    with pytest.raises(DataError) as caught:
        tokenize_file(path, "auto", opened("byte-level", "gemma"), 64)
    problem = caught.value.problems[0]
    assert (problem.code, problem.where) == ("template-refuses", f"{path}:{2 * BATCH + 6}")
    assert not entries(kept)


def test_a_file_that_changes_while_it_is_read_is_not_kept(opened, tmp_path, monkeypatch, kept):
    path = write(tmp_path / "a.jsonl", chats(40))
    through = token_file.tokenized

    def growing(*arguments: Any) -> Any:
        yield from through(*arguments)
        write(path, chats(41))

    monkeypatch.setattr(token_file, "tokenized", growing)
    with pytest.raises(DataError, match="changed while it was read"):
        tokenize_file(path, "auto", opened("byte-level", "chatml"), 64)
    assert not entries(kept)


def test_a_kept_file_is_split_packed_and_judged_as_one_in_memory(opened, tmp_path, monkeypatch):
    pairs = [
        {"prompt": f"And of {index % 9}?", "chosen": " Rome" * (1 + index % 4), "rejected": " Paris."}
        for index in range(60)
    ]
    texts = [{"text": "Rome has a long history. " * (1 + index % 9)} for index in range(60)]
    tokenizer = opened("byte-level", None)
    for rows, task in ((pairs, "dpo"), (pairs, "kto"), (texts, "pretrain")):
        data = DataConfig(train=(str(write(tmp_path / "a.jsonl", rows)),), val_split=0.2, max_length=48)
        found = []
        for kept_from in (1, 2**40):
            monkeypatch.setattr(token_file, "KEPT_FROM_BYTES", kept_from)
            found.append(load_dataset(data, tokenizer, 3, TASKS[task]))
        kept_rows, in_memory = found
        for one, other in ((kept_rows.train, in_memory.train), (kept_rows.evaluation, in_memory.evaluation)):
            assert one.fingerprint == other.fingerprint
            for here, there in zip(one, other, strict=True):
                for mine, theirs in zip(here.sequences, there.sequences, strict=True):
                    np.testing.assert_array_equal(mine.tokens, theirs.tokens)
                    assert mine.documents == theirs.documents
            assert one.facts.tokens.tolist() == [row.real_tokens for row in one]
            assert one.facts.lengths.tolist() == [row.length for row in one]
            assert one.facts.targets.tolist() == [row.target_tokens for row in one]


def test_rows_with_more_in_them_than_columns_hold_stay_in_memory_whole(opened, tmp_path, monkeypatch, kept):
    """Here a row of the second batch holds two documents."""
    plain = token_file.tokenized

    def with_documents(*arguments: Any) -> Any:
        yield from plain(*arguments)
        packed = TokenSequence([1, 2, 3, 4], [True] * 4, Source("a.jsonl", 41), (0, 2))
        yield Batch("", {}, RowTally("a.jsonl", 64).state(), [Row("tokens", (packed,))])

    monkeypatch.setattr(token_file, "tokenized", with_documents)
    path = write(tmp_path / "a.jsonl", chats(40))
    found = tokenize_file(path, "auto", opened("byte-level", "chatml"), 64)
    assert found.rows[-1].sequences[0].documents == (0, 2)
    assert len(found.rows) == 40
    assert not entries(kept)


def test_who_comes_second_waits_and_finds_the_rows(opened, tmp_path, monkeypatch):
    path, tokenizer = write(tmp_path / "a.jsonl", chats(40)), opened("byte-level", "chatml")
    through, starts = token_file.tokenized, []

    def counted(*arguments: Any) -> Any:
        starts.append(arguments)
        yield from through(*arguments)

    monkeypatch.setattr(token_file, "tokenized", counted)
    with ThreadPoolExecutor(2) as pool:
        one, other = (
            future.result()
            for future in [pool.submit(tokenize_file, path, "auto", tokenizer, 64) for _ in range(2)]
        )
    assert len(starts) == 1
    assert one.rows.fingerprint == other.rows.fingerprint
    assert sorted("read from" in file.notices[-1].message for file in (one, other)) == [False, True]
