"""The generated pages in the repository are those that the declarations give."""

from __future__ import annotations

from pathlib import Path

from soup_xb.core.config.pages import config_page, features_page, tasks_page, with_refused_rows

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"


def test_the_config_page_is_fresh() -> None:
    assert (REFERENCE / "config.md").read_text("utf-8") == config_page(), (
        "run python docs/reference/generate.py"
    )


def test_the_features_page_is_fresh() -> None:
    assert (REFERENCE / "features.md").read_text("utf-8") == features_page(), (
        "run python docs/reference/generate.py"
    )


def test_the_tasks_page_is_fresh() -> None:
    assert (REFERENCE / "tasks.md").read_text("utf-8") == tasks_page(), (
        "run python docs/reference/generate.py"
    )


def test_the_readme_lists_the_refused_rows_of_today() -> None:
    page = (REFERENCE.parents[1] / "README.md").read_text("utf-8")
    assert page == with_refused_rows(page), "run python docs/reference/generate.py"
    assert page.count("| `") > 10
    assert len(page.splitlines()) <= 150
