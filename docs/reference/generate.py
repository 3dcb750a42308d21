"""Write the generated pages of this folder, and the README's table: `python docs/reference/generate.py`."""

from __future__ import annotations

from pathlib import Path

from error_codes import errors_page

from soup_xb.core.config.pages import config_page, features_page, tasks_page, with_refused_rows

FOLDER = Path(__file__).parent
README = FOLDER.parents[1] / "README.md"

if __name__ == "__main__":
    (FOLDER / "config.md").write_text(config_page(), encoding="utf-8")
    (FOLDER / "errors.md").write_text(errors_page(), encoding="utf-8")
    (FOLDER / "features.md").write_text(features_page(), encoding="utf-8")
    (FOLDER / "tasks.md").write_text(tasks_page(), encoding="utf-8")
    README.write_text(with_refused_rows(README.read_text(encoding="utf-8")), encoding="utf-8")
