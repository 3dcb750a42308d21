"""`soupx demo` as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def soupx(*arguments: str, place: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "soup_xb", *arguments],
        cwd=place,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_cache_that_cannot_be_written_is_one_message_and_exit_7(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    done = soupx("demo", place=tmp_path, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.returncode == 7, done.stderr
    assert "error[cache-not-writable]" in done.stderr
    assert "XDG_CACHE_HOME" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_demo_teaches_the_format_to_new_prompts(tmp_path: Path) -> None:
    done = soupx("demo", "--backend", "torch", "--json", place=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["prompts"] == 20
    assert summary["base"] <= 4
    assert summary["tuned"] >= 18
    assert (tmp_path / "soupx-demo" / "report.html").is_file()
    assert soupx("check", "soupx-demo/soup.yaml", place=tmp_path).returncode == 0
    again = soupx("demo", "--backend", "torch", place=tmp_path)
    assert again.returncode == 7
    assert "--overwrite" in again.stderr
