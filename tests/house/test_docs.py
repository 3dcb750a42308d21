"""The site builds strictly: every link and anchor of docs/ leads somewhere, in the repository and on the site."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
mkdocs = pytest.importorskip("mkdocs", reason="the docs extra is not installed")


def build(docs: Path, site: Path) -> list[str]:
    """Build a copy of the configuration over `docs`; the warnings, which make a strict build fail."""
    from mkdocs.commands.build import build as build_site
    from mkdocs.config import load_config

    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                messages.append(record.getMessage())

    collector = Collector()
    logger = logging.getLogger("mkdocs")
    logger.addHandler(collector)
    try:
        settings = {"docs_dir": str(docs), "site_dir": str(site), "strict": False}
        build_site(load_config(str(ROOT / "mkdocs.yml"), **settings))
    finally:
        logger.removeHandler(collector)
    return messages


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    assert build(ROOT / "docs", tmp_path / "site") == []
    assert (tmp_path / "site" / "first-run.html").is_file()


def test_a_link_and_an_anchor_that_lead_nowhere_are_noticed(tmp_path: Path) -> None:
    import shutil

    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    page = tmp_path / "docs" / "index.md"
    page.write_text(
        page.read_text("utf-8") + "\n[a](none.md) [b](install.md#none) [c](../none.md)\n", "utf-8"
    )
    messages = "\n".join(build(tmp_path / "docs", tmp_path / "site"))
    assert all(target in messages for target in ("none.md", "install.md#none", "../none.md"))


def test_the_readme_links_only_to_files_that_are_there() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", text)
    assert len(links) > 8
    assert [link for link in links if not (ROOT / link).exists()] == []
