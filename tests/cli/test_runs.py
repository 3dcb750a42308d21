from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from soup_xb.core.run.events import StepEvent
from soup_xb.core.run.folder import RunRecord, open_run_folder

RECORD = RunRecord(
    status="finished",
    backend="torch",
    base="org/base",
    config={},
    versions={},
    seed=1,
    total_steps=3,
    steps=3,
    started="2026-03-04T10:22:33+00:00",
    ended="2026-03-04T10:24:33+00:00",
    version="0.1.0",
)
OWNER = """
import sys, time
from pathlib import Path
from soup_xb.core.run.folder import open_run_folder
with open_run_folder(Path(sys.argv[1]), resume=True):
    print("held", flush=True)
    time.sleep(60)
"""


def leave(path: Path, record: RunRecord = RECORD, steps: int = 3) -> None:
    with open_run_folder(path) as folder:
        folder.write_record(record)
        for number in range(1, steps + 1):
            folder.record_event(StepEvent(number, 3 / number, 1e-4, 1.0, 9, 10, 0.1))


def soupx(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "soup_xb", "runs", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
    )


def listed(*arguments: str, cwd: Path) -> dict[str, dict[str, Any]]:
    done = soupx("--json", *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return {run["path"]: run for run in json.loads(done.stdout)}


def test_runs_below_here_are_listed_with_how_they_went(tmp_path: Path) -> None:
    leave(tmp_path / "out")
    leave(
        tmp_path / "deep" / "er" / "out", evolve(RECORD, status="interrupted", ended=None, steps=1), steps=2
    )
    done = soupx(cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        "folder       status       backend  base      steps  loss    when",
        "deep/er/out  interrupted  torch    org/base  2/3    1.5000  2026-03-04 10:22",
        "out          finished     torch    org/base  3/3    1.0000  2026-03-04 10:24",
    ]


def test_the_json_has_these_keys(tmp_path: Path) -> None:
    leave(tmp_path / "out")
    assert listed(cwd=tmp_path)["out"] == {
        "path": "out",
        "status": "finished",
        "backend": "torch",
        "base": "org/base",
        "steps": 3,
        "total_steps": 3,
        "loss": 1.0,
        "started": "2026-03-04T10:22:33+00:00",
        "ended": "2026-03-04T10:24:33+00:00",
        "problem": None,
    }


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "\x00", "[" * 100_000])
def test_a_damaged_record_is_listed_as_damaged(tmp_path: Path, text: str) -> None:
    leave(tmp_path / "out")
    (tmp_path / "out" / "run.json").write_text(text)
    run = listed(cwd=tmp_path)["out"]
    assert (run["status"], run["backend"], run["loss"]) == ("damaged", None, 1.0)
    assert run["problem"]
    done = soupx(cwd=tmp_path)
    assert done.returncode == 0
    assert "damaged" in done.stdout
    assert "note: out: " in done.stderr
    assert "Traceback" not in done.stderr


def test_what_somebody_wrote_into_a_record_is_made_legible(tmp_path: Path) -> None:
    token = "hf_" + "aB3d" * 9
    leave(tmp_path / "out", evolve(RECORD, status="failed", base=token, error=f"{token}\nnext"))
    text = (tmp_path / "out" / "run.json").read_text()
    (tmp_path / "out" / "run.json").write_text(text.replace("2026-03-04T10:24:33+00:00", "\\ud800"))
    run = listed(cwd=tmp_path)["out"]
    assert (run["base"], run["ended"], run["problem"]) == ("…", "\\ud800", "…\nnext")
    assert token not in soupx(cwd=tmp_path).stdout + soupx(cwd=tmp_path).stderr


def test_a_run_whose_owner_is_dead_has_died_and_one_with_a_live_owner_runs(tmp_path: Path) -> None:
    leave(tmp_path / "out", evolve(RECORD, status="running", ended=None))
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == "held\n"
    assert listed(cwd=tmp_path)["out"]["status"] == "running"
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    run = listed(cwd=tmp_path)["out"]
    assert run["status"] == "died"
    assert "--resume" in run["problem"]


def test_hidden_linked_and_very_deep_folders_are_not_entered(tmp_path: Path) -> None:
    here = tmp_path / "here"
    leave(here / "out")
    for name in (".venv/out", "node_modules/out", "a/b/c/d/e/f/g"):
        leave(here / name)
    leave(tmp_path / "elsewhere" / "out")
    (here / "link").symlink_to(tmp_path / "elsewhere")
    (here / "loop").symlink_to(here)
    assert list(listed(cwd=here)) == ["out"]


def test_named_folders_are_looked_at_and_each_run_is_listed_once(tmp_path: Path) -> None:
    leave(tmp_path / "a" / "out")
    leave(tmp_path / "b")
    assert list(listed("a", "a/out", "b", cwd=tmp_path)) == ["a/out", "b"]


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    done = soupx("nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error[no-such-folder] nowhere: no such folder")


def test_no_runs_is_said_on_stderr_and_is_an_empty_list_in_json(tmp_path: Path) -> None:
    done = soupx(cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "no runs found\n")
    assert listed(cwd=tmp_path) == {}


def test_escape_sequences_in_names_do_not_reach_the_terminal(tmp_path: Path) -> None:
    leave(tmp_path / "red\x1b[31m", evolve(RECORD, base="b\x1b[0m\nase"))
    done = soupx(cwd=tmp_path)
    assert "\x1b" not in done.stdout
    assert len(done.stdout.splitlines()) == 2


def test_listing_writes_nothing(tmp_path: Path) -> None:
    leave(tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    soupx(cwd=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
