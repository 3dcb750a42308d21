"""A wheel brings the templates along, and finds them without the repository or any framework."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from soup_xb.core.templates import list_templates, load_sample, load_template, shipped_folder

ROOT = Path(__file__).parents[2]
# What the commands that only read and write files import.
NEEDED = ("attrs", "cattrs", "click", "ruamel.yaml")

pytestmark = pytest.mark.slow


def run(*words: object, folder: Path) -> str:
    home = {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder / "config"), "PYTHONPATH": ""}
    done = subprocess.run(
        [str(word) for word in words],
        cwd=folder,
        env={**os.environ, **home},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout; building it fetches the build backend from the package registry."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT, folder=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_each_template_once(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for template in list_templates(shipped_folder()):
        assert names.count(f"soup_xb/templates/{template.file}") == 1
        assert names.count(f"soup_xb/templates/data/{template.name}.jsonl") == 1
    assert not [name for name in names if name.startswith("templates/")]


def test_an_installed_wheel_lists_shows_and_writes_them(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", tmp_path / "venv", folder=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    pip = (python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    run(*pip, *(f"{name}=={version(name)}" for name in NEEDED), folder=tmp_path)
    run(*pip, "--no-deps", wheel, folder=tmp_path)
    soupx = tmp_path / "venv" / "bin" / "soupx"
    listed = json.loads(run(soupx, "templates", "--json", folder=tmp_path))["templates"]
    assert [entry["name"] for entry in listed] == [one.name for one in list_templates(shipped_folder())]
    assert run(soupx, "templates", "chat", folder=tmp_path) == load_template("chat", shipped_folder())
    run(soupx, "init", "--template", "chat", "--with-data", folder=tmp_path)
    assert (tmp_path / "data" / "chat.jsonl").read_text() == load_sample("chat", shipped_folder())
    assert "ok · sft" in run(soupx, "check", folder=tmp_path)
    place = run(
        python, "-c", "from soup_xb.core.templates import shipped_folder as f; print(f())", folder=tmp_path
    )
    assert Path(place.strip()).is_relative_to(tmp_path / "venv")
