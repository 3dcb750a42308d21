"""The registry gives what its manifests vouch for: the shipped templates and a person's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import soup_xb.core.config.schema
from soup_xb.core.errors import ConfigError
from soup_xb.core.templates import (
    describe_template,
    list_templates,
    load_sample,
    load_template,
    own_folder,
    shipped_folder,
)


@pytest.fixture
def text(folder: Path) -> str:
    return (folder / "chat.yaml").read_text()


def test_a_right_folder_is_read(folder: Path, text: str) -> None:
    assert load_template("chat", folder) == text
    assert load_sample("chat", folder) == '{"text": "a row"}\n'
    chat = describe_template("chat", folder)
    assert (chat.description, chat.task, chat.backends) == ("Chat.", "sft", ("torch",))
    assert list_templates(folder) == (chat,)


def test_a_link_that_stays_inside_is_followed(folder: Path, text: str) -> None:
    (folder / "chat.yaml").rename(folder / "real.yaml")
    (folder / "chat.yaml").symlink_to("real.yaml")
    assert load_template("chat", folder) == text


def test_a_folder_reached_by_a_link_is_read(folder: Path, text: str) -> None:
    (folder.parent / "way").symlink_to(folder)
    assert load_template("chat", folder.parent / "way") == text


def test_a_misspelled_name_asks_for_the_near_one(folder: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        load_template("cht", folder)
    assert refused.value.problems[0].help == "did you mean `chat`?"


def test_a_persons_own_templates_stand_beside_the_shipped_ones(
    folder: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    assert own_folder() is None
    own = tmp_path / "config" / "soupx" / "templates"
    shutil.copytree(folder, own)
    written = (own / "manifest.json").read_text()
    (own / "manifest.json").write_text(written.replace('"chat":', '"mine":'))
    assert own_folder() == own
    names = {template.name: template.folder.owner for template in list_templates()}
    assert names["mine"] == "yours" and names["code"] == "soupx"
    assert load_template("mine") == text


def test_a_persons_own_template_stands_before_a_shipped_one(
    folder: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    shutil.copytree(folder, tmp_path / "config" / "soupx" / "templates")
    assert load_template("chat") == text
    assert load_template("chat", shipped_folder()) != text


def test_a_relative_config_home_is_ignored(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "config")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    shutil.copytree(folder, tmp_path / "config" / "soupx" / "templates")
    monkeypatch.chdir(tmp_path)
    assert own_folder() is None


def test_the_older_name_is_a_view_of_the_registry_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match="load_template") as warned:
        texts = soup_xb.core.config.TEMPLATES  # type: ignore[attr-defined]
    assert warned[0].filename == __file__
    shipped = shipped_folder()
    assert set(texts) == {template.name for template in list_templates(shipped)}
    assert len(texts) == len(list_templates(shipped))
    assert texts["chat"] == load_template("chat", shipped)
    with pytest.raises(KeyError):
        texts["../chat"]


def test_another_unknown_name_of_the_config_module_stays_unknown() -> None:
    with pytest.raises(AttributeError, match="TEMPLATE'"):
        soup_xb.core.config.TEMPLATE  # type: ignore[attr-defined]  # noqa: B018


def test_the_manifest_in_the_repository_is_canonical() -> None:
    text = (shipped_folder() / "manifest.json").read_text("utf-8")
    assert text == json.dumps(json.loads(text), indent=2) + "\n"
