"""Write the generated pages of this folder: `python docs/reference/generate.py`."""

from __future__ import annotations

from pathlib import Path

from soup_xb.core.reference_pages import config_page, features_page

FOLDER = Path(__file__).parent

if __name__ == "__main__":
    (FOLDER / "config.md").write_text(config_page(), encoding="utf-8")
    (FOLDER / "features.md").write_text(features_page(), encoding="utf-8")
