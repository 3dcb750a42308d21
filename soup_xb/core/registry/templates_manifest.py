"""`manifest.json` of a folder of templates: which there are, checked entry by entry before any file is touched."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from attrs import frozen

from soup_xb.core.config.schema import TASKS
from soup_xb.core.config.support_rows import BACKENDS
from soup_xb.core.errors import ConfigError
from soup_xb.core.keys.config_values import safe_text, shown
from soup_xb.core.registry.templates_folder import TemplateFolder, is_plain_name

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
