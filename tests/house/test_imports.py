"""Core and the command line stay free of frameworks: the commands that only read files are instant."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import soup_xb.cli
import soup_xb.core

FRAMEWORKS = ("torch", "transformers", "peft", "mlx", "mlx_lm", "accelerate", "bitsandbytes", "datasets")

BLOCKER = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {FRAMEWORKS!r}:
            raise AssertionError(f"{{name}} is imported")
sys.meta_path.insert(0, Blocker())
"""


def run_python(code: str, *arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


def modules_of(package: object) -> list[str]:
    return [
        info.name
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")  # type: ignore[attr-defined]
    ]


def test_no_module_of_core_or_cli_imports_a_framework() -> None:
    names = modules_of(soup_xb.core) + modules_of(soup_xb.cli)
    assert {"soup_xb.core.config.schema", "soup_xb.cli.check", "soup_xb.cli.main"} <= set(names)
    done = run_python(
        BLOCKER + "import importlib\nfor name in sys.argv[1:]: importlib.import_module(name)", *names
    )
    assert done.returncode == 0, done.stderr


def test_the_blocker_would_notice() -> None:
    done = run_python(BLOCKER + "import torch")
    assert "torch is imported" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["check"],
        ["check", "--help"],
        ["schema"],
        ["features"],
        ["templates"],
        ["init", "--template", "chat", "--output", "chat.yaml"],
    ],
)
def test_reading_commands_import_neither_framework_nor_numpy(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "soup.yaml").write_text("base: tiny\ndata: {train: rows.jsonl}\n", "utf-8")
    code = f"""
import sys
from soup_xb.cli import run
try:
    run()
except SystemExit as stopped:
    assert stopped.code in (0, None), stopped.code
heavy = [name for name in (*{FRAMEWORKS!r}, "numpy", "rich", "jinja2") if name in sys.modules]
assert not heavy, heavy
"""
    done = run_python(code, *arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
