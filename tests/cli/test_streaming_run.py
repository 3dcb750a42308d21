"""`soupx train` on rows that it streams: what it asks the hub for, and that a resume asks for none of them again."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub, environment, lines, serving, use
from processes import free_ports

NAME = "owner/name"
WEIGHTS = Path("adapter") / "adapter_model.safetensors"


@pytest.fixture
def hub(chat_file: Path) -> Iterator[Hub]:
    """A dataset of twenty files of fifty conversations."""
    rows = [json.loads(line) for line in chat_file.read_text().splitlines()]
    with serving() as hub:
        hub.put(
            NAME, {f"data/train-{file:02d}.jsonl": lines(rows[file:] + rows[:file]) for file in range(20)}
        )
        yield hub


@pytest.fixture
def config(tmp_path: Path, tiny_llama: Path) -> Path:
    content = {
        "base": str(tiny_llama),
        "backend": "torch",
        "data": {"train": NAME, "streaming": True, "max_length": 128},
        "training": {"max_steps": 6, "batch_size": 10, "save_steps": 2, "lora": {"r": 4}},
        "output": str(tmp_path / "out"),
    }
    (tmp_path / "soup.yaml").write_text(json.dumps(content))
    return tmp_path / "soup.yaml"


def train(hub: Hub, config: Path, place: Path, *launcher: str) -> str:
    """Run the config in a process of its own, with caches and output in a place; gives what it said."""
    words = [sys.executable, *launcher, "-m", "soup_xb", "train", str(config), "--output", str(place / "out")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment(hub, place))
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_run_reads_two_files_of_twenty_and_says_so(
    hub: Hub, config: Path, tmp_path: Path, soupx: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(hub, monkeypatch, tmp_path)
    answer = soupx("train", config)
    assert answer.code == 0, answer.err
    said = answer.err
    assert len(hub.opened) == 2
    assert sum(hub.served.values()) < 0.2 * sum(map(len, hub.datasets[NAME].values()))
    assert "rows of 2 of 20 files of commit" in said
    assert "60 rows, 6 steps" in said


def test_a_resume_reads_no_row_again_and_a_changed_dataset_is_refused(
    hub: Hub, config: Path, tmp_path: Path, soupx: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(hub, monkeypatch, tmp_path)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert soupx("train", config, "--output", whole).code == 0
    hub.forget()
    resume = ("train", config, "--resume-from", whole / "checkpoints" / "step-00000002", "--output")
    answer = soupx(*resume, cut)
    assert answer.code == 0, answer.err
    assert not hub.served
    assert (cut / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    hub.put(NAME, {path: data.replace(b"Sure", b"Yes") for path, data in hub.datasets[NAME].items()})
    answer = soupx(*resume, tmp_path / "other")
    assert answer.code == 5
    assert "error[changed-data]" in answer.err


@pytest.mark.slow
def test_of_two_processes_one_reads_the_rows_and_both_have_them(
    hub: Hub, config: Path, tmp_path: Path
) -> None:
    served, losses = [], []
    (port,) = free_ports(1)
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port))
    for place, words in ((tmp_path / "one", ()), (tmp_path / "two", launcher)):
        hub.forget()
        train(hub, config, place, *words)
        served.append(dict(hub.served))
        events = map(json.loads, (place / "out" / "metrics.jsonl").read_text().splitlines())
        losses.append([event["loss"] for event in events if event["event"] == "step"])
    assert served[0] == served[1]
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
