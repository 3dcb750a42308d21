"""The registry of starter configs: the ones that come with soup-xb, and a person's own.

A folder of templates holds `manifest.json`, the YAML files that it names, and `data/NAME.jsonl`, a few sample
rows. All of it is foreign input and is read by the rules of `templates_folder` and `templates_manifest`.
"""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import soup_xb
from soup_xb.core.errors import ConfigError
from soup_xb.core.keys.config_values import safe_text
from soup_xb.core.registry.templates_folder import TemplateFolder
from soup_xb.core.registry.templates_manifest import MANIFEST, Template, read_manifest
from soup_xb.core.suggest import did_you_mean

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
