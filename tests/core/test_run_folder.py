from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from soup_xb.core.errors import CheckpointError, ConfigError, Problem, ResourceError
from soup_xb.core.run.checkpoint import CheckpointFacts, read_checkpoint, write_checkpoint
from soup_xb.core.run.events import (
    EvalEvent,
    Notice,
    RestartEvent,
    SaveEvent,
    StepEvent,
    last_step,
    losses_until,
    read_events,
)
from soup_xb.core.run.folder import RunFolder, RunRecord, open_run_folder, read_record

RECORD = RunRecord(
    status="running",
    backend="torch",
    base="org/base",
    config={"training": {"lr": 1e-4}},
    versions={"torch": "2.13.0"},
    seed=42,
    total_steps=120,
    started="2026-03-04T10:22:33+00:00",
    version="0.1.0",
)


def step(number: int, loss: float = 1.5) -> StepEvent:
    return StepEvent(number, loss, 1e-4, 0.5, 90, 100, 0.25)


def leave_a_run(path: Path) -> None:
    with open_run_folder(path) as folder:
        folder.write_record(RECORD)
        folder.record_event(step(1))
        folder.adapter.mkdir()
        (folder.adapter / "adapter_config.json").write_text("{}")
        folder.report.write_text("<p>")
        write_checkpoint(
            folder.checkpoints,
            1,
            lambda inner: (inner / "x").touch(),
            CheckpointFacts("torch", 1, "c", "d", {}),
        )


def refusal(action: Callable[[], Any]) -> Problem:
    with pytest.raises(ResourceError) as caught:
        action()
    assert caught.value.exit_code == 7
    (problem,) = caught.value.problems
    return problem


def test_a_new_folder_is_made_with_its_parents_and_left_without_a_lock(tmp_path: Path) -> None:
    with open_run_folder(tmp_path / "a" / "out") as folder:
        assert folder.path.is_dir()
        assert (folder.adapter, folder.checkpoints) == (folder.path / "adapter", folder.path / "checkpoints")
        assert (folder.report, folder.metrics) == (folder.path / "report.html", folder.path / "metrics.jsonl")
        assert folder.notices == ()
    assert list((tmp_path / "a" / "out").iterdir()) == []


def test_a_folder_that_holds_a_run_is_refused_with_both_ways_out(tmp_path: Path) -> None:
    leave_a_run(tmp_path / "out")
    problem = refusal(lambda: open_run_folder(tmp_path / "out"))
    assert problem.code == "output-holds-a-run"
    assert problem.where == str(tmp_path / "out")
    assert "--resume" in problem.help
    assert "--overwrite" in problem.help
    with open_run_folder(tmp_path / "out", resume=True) as folder:
        assert read_record(folder.path) == RECORD


def test_each_thing_that_a_run_leaves_marks_the_folder_as_taken(tmp_path: Path) -> None:
    for name in ("run.json", "metrics.jsonl", "report.html", "adapter", "checkpoints"):
        path = tmp_path / f"only-{name}"
        leave_a_run(path)
        for other in list(path.iterdir()):
            if other.name != name:
                other.rename(tmp_path / f"away-{name}-{other.name}")
        problem = refusal(lambda path=path: open_run_folder(path))
        assert f"(`{name}`)" in problem.message


def test_a_folder_with_foreign_files_alone_is_used(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "adapter").mkdir()
    open_run_folder(tmp_path).close()


def test_overwrite_removes_what_a_run_left_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    leave_a_run(out)
    (out / "notes.txt").write_text("mine")
    (out / "checkpoints" / "notes.txt").write_text("mine")
    (out / ".trash-mine").mkdir()
    (out / ".replaced-adapter").mkdir()
    (out / ".run.json.tmp").write_text("half")
    with open_run_folder(out, overwrite=True):
        pass
    assert sorted(path.name for path in out.iterdir()) == [".trash-mine", "checkpoints", "notes.txt"]
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["adapter", "checkpoints"])
def test_overwrite_follows_no_link(tmp_path: Path, name: str) -> None:
    leave_a_run(tmp_path / "precious")
    out = tmp_path / "out"
    out.mkdir()
    (out / name).symlink_to(tmp_path / "precious" / name)
    (out / "run.json").write_text("{}")
    problem = refusal(lambda: open_run_folder(out, overwrite=True))
    assert problem.code == "not-from-a-run"
    assert (out / "run.json").exists()
    assert (tmp_path / "precious" / "adapter" / "adapter_config.json").exists()
    read_checkpoint(tmp_path / "precious" / "checkpoints" / "step-00000001")


def test_overwrite_and_resume_contradict(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exclude each other"):
        open_run_folder(tmp_path, overwrite=True, resume=True)


@pytest.mark.parametrize("below", ["", "out"])
def test_an_output_that_is_a_file_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    assert refusal(lambda: open_run_folder(tmp_path / "file" / below)).code == "output-is-file"


UNPRIVILEGED = """
import os, sys
from pathlib import Path
from soup_xb.core.errors import ResourceError
from soup_xb.core.run.folder import open_run_folder
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
for name in ("inside", "."):
    try:
        open_run_folder(Path(sys.argv[1]) / name)
    except ResourceError as error:
        print(error.problems[0].code)
"""


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o555)
    done = subprocess.run(
        [sys.executable, "-c", UNPRIVILEGED, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == ["not-writable", "not-writable"], done.stderr


def test_space_is_checked_against_the_disk(tmp_path: Path) -> None:
    with open_run_folder(tmp_path / "out") as folder:
        folder.check_space(1)
        problem = refusal(lambda: folder.check_space(2**60))
    assert problem.code == "disk-full"
    assert "this write needs 1048576.0 TiB" in problem.message
    assert problem.where == str(tmp_path / "out")


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    with open_run_folder(tmp_path) as folder:
        folder.write_record(RECORD)
        assert read_record(tmp_path) == RECORD
        ended = evolve(RECORD, status="finished", steps=120, ended="2026-03-04T10:30:00+00:00", error=None)
        folder.write_record(ended)
    assert read_record(tmp_path / "run.json") == ended
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json"]


def test_the_record_has_the_documented_keys(tmp_path: Path) -> None:
    with open_run_folder(tmp_path) as folder:
        folder.write_record(evolve(RECORD, tokens_per_second=float("inf")))
    assert json.loads((tmp_path / "run.json").read_text()) == {
        "status": "running",
        "backend": "torch",
        "base": "org/base",
        "steps": 0,
        "total_steps": 120,
        "train_seconds": 0.0,
        "tokens_per_second": None,
        "config": {"training": {"lr": 1e-4}},
        "versions": {"torch": "2.13.0"},
        "seed": 42,
        "started": "2026-03-04T10:22:33+00:00",
        "version": "0.1.0",
        "peak_memory_bytes": 0,
        "ended": None,
        "error": None,
    }


def test_files_get_the_mode_of_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        with open_run_folder(tmp_path / "out") as folder:
            folder.write_record(RECORD)
            folder.record_event(step(1))
    finally:
        os.umask(previous)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert modes == {"run.json": 0o640, "metrics.jsonl": 0o640}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"status": "running"}', "\x00\x01", "[" * 100_000, "null"],
)
def test_a_damaged_record_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        read_record(tmp_path)
    (problem,) = caught.value.problems
    assert (problem.code, problem.where) == ("run-record-damaged", str(tmp_path / "run.json"))


@pytest.mark.parametrize(
    ("key", "value"), [("status", "flying"), ("steps", "3"), ("seed", True), ("config", []), ("base", None)]
)
def test_a_record_with_another_type_is_damaged(tmp_path: Path, key: str, value: object) -> None:
    with open_run_folder(tmp_path) as folder:
        folder.write_record(RECORD)
    content = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**content, key: value}))
    with pytest.raises(CheckpointError, match=key):
        read_record(tmp_path)


EVENTS = [
    step(1),
    EvalEvent(1, 1.4, 4.06, 33, 0.5),
    RestartEvent(1, 1000, 900, 1.5, 2.5),
    SaveEvent(1, "out/checkpoints/step-00000001", 123, 0.5),
    Notice(Problem("a-code", "a message", "a place", "a cure"), warning=True),
]


def test_every_event_is_one_line_of_the_documented_shape(tmp_path: Path) -> None:
    with open_run_folder(tmp_path) as folder:
        for event in EVENTS:
            folder.record_event(event)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [
        '{"event":"step","step":1,"loss":1.5,"learning_rate":0.0001,"grad_norm":0.5,'
        '"target_tokens":90,"tokens":100,"seconds":0.25}',
        '{"event":"eval","step":1,"loss":1.4,"perplexity":4.06,"target_tokens":33,"seconds":0.5}',
        '{"event":"restart","step":1,"entries":1000,"pruned":900,"loss_before":1.5,"loss_after":2.5}',
        '{"event":"save","step":1,"path":"out/checkpoints/step-00000001","bytes":123,"seconds":0.5}',
        '{"event":"notice","step":1,"code":"a-code","message":"a message","where":"a place",'
        '"help":"a cure","warning":true}',
    ]
    assert list(read_events(tmp_path / "metrics.jsonl")) == EVENTS


def test_a_line_is_there_for_a_reader_before_the_folder_is_closed(tmp_path: Path) -> None:
    with open_run_folder(tmp_path) as folder:
        folder.record_event(step(1))
        assert read_events(folder.metrics) == (step(1),)


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path: Path) -> None:
    with open_run_folder(tmp_path) as folder:
        folder.record_event(step(1, float("nan")))
        folder.record_event(EvalEvent(1, 900.0, float("inf"), 1, 0.1))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    strict = [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in lines]
    assert strict[0]["loss"] is None
    assert strict[1]["perplexity"] is None
    (first, _) = read_events(tmp_path / "metrics.jsonl")
    assert isinstance(first, StepEvent)
    assert first.loss != first.loss


def resume_at(path: Path, done: int) -> RunFolder:
    folder = open_run_folder(path, resume=True)
    folder.truncate_metrics(done)
    return folder


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    with open_run_folder(tmp_path) as folder:
        for number in range(1, 8):
            folder.record_event(step(number))
            if number % 2 == 0:
                folder.record_event(EvalEvent(number, 1.0, 2.7, 3, 0.1))
    with resume_at(tmp_path, 4) as folder:
        for number in range(5, 9):
            folder.record_event(step(number))
    events = read_events(tmp_path / "metrics.jsonl")
    assert [event.step for event in events if isinstance(event, StepEvent)] == list(range(1, 9))
    assert [event.step for event in events if isinstance(event, EvalEvent)] == [2, 4]


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_last_line_is_dropped_on_resume(tmp_path: Path, cut: int) -> None:
    with open_run_folder(tmp_path) as folder:
        folder.record_event(step(1))
        folder.record_event(step(2))
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(whole[:-cut])
    assert read_events(tmp_path / "metrics.jsonl")[0] == step(1)
    with open_run_folder(tmp_path, resume=True) as folder:
        folder.record_event(Notice(Problem("resume", "going on")))
        folder.truncate_metrics(1)
        folder.record_event(step(2))
    assert read_events(tmp_path / "metrics.jsonl") == (
        step(1),
        Notice(Problem("resume", "going on")),
        step(2),
    )


def test_a_fresh_start_in_an_old_folder_drops_every_step(tmp_path: Path) -> None:
    leave_a_run(tmp_path)
    with resume_at(tmp_path, 0) as folder:
        folder.record_event(step(1, 9.0))
    assert read_events(tmp_path / "metrics.jsonl") == (step(1, 9.0),)


def test_damaged_lines_become_one_warning(tmp_path: Path) -> None:
    lines = ['{"event":"step"}', "[]", "{" * 100_000, '{"event":"dance","step":1}', "\x00"]
    with open_run_folder(tmp_path) as folder:
        folder.record_event(step(1))
    beyond = (tmp_path / "metrics.jsonl").read_text().replace('"loss":', f'"loss":1{"0" * 400},"was":')
    lines.append(beyond.strip())
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write("\n".join(lines) + "\n")
    first, warning = read_events(tmp_path / "metrics.jsonl")
    assert first == step(1)
    assert isinstance(warning, Notice) and warning.warning
    assert "the first is line 2" in warning.problem.message


@pytest.mark.parametrize("number", ["", ',"step":null', ',"step":"2"', ',"step":[]', ',"step":NaN'])
def test_a_notice_that_stands_nowhere_is_dropped_on_resume(tmp_path: Path, number: str) -> None:
    with open_run_folder(tmp_path) as folder:
        folder.record_event(step(1))
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        notice = '{"event":"notice","code":"a","message":"b","where":"","help":"","warning":true'
        stream.write(f"{notice}{number}}}\n")
    with open_run_folder(tmp_path, resume=True) as folder:
        folder.truncate_metrics(1)
    assert read_events(tmp_path / "metrics.jsonl") == (step(1),)


def test_the_last_step_is_found_behind_other_events(tmp_path: Path) -> None:
    with open_run_folder(tmp_path) as folder:
        for number in range(1, 1200):
            folder.record_event(step(number))
        folder.record_event(EVENTS[3])
    assert last_step(tmp_path / "metrics.jsonl") == step(1199)
    assert last_step(tmp_path / "nothing") is None


def test_the_last_losses_end_with_the_step_and_stop_at_a_gap(tmp_path: Path) -> None:
    with open_run_folder(tmp_path / "out") as folder:
        for number in (1, 2, 4, 5, 6, 7):
            folder.record_event(step(number, float(number)))
        metrics = folder.metrics
    assert losses_until(metrics, 6, 2) == (5.0, 6.0)
    assert losses_until(metrics, 6, 40) == (4.0, 5.0, 6.0)
    assert losses_until(metrics, 9, 40) == ()
