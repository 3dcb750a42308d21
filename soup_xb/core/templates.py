"""The registry of starter configs: the ones that come with soup-xb, and a person's own.

A folder of templates holds `manifest.json`, the YAML files that it names, and `data/NAME.jsonl`, a few sample
rows. All of it is foreign input: the manifest is checked entry by entry before any file is opened, and nothing is read
outside the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from attrs import frozen

import soup_xb
from soup_xb.core.config.keys import safe_text, shown
from soup_xb.core.config.support_rows import BACKENDS
from soup_xb.core.errors import ConfigError, ResourceError
from soup_xb.core.tasks import TASKS
from soup_xb.core.text import did_you_mean

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


MANIFEST = "manifest.json"
VERSION = 1
MOST_TEMPLATES = 256
LONGEST_DESCRIPTION = 200
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FIELDS = ("file", "description", "task", "backends", "sha256")
_SHAPE = '`{"version": 1, "templates": {"NAME": {"file", "description", "task", "backends", "sha256"}}}`'


@frozen
class Template:
    """One starter config, as its folder's manifest describes it; the text is read by `load_template`."""

    name: str
    file: str
    description: str
    task: str
    backends: tuple[str, ...]
    sha256: str
    folder: TemplateFolder


class _ManifestError(ValueError):
    """What is wrong with the manifest, in words that follow `manifest.json: `."""


def read_manifest(folder: TemplateFolder) -> dict[str, Template]:
    """The templates of a folder by name. Raises ConfigError for a manifest that is not exactly of its form."""
    text = folder.read(MANIFEST)
    try:
        return _templates(_parsed(text), folder)
    except _ManifestError as error:
        where = str(folder.path / MANIFEST)
        raise ConfigError(
            "template-manifest", str(error), where=where, help=f"its form: {_SHAPE}."
        ) from error


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        message = f"is not JSON: {error.msg}, line {error.lineno}, column {error.colno}"
        raise _ManifestError(message) from error
    except RecursionError as error:
        raise _ManifestError("is nested too deep") from error
    except ValueError as error:
        # Ours, or Python's own limit on the digits of an integer.
        raise error if isinstance(error, _ManifestError) else _ManifestError("holds a huge number") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for key, value in pairs:
        if key in entries:
            raise _ManifestError(f"`{safe_text(key)}` is given twice")
        entries[key] = value
    return entries


def _refuse_constant(name: str) -> NoReturn:
    raise _ManifestError(f"{name} is not JSON")


def _templates(manifest: Any, folder: TemplateFolder) -> dict[str, Template]:
    _with_keys(manifest, ("version", "templates"), "the manifest")
    if type(manifest["version"]) is not int or manifest["version"] != VERSION:
        raise _ManifestError(f"`version` must be {VERSION}, got {_shown(manifest['version'])}")
    entries = manifest["templates"]
    if not isinstance(entries, dict):
        raise _ManifestError(f"`templates` must be an object, got {_shown(entries)}")
    if len(entries) > MOST_TEMPLATES:
        raise _ManifestError(f"lists {len(entries)} templates, at most {MOST_TEMPLATES} are allowed")
    return {name: _template(name, entry, folder) for name, entry in entries.items()}


def _template(name: str, entry: Any, folder: TemplateFolder) -> Template:
    if NAME.fullmatch(name) is None:
        raise _ManifestError(f"`{safe_text(name)}` is no template name: letters a-z, digits, `-` and `_`")
    _with_keys(entry, _FIELDS, f"`{name}`")
    for field in ("file", "description", "task", "sha256"):
        if not isinstance(entry[field], str):
            raise _ManifestError(f"`{field}` of `{name}` must be text, got {_shown(entry[field])}")
    if not is_plain_name(entry["file"]):
        raise _ManifestError(f"`file` of `{name}` is not a plain file name: {_shown(entry['file'])}")
    description = entry["description"]
    if not description.strip() or not description.isprintable() or len(description) > LONGEST_DESCRIPTION:
        raise _ManifestError(
            f"`description` of `{name}` must be one line, {LONGEST_DESCRIPTION} characters at most"
        )
    if entry["task"] not in TASKS:
        raise _ManifestError(
            f"`task` of `{name}` must be one of {', '.join(TASKS)}, got {_shown(entry['task'])}"
        )
    if _SHA256.fullmatch(entry["sha256"]) is None:
        raise _ManifestError(f"`sha256` of `{name}` must be 64 digits 0-9 a-f")
    return Template(
        name, entry["file"], description, entry["task"], _backends(name, entry), entry["sha256"], folder
    )


def _backends(name: str, entry: dict[str, Any]) -> tuple[str, ...]:
    backends = entry["backends"]
    known = isinstance(backends, list) and all(isinstance(one, str) and one in BACKENDS for one in backends)
    if not known or not backends or len(set(backends)) != len(backends):
        raise _ManifestError(f"`backends` of `{name}` must be a list of {' and '.join(BACKENDS)}")
    return tuple(backends)


def _with_keys(value: Any, keys: tuple[str, ...], what: str) -> None:
    if not isinstance(value, dict):
        raise _ManifestError(f"{what} must be an object, got {_shown(value)}")
    missing = [key for key in keys if key not in value]
    if missing:
        raise _ManifestError(f"{what} has no `{missing[0]}`")
    unknown = [key for key in value if key not in keys]
    if unknown:
        raise _ManifestError(f"{what} has an unknown key `{safe_text(unknown[0])}`")


def _shown(value: Any) -> str:
    return "an object" if isinstance(value, dict) else shown(value)


__all__ = [
    "Template",
    "describe_template",
    "list_templates",
    "load_sample",
    "load_template",
    "own_folder",
    "shipped_folder",
]


def shipped_folder() -> Path:
    """Where soup-xb's own templates lie: in the package (a wheel), else beside it (a checkout)."""
    package = Path(soup_xb.__file__).parent
    for folder in (package / "templates", package.parent / "templates"):
        if (folder / MANIFEST).is_file():
            return folder
    raise ConfigError(
        "template-missing",
        "the templates of soup-xb are not there",
        where=str(package / "templates"),
        help="install soup-xb again.",
    )


def own_folder() -> Path | None:
    """A person's own templates: `$XDG_CONFIG_HOME/soupx/templates`, on a Mac in `~/Library/Application Support`.

    None where no manifest is there, or where there is no home.
    """
    chosen = os.environ.get("XDG_CONFIG_HOME", "")
    try:
        home = Path.home()
    except RuntimeError:
        return None
    parent = home / ("Library/Application Support" if sys.platform == "darwin" else ".config")
    if chosen and Path(chosen).is_absolute():
        parent = Path(chosen)
    folder = parent / "soupx" / "templates"
    return folder if os.path.lexists(folder / MANIFEST) else None


def list_templates(folder: Path | None = None) -> tuple[Template, ...]:
    """Every template, sorted by name: those of `folder` alone, or the shipped ones and the person's own.

    A person's own template stands before a shipped one of the same name. Raises ConfigError for a folder
    whose manifest is missing or wrong.
    """
    found: dict[str, Template] = {}
    for source in _folders(folder):
        found.update(read_manifest(source))
    return tuple(found[name] for name in sorted(found))


def describe_template(name: str, folder: Path | None = None) -> Template:
    """What the manifest says of one template. Raises ConfigError with the closest names."""
    known = {template.name: template for template in list_templates(folder)}
    if name not in known:
        close = did_you_mean(name[:60].lower(), known)
        help = close or f"there are: {', '.join(known) or 'none'}; `soupx templates` describes them."
        raise ConfigError("template-unknown", f"no such template: `{safe_text(name)}`", help=help)
    return known[name]


def load_template(name: str, folder: Path | None = None) -> str:
    """The YAML text of a template. Raises ConfigError where it is not the file that the manifest vouches for."""
    template = describe_template(name, folder)
    text = template.folder.read(template.file)
    found = hashlib.sha256(text.encode("utf-8")).hexdigest()
    if found != template.sha256:
        raise ConfigError(
            "template-changed",
            f"`{template.file}` is not the file that the manifest vouches for",
            where=str(template.folder.path),
            help=f"if the change is yours, write its sha256 into {MANIFEST}: {found}",
        )
    return text


def load_sample(name: str, folder: Path | None = None) -> str:
    """The sample rows of a template, as JSON lines."""
    template = describe_template(name, folder)
    return template.folder.read(f"data/{template.name}.jsonl")


def _folders(folder: Path | None) -> Iterator[TemplateFolder]:
    if folder is not None:
        if not folder.is_dir():
            raise ConfigError("template-missing", "no such folder of templates", where=safe_text(str(folder)))
        yield TemplateFolder(folder, "yours")
        return
    yield TemplateFolder(shipped_folder())
    own = own_folder()
    if own is not None:
        yield TemplateFolder(own, "yours")


class _Texts(Mapping[str, str]):
    """Name -> YAML text of the shipped templates; each text is read when it is asked for."""

    def __getitem__(self, name: str) -> str:
        folder = shipped_folder()
        if name not in read_manifest(TemplateFolder(folder)):
            raise KeyError(name)
        return load_template(name, folder)

    def __iter__(self) -> Iterator[str]:
        return iter(read_manifest(TemplateFolder(shipped_folder())))

    def __len__(self) -> int:
        return len(read_manifest(TemplateFolder(shipped_folder())))


def deprecated_view() -> Mapping[str, str]:
    """What `soup_xb.core.config.TEMPLATES` answers: the registry as a mapping of texts, with a DeprecationWarning."""
    message = "TEMPLATES is deprecated: use soup_xb.core.templates.load_template(name)"
    # The caller is two frames up: this function, then the module's __getattr__.
    warnings.warn(message, DeprecationWarning, stacklevel=3)
    return _Texts()
