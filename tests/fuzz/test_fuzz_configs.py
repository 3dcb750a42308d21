"""No config text does anything but load or be refused in our own words, and soon."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from mutation import SAMPLE, full, spoiled

from soup_xb.core.config.load import dump_config, parse_config
from soup_xb.core.config.support import check_supported

TABLE = runpy.run_path(str(Path(__file__).parents[1] / "errors" / "test_config_errors.py"))["ROWS"]
TEMPLATES = Path(__file__).parents[2] / "templates"
WHOLE = """base: HuggingFaceTB/SmolLM2-135M-Instruct   # hub id or local folder
task: sft
backend: auto
data:
  train: [./data/a.jsonl, "./data/b.jsonl"]
  format: auto
  val_split: 0.1
  max_length: 2_048
training:
  epochs: 3
  lr: 2e-4
  batch_size: 4
  lora:
    r: 16
    alpha: 32
    target_modules: [q_proj, 'layers\\.[0-7]\\..*']
    init_strategy: pissa
    rank_pattern:  {q_proj: 8, v_proj: 16}
  relora_steps: 500
  relora_warmup_ratio: 0.1
output: ./output
"""
SEEDS = [
    WHOLE,
    "base: tiny\ndata:\n  train: rows.jsonl\n",
    *(path.read_text("utf-8") for path in sorted(TEMPLATES.glob("*.yaml"))),
    *(row["text"] for row in TABLE.values() if isinstance(row.get("text"), str) and len(row["text"]) < 5000),
]
# What is whole stands more often, so that what is spoiled a little may still load.
SEEDS += SEEDS[:6] * 8
PIECES = [
    *"{}[]:,-?&*!|>%@`#'\"\\\t\n\r\0~",
    *(
        " ",
        "  ",
        ": ",
        "- ",
        "? ",
        "---\n",
        "...\n",
        "<<: *a",
        "!!python/object:os.system",
        "!x ",
        "&a ",
        "*a",
    ),
    *("yes", "no", "true", "null", "0x10", "1_0", "1e999", ".nan", "-.inf", "1:30", "2026-01-01", "9" * 400),
    *(
        "-1",
        "1.9",
        '"4"',
        "\ufeff",
        "\u2028",
        "\x85",
        "\x1b[31m",
        "é",
        "😀",
        "\ud800",
        "\\ud800",
        "\\UFFFFFFFF",
    ),
    *("base", "data", "train", "training", "lora", "rank_pattern", "lr", "learning_rate", "use_vera: true"),
    *(
        "task: dpo",
        "(a+)+",
        "(?R)",
        "(",
        "q_proj",
        "hf_" + "aB3d" * 9,
        "../..",
        "/dev/zero",
        "\u202e",
        "{{ 1 }}",
    ),
    *("%YAML 1.1\n", "[" * 200, "{a: " * 60, "- " * 60, " " * 400, "x" * 2000, "a: 1\n" * 200),
]


def load(text: str) -> None:
    """What `soupx check` does with a text; what is taken is written out and read back."""
    loaded = parse_config(text, "soup.yaml")
    again = parse_config(dump_config(loaded.config), "resolved.yaml")
    assert again.config == loaded.config
    for problem in loaded.warnings:
        assert problem.render()
    backend = loaded.config.backend
    check_supported(loaded, "torch" if backend == "auto" else backend)


@SAMPLE
@given(text=spoiled(SEEDS, PIECES))
def test_a_spoiled_config_loads_or_is_refused(text: str, met: Callable[[str], Any]) -> None:
    with met("configs")(text):
        load(text)


@SAMPLE
@given(
    text=spoiled(
        ["training.lr=1", "training.lora.rank_pattern={q_proj: 8}", "data.train=[a, b]", "a=b"], PIECES
    )
)
def test_a_spoiled_override_is_laid_over_or_refused(text: str, met: Callable[[str], Any]) -> None:
    with met("overrides")(text):
        parse_config(WHOLE, "soup.yaml", [text])


@pytest.mark.torture
@full(10_000)
@given(text=spoiled(SEEDS, PIECES))
def test_ten_thousand_spoiled_configs(text: str, met: Callable[[str], Any]) -> None:
    with met("configs, all of them")(text):
        load(text)
