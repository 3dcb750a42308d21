"""How many processes share the work on data."""

from __future__ import annotations

from pathlib import Path

import pytest

from soup_xb.core import process
from soup_xb.core.process import available_processors, tokenizing_processes


@pytest.mark.parametrize(
    ("text", "allowed"), [("150000 100000\n", 2), ("50000 100000\n", 1), ("max 100000\n", 8)]
)
def test_a_container_s_share_of_processors_counts(
    text: str, allowed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    (tmp_path / "cpu.max").write_text(text)
    assert available_processors(tmp_path / "cpu.max") == allowed
    assert available_processors(tmp_path / "none") == 8


def test_little_data_is_not_worth_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "available_processors", lambda: 8)
    sizes = [0, process.BYTES_A_PROCESS, 3 * process.BYTES_A_PROCESS, 2**40]
    assert [tokenizing_processes(size) for size in sizes] == [1, 1, 3, 8]
