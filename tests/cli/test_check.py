"""`soupx check`, `schema` and `features`: streams, exit codes and the shape of errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Soupx = Callable[..., Any]
LEAST = "base: tiny\ndata:\n  train: rows.jsonl\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "soup.yaml").write_text(LEAST, "utf-8")
    return tmp_path


def test_a_good_file_gives_a_short_summary_and_touches_nothing(folder: Path, soupx: Soupx) -> None:
    answer = soupx("check")
    assert answer.code == 0
    assert answer.out.startswith("soup.yaml: ok · sft on torch · tiny\n")
    assert answer.err == ""
    assert [entry.name for entry in folder.iterdir()] == ["soup.yaml"]


def test_the_file_may_be_named_in_two_ways(folder: Path, soupx: Soupx) -> None:
    (folder / "other.yaml").write_text(LEAST, "utf-8")
    assert soupx("check", "other.yaml").out == soupx("check", "--config", "other.yaml").out
    assert soupx("check", "other.yaml").out.startswith("other.yaml: ok")


def test_warnings_go_to_stderr_and_leave_the_exit_code(folder: Path, soupx: Soupx) -> None:
    answer = soupx("check", "--set", "training.max_steps=5", "--set", "training.epochs=2")
    assert answer.code == 0
    assert answer.err.startswith("warning[key-without-effect] command line: training.epochs: ")
    assert "5 steps" in answer.out


def test_json_holds_the_resolved_config(folder: Path, soupx: Soupx) -> None:
    answer = soupx("check", "--json", "--set", "training.max_steps=5", "--set", "training.epochs=2")
    result = json.loads(answer.out)
    assert (answer.code, result["ok"], result["backend"]["name"]) == (0, True, "torch")
    assert result["config"]["training"]["lr"] == 2e-4
    assert [warning["code"] for warning in result["warnings"]] == ["key-without-effect"]


def test_json_holds_the_problems_and_the_exit_code_stays(folder: Path, soupx: Soupx) -> None:
    answer = soupx("check", "--json", "--set", "training.lr=fast", "--set", "base=5")
    result = json.loads(answer.out)
    assert (answer.code, result["ok"]) == (2, False)
    assert {problem["where"] for problem in result["problems"]} == {
        "command line: training.lr",
        "command line: base",
    }
    assert answer.err.startswith("error[")


def test_the_backend_option_wins_over_the_file(folder: Path, soupx: Soupx) -> None:
    (folder / "soup.yaml").write_text(LEAST + "backend: torch\n", "utf-8")
    answer = soupx("check", "--backend", "mlx", "--set", "training.relora_steps=5")
    assert answer.code == 2
    assert answer.err.count("error[mlx-no-relora]") == 1
    assert soupx("check").code == 0


ERRORS = [
    ("", "config-empty", "the file is empty"),
    ("- base\n", "not-a-mapping", "got a list"),
    ("base:\n\t- x\n", "yaml-syntax", "a tab is used"),
    ('base: "x\n', "yaml-syntax", "a quote is opened and never closed"),
    ("base: [x\n", "yaml-syntax", "a `[` is opened"),
    ("base: x\ndata:\n  train: x\nbase: y\n", "duplicate-key", "lines 1 and 4"),
    ("base: !!python/name:os.system\n", "yaml-tag", "not allowed"),
    ("a: &a [1]\nb: *a\n", "yaml-alias", "not allowed"),
    ("a: " + "[" * 3000, "yaml-too-deep", "32 deep"),
    ("training: {learing_rate: 1}\n", "unknown-key", "did you mean `lr`?"),
    ("training: {lr: -1}\n", "out-of-range", "above 0"),
    ("training: {lr: .inf}\n", "not-finite", "finite"),
    ("training: {batch_size: '4'}\n", "wrong-type", "write it without quotes"),
    ("training: {lora: {r: 1.9}}\n", "wrong-type", "got 1.9"),
    ("training: {lora: {rank_pattern: {q_proj: true}}}\n", "wrong-type", "got true"),
    ("training: {lora: {init_strategy: pizza}}\n", "unknown-choice", "did you mean `pissa`?"),
    ("training: {lora: {use_olora: true, init_strategy: pissa}}\n", "contradiction", "line 1"),
]


@pytest.mark.parametrize(
    ("text", "code", "part"), ERRORS, ids=[f"{code}-{part}"[:30] for _, code, part in ERRORS]
)
def test_a_bad_file_exits_2_with_one_shape_of_error(
    folder: Path, soupx: Soupx, text: str, code: str, part: str
) -> None:
    (folder / "soup.yaml").write_text(text, "utf-8")
    answer = soupx("check")
    assert answer.code == 2
    assert answer.out == ""
    assert f"error[{code}] soup.yaml" in answer.err
    assert part in answer.err
    assert "Traceback" not in answer.err


def test_a_missing_file_a_folder_and_a_large_file_exit_2(folder: Path, soupx: Soupx) -> None:
    (folder / "large.yaml").write_bytes(b"#" * 100_000_000)
    for name, code in (
        ("none.yaml", "config-not-found"),
        (".", "config-is-folder"),
        ("large.yaml", "config-too-large"),
    ):
        answer = soupx("check", name)
        assert answer.code == 2
        assert answer.err.startswith(f"error[{code}] {name}: ")


def test_a_misspelled_file_name_asks_for_the_near_one(folder: Path, soupx: Soupx) -> None:
    assert "did you mean `soup.yaml`?" in soupx("check", "soup.yml").err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_exits_7(folder: Path, soupx: Soupx) -> None:
    (folder / "soup.yaml").chmod(0)
    assert soupx("check").code == 7


def test_bad_overrides_are_told_with_the_rest(folder: Path, soupx: Soupx) -> None:
    answer = soupx("check", "--set", "lr=", "--set", "a", "--set", "training.lora.rr=8")
    assert answer.code == 2
    assert answer.err.count("error[override]") == 2
    assert "did you mean `training.lora.r`?" in answer.err


def test_a_schema_is_printed_as_json(soupx: Soupx) -> None:
    answer = soupx("schema")
    assert answer.code == 0
    assert json.loads(answer.out)["properties"]["training"]["properties"]["lr"]["exclusiveMinimum"] == 0


def test_features_show_answers_and_reasons(soupx: Soupx) -> None:
    answer = soupx("features")
    assert answer.code == 0
    assert "training.lora.use_vera" in answer.out
    assert "mlx-lm has no VeRA layer" in answer.out


def test_features_of_one_backend_leave_the_other_out(soupx: Soupx) -> None:
    text = soupx("features", "--backend", "torch").out
    assert "mlx:" not in text.replace("backend: mlx", "")
    rows = json.loads(soupx("features", "--backend", "torch", "--json").out)["features"]
    assert all("torch" in row and "mlx" not in row for row in rows)


def test_the_installed_command_answers_as_the_module_does(folder: Path) -> None:
    (folder / "bad.yaml").write_text("base: 5\n", "utf-8")
    for name, code in (("soup.yaml", 0), ("bad.yaml", 2), ("none.yaml", 2)):
        done = subprocess.run(
            [sys.executable, "-m", "soup_xb", "check", name],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
