"""The tables of `make clients`, from cells that are given: no other program is needed."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("client_cells")


@pytest.fixture
def table(cells: ModuleType) -> ModuleType:
    return importlib.import_module("client_table")


def test_a_large_difference_is_bold_and_a_refusal_has_its_words(cells, table):
    clients = [client for client in cells.CLIENTS if client.name in ("vllm-0.31", "llama.cpp", "mlx-lm")]
    found = {
        ("rsLoRA", "vllm-0.31"): cells.Cell("rsLoRA", "vllm-0.31", "numbers", "", difference=3.1e-05),
        ("rsLoRA", "llama.cpp"): cells.Cell("rsLoRA", "llama.cpp", "numbers", "", difference=19.5),
        ("DoRA", "vllm-0.31"): cells.Cell(
            "DoRA", "vllm-0.31", "numbers", "", refused="ValueError: no\nDoRA | yet"
        ),
    }
    assert table.numbers_table(
        "adapter", ["rsLoRA", "DoRA"], clients, found, {"rsLoRA": "7.2", "DoRA": "6.0"}
    ) == (
        "| adapter | moves logits by | vLLM 0.31 | llama.cpp | mlx-lm |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| rsLoRA | 7.2 | 3.1e-05 | **19.50** | - |\n"
        "| DoRA | 6.0 | refused: ValueError: no DoRA \\| yet | - | - |"
    )


def test_a_difference_that_is_no_number_counts_as_one(cells, table):
    assert table.differs(cells.Cell("plain", "mlx-lm", "numbers", "", difference=float("nan")))


def test_log_probabilities_are_compared_with_those_of_the_reference(cells):
    logits = np.array([[0.0, 1.0, 2.0], [3.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    totals = np.log(np.exp(logits).sum(axis=1))
    tokens = [0, 2, 1]
    found = np.array([logits[0, 2] - totals[0], logits[1, 1] - totals[1] + 0.25])
    assert cells.largest_difference(found, logits, tokens) == pytest.approx(0.25)


def test_a_padded_vocabulary_is_cut_before_logits_are_compared(cells):
    logits = np.ones((2, 3))
    padded = np.concatenate([logits + 0.5, np.full((2, 1), 99.0)], axis=1)
    assert cells.largest_difference(padded, logits, [0, 1]) == 0.5
