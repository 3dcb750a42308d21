"""`soupx migrate`: the config on stdout or in a file, the account on stderr or as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Soupx = Callable[..., Any]
AXOLOTL = """\
base_model: Qwen/Qwen3-1.7B
datasets:
  - path: rows.jsonl
    type: chat_template
adapter: lora
lora_r: 16
lora_alpha: 32
lora_target_linear: true
micro_batch_size: 2
num_epochs: 1
learning_rate: 2e-4
wandb_project: secret
fp16: true
"""


@pytest.fixture(autouse=True)
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs.yml").write_text(AXOLOTL)
    return tmp_path / "theirs.yml"


def test_the_config_goes_to_stdout_and_the_account_to_stderr(soupx: Soupx, tmp_path: Path) -> None:
    answer = soupx("migrate", "theirs.yml")
    assert answer.code == 0
    (tmp_path / "soup.yaml").write_text(answer.out)
    assert soupx("check").code == 0
    assert answer.err.startswith("theirs.yml: axolotl, ")
    assert "     9  micro_batch_size -> training.batch_size: 2   (" in answer.err
    assert "        training.weight_decay: 0.0   (axolotl's default)" in answer.err
    assert "    13  fp16: not available: gradients overflow" in answer.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["soup.yaml", "theirs.yml"]


def test_a_file_is_written_and_never_overwritten(soupx: Soupx, tmp_path: Path) -> None:
    answer = soupx("migrate", "theirs.yml", "--output", "soup.yaml")
    assert (answer.code, answer.out) == (0, "")
    assert answer.err.endswith("wrote soup.yaml\nnext: soupx plan soup.yaml\n")
    (tmp_path / "soup.yaml").write_text("mine")
    assert soupx("migrate", "theirs.yml", "--output", "soup.yaml").code == 2
    assert (tmp_path / "soup.yaml").read_text() == "mine"
    assert soupx("migrate", "theirs.yml", "--output", "soup.yaml", "--force").code == 0
    assert soupx("check").code == 0


def test_json_holds_the_whole_account(soupx: Soupx) -> None:
    found = json.loads(soupx("migrate", "theirs.yml", "--json").out)
    assert set(found) == {"from", "file", "output", "config", "carried", "added", "left", "check"}
    assert (found["from"], found["output"], found["check"]["ok"]) == ("axolotl", None, True)
    assert {"key", "line", "to", "value", "note"} == set(found["carried"][0])
    assert {"key", "line", "reason"} == set(found["left"][0])


def test_what_the_check_refuses_in_the_result_is_a_warning(soupx: Soupx, theirs: Path) -> None:
    theirs.write_text(AXOLOTL + "rl: grpo\n")
    answer = soupx("migrate", "theirs.yml", "--output", "soup.yaml")
    assert answer.code == 0
    assert "warning[missing-key] soup.yaml: training.rewards" in answer.err
    assert "next: soupx check soup.yaml" in answer.err


@pytest.mark.parametrize(
    ("content", "code"),
    [("a: b\n", "migrate-unknown"), ("# " + "x" * 300_000, "config-too-large"), ("a: [\n", "yaml-syntax")],
)
def test_a_file_that_cannot_be_migrated_exits_2(soupx: Soupx, theirs: Path, content: str, code: str) -> None:
    theirs.write_text(content)
    answer = soupx("migrate", "theirs.yml", "--output", "soup.yaml")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith(f"error[{code}] theirs.yml")
    assert not theirs.with_name("soup.yaml").exists()


def test_a_missing_file_exits_2(soupx: Soupx) -> None:
    assert soupx("migrate", "none.yml").err.startswith("error[config-not-found] none.yml")


def test_it_imports_no_framework(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom soup_xb.cli import run\n"
        "try:\n    run()\nexcept SystemExit as stopped:\n    assert stopped.code in (0, None)\n"
        "assert not {'torch', 'transformers', 'mlx', 'numpy', 'rich'} & sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "migrate", "theirs.yml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
