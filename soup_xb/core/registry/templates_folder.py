"""Reading inside one folder of templates, and never outside of it."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from attrs import frozen

from soup_xb.core.errors import ConfigError, ResourceError
from soup_xb.core.keys.config_values import safe_text

MOST_BYTES = 256 * 1024
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_REINSTALL = "install soup-xb again, or repair the folder that you named."


@frozen
class TemplateFolder:
    """A folder whose files are foreign input: `owner` says in one word whose it is (soupx, yours)."""

    path: Path
    owner: str = "soupx"

    def read(self, name: str) -> str:
        """The text of a file, as `read_bytes` reads it. Raises ConfigError for what is not UTF-8 too."""
        try:
            return self.read_bytes(name).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._refused("template-not-utf8", name, "is not UTF-8 text") from error

    def read_bytes(self, name: str) -> bytes:
        """What a file holds, `name` with `/` between folders. No more than 256 KiB are read.

        Raises ConfigError for a name that is not plain, a file that lies outside of the folder once every link
        is followed, and one that is missing, no ordinary file or too large; ResourceError where it may not be read.
        """
        path = self._inside(name)
        try:
            content = _content(path)
        except PermissionError as error:
            raise ResourceError(
                "template-unreadable", "may not be read", where=str(path), help="check its permissions."
            ) from error
        except OSError as error:
            raise self._refused("template-not-a-file", name, f"cannot be read: {error.strerror}") from error
        if content is None:
            raise self._refused("template-not-a-file", name, "is not an ordinary file")
        if len(content) > MOST_BYTES:
            raise self._refused("template-too-large", name, f"is larger than {MOST_BYTES // 1024} KiB")
        return content

    def _inside(self, name: str) -> Path:
        """The place of a file with no link left in it. Raises ConfigError where that is not in the folder."""
        parts = name.split("/")
        if not all(is_plain_name(part) for part in parts):
            raise self._refused("template-outside", name, "is not a plain file name")
        try:
            root = self.path.resolve(strict=True)
            path = root.joinpath(*parts).resolve(strict=True)
        except FileNotFoundError as error:
            raise self._refused("template-missing", name, "is not in the folder") from error
        except (OSError, RuntimeError) as error:
            raise self._refused("template-outside", name, "is a link that leads nowhere") from error
        if root not in path.parents:
            raise self._refused("template-outside", name, "is a link that leads out of the folder")
        return path

    def _refused(self, code: str, name: str, message: str) -> ConfigError:
        return ConfigError(code, f"`{safe_text(name)}` {message}", where=str(self.path), help=_REINSTALL)


def is_plain_name(name: str) -> bool:
    r"""Whether a name can only mean a file of that name in its folder.

    >>> is_plain_name("chat.yaml"), is_plain_name(".."), is_plain_name("a/b"), is_plain_name("a\\b")
    (True, False, False, False)
    """
    return _PLAIN_NAME.fullmatch(name) is not None


def _content(path: Path) -> bytes | None:
    """What a file begins with, one byte more than allowed at most; None for what is no ordinary file.

    The kind is looked at before opening, because opening a pipe or a device already does something, and
    again on what was opened, because a name may have been given to another file in between.
    """
    before = path.lstat()
    if not stat.S_ISREG(before.st_mode):
        return None
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        opened = os.fstat(handle)
        if (opened.st_dev, opened.st_ino) != (before.st_dev, before.st_ino):
            return None
        return file.read(MOST_BYTES + 1)
