"""The text of a config file, or why it cannot be read."""

from __future__ import annotations

from pathlib import Path

from soup_xb.core.errors import ConfigError, ResourceError
from soup_xb.core.text import did_you_mean

MOST_BYTES = 256 * 1024
LEAST = "a config needs at least `base:` and, below `data:`, `train:`; `soupx schema` lists every key."


def read_text(path: Path) -> str:
    """The file as text, a byte order mark left out.

    No more than 256 KiB are read. Raises ConfigError for a file that is missing, a folder, too large or not
    UTF-8, and ResourceError where it may not be read.
    """
    where = str(path)
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError("config-not-found", "no such file", where=where, help=_close_files(path)) from error
    except IsADirectoryError as error:
        help = f"name the file in it, such as `{path / 'soup.yaml'}`."
        raise ConfigError("config-is-folder", "is a folder, not a file", where=where, help=help) from error
    except PermissionError as error:
        help = "check its permissions."
        raise ResourceError("config-forbidden", "may not be read", where=where, help=help) from error
    except OSError as error:
        message = f"cannot be read: {error.strerror or error}"
        raise ConfigError("config-unreadable", message, where=where, help="name a regular file.") from error
    if len(content) > MOST_BYTES:
        message = f"larger than {MOST_BYTES // 1024} KiB"
        raise ConfigError("config-too-large", message, where=where, help="a config holds settings, not data.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"{where}:{content.count(bytes([10]), 0, error.start) + 1}"
        raise ConfigError(
            "config-not-utf8", "not UTF-8 text", where=where, help="save it as UTF-8."
        ) from error


def _close_files(path: Path) -> str:
    try:
        names = sorted(entry.name for entry in path.parent.iterdir() if entry.suffix in (".yaml", ".yml"))
    except OSError:
        names = []
    return did_you_mean(path.name[:100], names[:100]) or f"create it, or name another file; {LEAST}"
