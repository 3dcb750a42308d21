"""What the site's builder does beyond Markdown: links from a page to other files of the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_LINK = re.compile(r"\[([^\]\n]+)\]\((\.\./[^)#\s]*)(#[^)\s]*)?\)")
_DOCS = Path(__file__).parent


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Name the file where a link leaves docs/: on the site, unlike in the repository, it is not there to open.

    A link to a file that the repository does not have is left as it is, and fails the build.
    """
    folder = (_DOCS / page.file.src_uri).parent

    def named(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        outside = _DOCS not in target.parents and target.exists()
        return f"{link[1]} (`{target.relative_to(_DOCS.parent)}`)" if outside else link[0]

    return _LINK.sub(named, markdown)
