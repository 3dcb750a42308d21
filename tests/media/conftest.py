"""Rows with pictures and sounds, the files beside them, and what a config makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from media_bases import save_picture, save_tone

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220)}
PITCHES = {"low": 220, "middle": 440, "high": 880}


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Rows of one picture, of two, and of none, of several sizes."""
    for index, colour in enumerate(COLOURS):
        save_picture(tmp_path / "img" / f"{colour}.png", COLOURS[colour], (32 + 16 * index, 40))

    def row(names: list[str], question: str, answer: str) -> dict[str, Any]:
        parts = [{"type": "image", "path": f"img/{name}.png"} for name in names]
        turn = [*parts, {"type": "text", "text": question}]
        return {"messages": [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]}

    rows = [row([name], "Which colour?", f"It is {name}.") for name in COLOURS]
    rows += [row(["red", "blue"], "Alike?", "No, red and blue."), row([], "Who are you?", "A model.")]
    return write_rows(tmp_path / "pictures.jsonl", rows)


@pytest.fixture
def tones(tmp_path: Path) -> Path:
    """Transcripts of tones."""
    for name, pitch in PITCHES.items():
        save_tone(tmp_path / "snd" / f"{name}.wav", pitch)
    rows = [{"audio": f"snd/{name}.wav", "text": f"a {name} tone"} for name in PITCHES]
    return write_rows(tmp_path / "tones.jsonl", rows * 2)


@pytest.fixture
def config(tmp_path: Path, media_base: Callable[[str], Path]) -> Callable[..., Path]:
    """`config(base, task, rows, training={…}, lora={…})` writes a config and gives its path."""

    def write(name: str, task: str, rows: Path, lora: Any = None, **training: Any) -> Path:
        content = {
            "base": str(media_base(name)),
            "task": task,
            "backend": "torch",
            "data": {"train": str(rows), "max_length": 256},
            "training": {
                "max_steps": 4,
                "batch_size": 2,
                "lr": 1e-2,
                "lora": {"r": 3, **(lora or {})},
                **training,
            },
            "output": str(tmp_path / "out"),
        }
        file = tmp_path / "soup.yaml"
        file.write_text(json.dumps(content))
        return file

    return write


@pytest.fixture
def opened() -> Callable[[Path], AbstractContextManager[Any]]:
    """`with opened(config) as run`: base and rows opened, adapters on."""
    from soup_xb.core.config.load import load_config
    from soup_xb.runs.open import open_run

    @contextmanager
    def open_it(file: Path) -> Iterator[Any]:
        with open_run(load_config(file), ("torch", "asked")) as run:
            run.session.attach(run.plan.adapters)
            yield run

    return open_it
