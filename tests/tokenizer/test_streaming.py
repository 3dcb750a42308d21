"""Rows of a hub dataset over the network: which are read, in which order, and what is said when that fails."""

from __future__ import annotations

import gzip
import io
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import pytest
from hub_server import Hub, lines, serving, use

from soup_xb.core.config.schema import DataConfig
from soup_xb.core.errors import ConfigError, DataError
from soup_xb.core.random_numbers import permutation
from soup_xb.core.tasks import TASKS
from soup_xb.data.dataset import Dataset, load_dataset
from soup_xb.data.goal import Goal
from soup_xb.data.hub import HubStream, check_places, hub_rows

NAME = "owner/name"
FILES, ROWS = 20, 50


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The libraries' hub is a server of this machine, and every cache is this test's own."""
    with serving() as hub:
        use(hub, monkeypatch, tmp_path)
        yield hub


def path(number: int) -> str:
    return f"data/train-{number:05d}-of-{FILES:05d}.jsonl"


def texts() -> dict[str, bytes]:
    """Twenty files of fifty rows, each of which says where it stands."""
    return {path(file): lines([{"text": f"{file} {row}"} for row in range(ROWS)]) for file in range(FILES)}


def load(opened: Any, goal: Goal, task: str = "sft", seed: int = 42, **data: Any) -> Dataset:
    return load_dataset(
        DataConfig(**{"train": (NAME,), "streaming": True, **data}),
        opened("byte-level", None),
        seed,
        TASKS[task],
        goal,
    )


def read(dataset: Dataset, opened: Any) -> list[str]:
    """The text of every row."""
    decode = opened("byte-level", None).hf.decode
    return [decode(row.sequences[0].tokens, skip_special_tokens=True) for row in dataset.train]


def in_order(seed: int) -> list[int]:
    """The files in the order of a seed."""
    return [int(file) for file in permutation(FILES, "files", seed, NAME)]


def notice(dataset: Dataset, code: str) -> str:
    return next(notice.message for notice in dataset.notices if notice.code == code)


def test_of_twenty_files_those_that_the_steps_need_are_read_and_no_other_is_asked_for(hub, opened):
    hub.put(NAME, texts())
    dataset = load(opened, Goal("rows", ROWS + 10))
    first, second, *_ = in_order(42)
    expected = [(first, row) for row in range(ROWS)] + [(second, row) for row in range(10)]
    assert read(dataset, opened) == [f"{file} {row}" for file, row in expected]
    assert hub.opened == {path(first), path(second)}
    assert not [asked for asked in hub.asked for file in in_order(42)[2:] if asked.endswith(path(file))]
    assert notice(dataset, "streamed").startswith("rows of 2 of 20 files of commit ")
    assert str(dataset.train[ROWS].source) == f"{NAME}:{ROWS + 1}"


def test_a_second_start_asks_for_the_commit_alone(hub, opened):
    hub.put(NAME, texts())
    first = load(opened, Goal("rows", 60))
    hub.forget()
    second = load(opened, Goal("rows", 60))
    assert [asked for asked in hub.asked if "agent-harnesses" not in asked] == [f"GET /api/datasets/{NAME}"]
    assert not hub.served
    assert second.train.fingerprint == first.train.fingerprint
    assert "read from" in notice(second, "kept-tokens")
    assert notice(second, "streamed") == notice(first, "streamed")


def test_another_seed_reads_other_files_and_more_steps_read_on_in_the_same_ones(hub, opened):
    hub.put(NAME, texts())
    few, other = (load(opened, Goal("rows", 60), seed=seed) for seed in (42, 43))
    assert read(other, opened)[0] == f"{in_order(43)[0]} 0"
    many = load(opened, Goal("rows", 70))
    assert read(many, opened)[:60] == read(few, opened)
    assert len(many.train) == 70


def test_a_dataset_that_changes_has_other_rows_and_a_new_page_about_it_changes_none(hub, opened):
    files = texts()
    hub.put(NAME, files)
    before = load(opened, Goal("rows", 5))
    hub.put(NAME, {**files, "README.md": b"All about it.\n"})
    hub.forget()
    described = load(opened, Goal("rows", 5))
    assert hub.served, "another commit has an entry of its own"
    assert described.train.fingerprint == before.train.fingerprint
    hub.put(NAME, {name: data.replace(b" 3", b" three") for name, data in files.items()})
    assert load(opened, Goal("rows", 5)).train.fingerprint != before.train.fingerprint


def test_rows_with_nothing_to_learn_are_not_counted(hub, opened):
    rows = [{"prompt": "x", "completion": "" if row % 3 else str(row)} for row in range(90)]
    hub.put(NAME, {"train.jsonl": lines(rows)})
    dataset = load(opened, Goal("rows", 11))
    assert len(dataset.train) == 11
    assert dataset.train[10].source.line == 31
    assert notice(dataset, "rows-without-targets").startswith("20 rows left out")


def test_where_the_dataset_ends_before_the_steps_do_its_rows_are_seen_again(hub, opened):
    hub.put(NAME, {path(file): texts()[path(file)] for file in range(2)})
    dataset = load(opened, Goal("rows", 1000))
    assert len(dataset.train) == 2 * ROWS
    assert "holds 100 of the 1,000 rows that the steps ask for" in notice(dataset, "stream-ended")


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_documents_are_read_until_their_tokens_fill_the_steps(hub, opened, share):
    documents = [{"text": "Rome has a long history. " * (1 + row % 30)} for row in range(2000)]
    hub.put(NAME, {"train.jsonl": lines(documents)})
    goal = Goal("tokens", int(40 * 64 / (1 - share)), 64)
    dataset = load(opened, goal, "pretrain", max_length=64, val_split=share)
    assert len(dataset.train) >= 40 * (1 - share / 4)
    assert len(dataset.train) < 80
    assert bool(len(dataset.evaluation)) == bool(share)


def test_a_pair_counts_as_two_answers_where_answers_are_judged(hub, opened):
    pairs = [{"prompt": f"{row}?", "chosen": " Rome", "rejected": " Paris"} for row in range(60)]
    hub.put(NAME, {"train.jsonl": lines(pairs)})
    assert len(load(opened, Goal("answers", 24), "kto").train) == 24
    assert len(load(opened, Goal("rows", 24), "dpo").train) == 24


def test_prompts_that_the_model_answers_are_streamed_each_time(hub, opened):
    hub.put(NAME, {"train.jsonl": lines([{"prompt": f"{row}?"} for row in range(60)])})
    first, second = (load(opened, Goal("rows", 7), "grpo") for _ in range(2))
    assert len(first.train) == 7
    assert first.train.fingerprint == second.train.fingerprint


def parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer, row_group_size=10)
    return buffer.getvalue()


KINDS = {
    "train.csv": b"text\nRome\nParis\nOslo\n",
    "train.txt": b"Rome\nParis\nOslo\n",
    "train.parquet": parquet([{"text": "Rome"}, {"text": "Paris"}, {"text": "Oslo"}]),
    "train.jsonl.gz": gzip.compress(lines([{"text": "Rome"}, {"text": "Paris"}, {"text": "Oslo"}])),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_table_is_streamed(hub, opened, name):
    hub.put(NAME, {name: KINDS[name]})
    assert read(load(opened, Goal("rows", 2)), opened) == ["Rome", "Paris"]


def test_streamed_rows_are_those_of_the_downloaded_dataset(hub, tmp_path, monkeypatch):
    """Here the arguments of calls are of several types, which the library keeps as JSON text in between."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    calls = [{"function": {"name": "f", "arguments": value}} for value in ({"a": 1}, {"b": "t"}, "{}")]
    rows = [{"messages": [{"role": "assistant", "tool_calls": [call]}], "id": 1} for call in calls]
    hub.put(NAME, {"train.jsonl": lines([*rows, {"messages": [], "id": "x"}])})
    streamed = [row for _, row in HubStream(NAME, None, "train", 42).rows()]
    assert streamed == [row for _, row in hub_rows(NAME, None, "train")]
    assert streamed[1]["messages"][0]["tool_calls"][0]["function"]["arguments"] == {"b": "t"}


def test_no_file_that_a_row_names_is_opened(hub, tmp_path):
    described = "---\ndataset_info:\n  features:\n  - {name: text, dtype: string}\n"
    described += "  - {name: seen, dtype: image}\n  - name: all\n    list: image\n---\n"
    picture = {"bytes": None, "path": str(tmp_path / "nowhere.png")}
    row = {"text": "Rome", "seen": picture, "all": [picture]}
    hub.put(NAME, {"README.md": described.encode(), "train.parquet": parquet([row])})
    assert [found for _, found in HubStream(NAME, None, "train", 42).rows()] == [row]


def test_two_starts_at_once_read_the_rows_once(hub, opened):
    hub.put(NAME, texts())
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: load(opened, Goal("rows", 60)), range(2)))
    assert found[0].train.fingerprint == found[1].train.fingerprint
    assert sorted("read from" in notice(one, "kept-tokens") for one in found) == [False, True]


def refused(opened: Any, goal: Goal | None = None, **data: Any) -> tuple[str, str]:
    with pytest.raises((DataError, ConfigError)) as caught:
        load(opened, goal or Goal("rows", 5), **data)
    problem = caught.value.problems[0]
    return problem.code, problem.message


def test_archives_that_may_hold_pickles_are_refused(hub, opened):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        entry = tarfile.TarInfo("weights.pth")
        entry.size = 2
        archive.addfile(entry, io.BytesIO(b"xx"))
    hub.put(NAME, {"train.tar": buffer.getvalue()})
    assert refused(opened)[0] == "dataset-kind"


def card(files: str) -> bytes:
    return f"---\nconfigs:\n- config_name: default\n  data_files: {files}\n---\n".encode()


@pytest.mark.parametrize("place", ["hf://datasets/owner/other/train.jsonl", "{here}/mine.jsonl"])
def test_a_dataset_may_not_lead_to_files_elsewhere(hub, opened, tmp_path, place):
    (tmp_path / "mine.jsonl").write_bytes(lines([{"text": "a secret"}]))
    hub.put("owner/other", {"train.jsonl": lines([{"text": "a"}])})
    hub.put(NAME, {"README.md": card(place.format(here=tmp_path)), "train.jsonl": lines([{"text": "a"}])})
    code, message = refused(opened)
    assert code == "stream-unreadable"
    assert f"Data files don't belong to {NAME}" in message


@pytest.mark.parametrize(
    "file", ["/etc/passwd", "https://example.org/a.csv", "hf://datasets/owner/name@other/a.csv"]
)
def test_files_elsewhere_are_refused_whatever_the_library_thinks_of_them(file):
    inside = f"hf://datasets/{NAME}@abc/a.csv"
    check_places([inside], NAME, "abc")
    with pytest.raises(DataError, match="outside of the dataset"):
        check_places([inside, file], NAME, "abc")


def test_a_split_is_read_by_itself(hub, opened):
    """The library would look into the first split for the types of the columns, whichever is asked for."""
    hub.put(
        NAME, {"train.jsonl": lines([{"text": "a"}]), "test.jsonl": lines([{"text": "b"}, {"text": "c"}])}
    )
    dataset = load(opened, Goal("rows", 2), split="test")
    assert read(dataset, opened) == ["b", "c"]
    assert hub.opened == {"test.jsonl"}


def test_what_the_dataset_does_not_have_is_named(hub, opened):
    hub.put(NAME, texts())
    assert refused(opened, split="test") == ("split-missing", "has no split `test`; it has train")
    assert refused(opened, split="train[:10%]")[0] == "split-missing"
    assert refused(opened, subset="small")[0] == "stream-unreadable"
    assert refused(opened, train=("owner/other",))[0] == "dataset-not-on-hub"


def test_a_name_that_is_a_folder_here_is_not_streamed(hub, opened, tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert refused(opened)[0] == "streaming-local-data"
    assert not hub.asked


def test_a_hub_that_falls_silent_ends_the_start_and_nothing_is_kept_by_halves(
    hub, opened, monkeypatch, tmp_path
):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.put(NAME, texts())
    second = path(in_order(42)[1])
    hub.broken[second] = 10_000
    code, message = refused(opened, Goal("rows", 60))
    assert (code, message.partition(":")[0]) == ("stream-broken", "the hub stopped answering after row 50")
    assert not list((tmp_path / "cache" / "soupx" / "tokens").glob("*/about.json"))
    # The library tries again by itself, which is enough where the hub is back soon.
    hub.broken[second] = 1
    assert len(load(opened, Goal("rows", 60)).train) == 60


def test_without_a_network_rows_that_are_kept_are_found_by_the_commit_told_last(hub, opened):
    commit = hub.put(NAME, texts())
    first = load(opened, Goal("rows", 60))
    hub.silent = True
    second = load(opened, Goal("rows", 60))
    assert second.train.fingerprint == first.train.fingerprint
    assert f"the commit that it told last is taken, {commit[:12]}" in notice(second, "hub-silent")
    assert refused(opened, train=("owner/other",))[0] == "hub-unreachable"


def test_a_damaged_file_is_told_with_the_row_before_it(hub, opened):
    files = texts()
    second = path(in_order(42)[1])
    hub.put(NAME, {**files, second: b'{"text": \n{{{'})
    code, message = refused(opened, Goal("rows", 60))
    assert code == "stream-unreadable"
    assert message.startswith("cannot be read after row 50: ")
