"""Tokenized rows on the disk: what is kept comes back, and nothing else is taken for it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from soup_xb.core import disk
from soup_xb.core.rows.examples import Source
from soup_xb.core.rows.row import KINDS, Prompt, Row, TokenSequence
from soup_xb.core.rows.table import Columns, ListedRows, RowTable, columns_of, stored_kind
from soup_xb.data import token_cache
from soup_xb.data.token_cache import DamagedEntryError, EntryWriter, entry_lock, evict, open_entry

KEY = {"files": ["abc"], "max_length": 8}
STORED = [name for name, kind in KINDS.items() if kind.stored]


def answer(line: int, length: int = 5) -> TokenSequence:
    tokens = np.arange(length) + 10 * line
    return TokenSequence(tokens, np.arange(length) >= 2, Source("rows.jsonl", line))


def text(line: int, length: int) -> TokenSequence:
    return TokenSequence(np.arange(length), np.zeros(length, dtype=np.bool_), Source("rows.jsonl", line))


def rows_of(kind: str, count: int = 6) -> list[Row]:
    found: dict[str, Callable[[int], Row]] = {
        "tokens": lambda line: Row(kind, (answer(line, 3 + line),)),
        "pair": lambda line: Row(kind, (answer(line, 3 + line), answer(line, 4))),
        "embedding": lambda line: Row(
            kind, (text(line, 3 + line), text(line, 4), text(line, 2))[: 2 + line % 2]
        ),
        "judged": lambda line: Row(kind, (answer(line, 3 + line),), line % 2 == 0),
    }
    return [found[kind](line) for line in range(1, count + 1)]


def write(folder: Path, rows: list[Row]) -> None:
    kind = stored_kind(rows[0])
    assert kind is not None
    writer = EntryWriter(folder)
    writer.append(columns_of(rows[:2]))
    writer.append(columns_of(rows[2:]))
    writer.publish(kind.name, KEY, {"count": len(rows)})


def opened(folder: Path) -> RowTable:
    entry = open_entry(folder, KEY)
    assert entry is not None
    return RowTable("rows.jsonl", entry.columns)


@pytest.mark.parametrize("kind", STORED)
def test_what_is_kept_comes_back_row_by_row_with_the_same_sizes(kind: str, tmp_path: Path) -> None:
    rows = rows_of(kind)
    write(tmp_path / "entry", rows)
    table, listed = opened(tmp_path / "entry"), ListedRows(rows)
    for found, row in zip(table, rows, strict=True):
        assert (found.kind, found.source, found.extra) == (row.kind, row.source, row.extra)
        assert found.sides == row.sides
        for one, other in zip(found.sequences, row.sequences, strict=True):
            np.testing.assert_array_equal(one.tokens, other.tokens)
            np.testing.assert_array_equal(one.trained, other.trained)
    for name in (
        "lengths",
        "targets",
        "tokens",
        "sequence_lengths",
        "sequence_targets",
        "prompt_lengths",
        "prompt_keys",
    ):
        np.testing.assert_array_equal(getattr(table.facts, name), getattr(listed.facts, name), err_msg=name)
    np.testing.assert_array_equal(table.pairs, listed.pairs)


def test_rows_that_columns_do_not_hold_whole_are_told_apart() -> None:
    packed = TokenSequence([1, 2, 3, 4], [True] * 4, Source("rows.jsonl", 1), (0, 2))
    prompt = Row("prompt", (text(1, 3),), Prompt({"answer": "4"}))
    for row in (Row("tokens", (packed,)), Row("pair", (answer(1), packed)), prompt):
        assert stored_kind(row) is None
        with pytest.raises(TypeError, match=row.kind):
            columns_of([row])
    assert set(STORED) == {"tokens", "pair", "judged", "embedding"}


@pytest.mark.parametrize("kind", STORED)
def test_a_table_in_memory_has_the_fingerprint_of_the_one_on_the_disk(kind: str, tmp_path: Path) -> None:
    rows = rows_of(kind)
    write(tmp_path / "entry", rows)
    in_memory = RowTable("elsewhere.jsonl", Columns(KINDS[kind], columns_of(rows), {}))
    assert in_memory.fingerprint == opened(tmp_path / "entry").fingerprint
    other = RowTable("rows.jsonl", Columns(KINDS[kind], columns_of(rows[:-1]), {}))
    assert other.fingerprint != in_memory.fingerprint


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "one bit of the tokens": lambda entry: flip(entry / "tokens"),
    "one bit of the lengths": lambda entry: flip(entry / "lengths"),
    "one bit of what is told": lambda entry: flip(entry / "about.json"),
    "half of the tokens": lambda entry: os.truncate(entry / "tokens", 12),
    "no marks": lambda entry: (entry / "trained").unlink(),
    "nothing told": lambda entry: (entry / "about.json").write_bytes(b""),
    "a link in place of a file": lambda entry: (
        (entry / "lines").rename(entry / "other"), (entry / "lines").symlink_to(entry / "other")
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_an_entry_that_is_not_as_it_was_written_is_not_opened(damage: str, tmp_path: Path) -> None:
    write(tmp_path / "entry", rows_of("tokens"))
    DAMAGES[damage](tmp_path / "entry")
    with pytest.raises(DamagedEntryError):
        open_entry(tmp_path / "entry", KEY)


def test_an_entry_of_another_key_is_not_opened(tmp_path: Path) -> None:
    write(tmp_path / "entry", rows_of("tokens"))
    with pytest.raises(DamagedEntryError, match="other data"):
        open_entry(tmp_path / "entry", {**KEY, "max_length": 9})
    assert open_entry(tmp_path / "none", KEY) is None


def test_columns_that_do_not_fit_together_are_not_opened_though_their_hashes_are_right(
    tmp_path: Path,
) -> None:
    columns = columns_of(rows_of("tokens"))
    writer = EntryWriter(tmp_path / "entry")
    writer.append({**columns, "lengths": columns["lengths"][:-1]})
    writer.publish("tokens", KEY, {})
    with pytest.raises(DamagedEntryError, match="do not belong together"):
        open_entry(tmp_path / "entry", KEY)


def test_a_run_reads_on_when_its_entry_is_deleted(tmp_path: Path) -> None:
    write(tmp_path / "entry", rows_of("tokens"))
    table = opened(tmp_path / "entry")
    token_cache.clear(tmp_path)
    assert not list(tmp_path.iterdir())
    assert table.row(3).sequences[0].tokens.tolist() == answer(4, 7).tokens.tolist()


def test_the_entry_used_longest_ago_goes_first(tmp_path: Path) -> None:
    for age, name in enumerate(("newest", "middle", "oldest")):
        write(tmp_path / name, rows_of("tokens"))
        os.utime(tmp_path / name / "about.json", (1e9 - age, 1e9 - age))
    opened(tmp_path / "oldest")
    one = token_cache.cache_size(tmp_path)[1] // 3
    assert evict(tmp_path, tmp_path / "newest", 2 * one + 100) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["newest", "oldest"]
    assert evict(tmp_path, tmp_path / "newest", 1) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["newest"]


def test_what_a_kill_left_goes_and_what_another_process_makes_stays(tmp_path: Path) -> None:
    for name in ("dead", "alive"):
        disk.stage(tmp_path / name)
    with entry_lock(tmp_path / "alive"):
        evict(tmp_path, tmp_path / "none")
    left = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert left == [f"{disk.STAGING}alive"]


def test_a_file_that_is_cut_while_it_is_read_is_an_error_with_a_message(tmp_path: Path) -> None:
    from soup_xb.core.errors import ResourceError

    write(tmp_path / "entry", rows_of("tokens"))
    table = opened(tmp_path / "entry")
    os.truncate(tmp_path / "entry" / "tokens", 12)
    with pytest.raises(ResourceError, match="cut while the run reads it"):
        table.row(5)


def test_the_command_shows_and_clears_what_is_kept(
    soupx: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "soupx" / "tokens").mkdir(parents=True)
    write(tmp_path / "soupx" / "tokens" / "entry", rows_of("tokens"))
    told = json.loads(soupx("cache", "--json").out)  # type: ignore[attr-defined]
    assert (told["entries"], told["cleared"]) == (1, False)
    assert "now deleted" in soupx("cache", "--clear").out  # type: ignore[attr-defined]
    assert token_cache.cache_size(tmp_path / "soupx" / "tokens") == (0, 0)
