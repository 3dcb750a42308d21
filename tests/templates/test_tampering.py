"""Whatever a folder of templates has been made into, it is refused and nothing outside of it is read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from soup_xb.core.errors import ConfigError
from soup_xb.core.templates import load_sample, load_template

Tamper = Callable[[Path], Any]
Opened = Callable[[], AbstractContextManager[list[str]]]


def written(text: str | bytes) -> Tamper:
    """A manifest of this text."""
    content = text if isinstance(text, bytes) else text.encode()
    return lambda folder: (folder / "manifest.json").write_bytes(content)


def edited(edit: Callable[[str], str]) -> Tamper:
    """The right manifest's text, changed."""
    return lambda folder: written(edit((folder / "manifest.json").read_text()))(folder)


def listed(**changes: Any) -> Tamper:
    """A manifest whose one entry is changed; None takes a field out."""

    def edit(text: str) -> str:
        manifest = json.loads(text)
        entry = manifest["templates"]["chat"] | changes
        manifest["templates"]["chat"] = {key: value for key, value in entry.items() if value is not None}
        return json.dumps(manifest)

    return edited(edit)


def named(*names: str) -> Tamper:
    """A manifest with the right entry under these names."""

    def edit(text: str) -> str:
        entry = json.loads(text)["templates"]["chat"]
        return json.dumps({"version": 1, "templates": dict.fromkeys(names, entry)})

    return edited(edit)


def holding(content: bytes) -> Tamper:
    """A template of this content, vouched for."""

    def tamper(folder: Path) -> None:
        (folder / "chat.yaml").write_bytes(content)
        listed(sha256=hashlib.sha256(content).hexdigest())(folder)

    return tamper


def replaced(name: str, make: Callable[[Path], Any]) -> Tamper:
    """Something else in the place of a file or a folder."""

    def tamper(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make(path)

    return tamper


def link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def gone(path: Path) -> None:
    assert not path.exists()


MANIFEST, OUTSIDE, KIND = "template-manifest", "template-outside", "template-not-a-file"
TAMPERED: dict[str, tuple[Tamper, str]] = {
    "an empty manifest": (written(""), MANIFEST),
    "no JSON": (written("version: 1"), MANIFEST),
    "a manifest that is cut off": (edited(lambda text: text[:-9]), MANIFEST),
    "text after the manifest": (edited(lambda text: text + "x"), MANIFEST),
    "a manifest in UTF-16": (written("{}".encode("utf-16")), "template-not-utf8"),
    "a manifest that is a list": (written("[1]"), MANIFEST),
    "a manifest that is null": (written("null"), MANIFEST),
    "a NaN": (written('{"version": NaN, "templates": {}}'), MANIFEST),
    "a number of 5,000 digits": (written('{"version": ' + "1" * 5000 + ', "templates": {}}'), MANIFEST),
    "another version": (written('{"version": 2, "templates": {}}'), MANIFEST),
    "a version in quotes": (written('{"version": "1", "templates": {}}'), MANIFEST),
    "a version that is true": (written('{"version": true, "templates": {}}'), MANIFEST),
    "no version": (written('{"templates": {}}'), MANIFEST),
    "no templates": (written('{"version": 1}'), MANIFEST),
    "templates as a list": (written('{"version": 1, "templates": []}'), MANIFEST),
    "an unknown key": (written('{"version": 1, "templates": {}, "run": "x"}'), MANIFEST),
    "a key given twice": (written('{"version": 1, "version": 1, "templates": {}}'), MANIFEST),
    "a template given twice": (edited(lambda text: text[:-2] + ', "chat": {}}}'), MANIFEST),
    "100,000 deep": (written("[" * 100_000), MANIFEST),
    "100,000 entries": (named(*(f"t{index}" for index in range(100_000))), "template-too-large"),
    "257 entries": (named(*(f"t{index}" for index in range(257))), MANIFEST),
    "an entry that is text": (written('{"version": 1, "templates": {"chat": "chat.yaml"}}'), MANIFEST),
    "an unknown field": (listed(command="rm"), MANIFEST),
    "no file": (listed(file=None), MANIFEST),
    "a file above": (listed(file="../outside/canary.yaml"), MANIFEST),
    "a file above, in a detour": (listed(file="data/../../outside/canary.yaml"), MANIFEST),
    "a file above, with backslashes": (listed(file="..\\outside\\canary.yaml"), MANIFEST),
    "an absolute file": (listed(file="/etc/hostname"), MANIFEST),
    "a file with NUL": (listed(file="chat.yaml\0"), MANIFEST),
    "a file without a name": (listed(file=""), MANIFEST),
    "the folder above as a file": (listed(file=".."), MANIFEST),
    "a hidden file": (listed(file=".profile"), MANIFEST),
    "a file in the home": (listed(file="~/.profile"), MANIFEST),
    "a file that is a number": (listed(file=0), MANIFEST),
    "a file that is a list": (listed(file=["chat.yaml"]), MANIFEST),
    "a short hash": (listed(sha256="abc"), MANIFEST),
    "a hash in capitals": (listed(sha256="A" * 64), MANIFEST),
    "another hash": (listed(sha256="0" * 64), "template-changed"),
    "an unknown task": (listed(task="mine"), MANIFEST),
    "backends as text": (listed(backends="torch"), MANIFEST),
    "no backend": (listed(backends=[]), MANIFEST),
    "an unknown backend": (listed(backends=["torch", "jax"]), MANIFEST),
    "a backend twice": (listed(backends=["torch", "torch"]), MANIFEST),
    "backends that are lists": (listed(backends=[["torch"]]), MANIFEST),
    "a description over two lines": (listed(description="a\nb"), MANIFEST),
    "a description that paints the terminal": (listed(description="\x1b[31mred"), MANIFEST),
    "a description without end": (listed(description="x" * 201), MANIFEST),
    "a name above": (named("chat", "../outside/canary"), MANIFEST),
    "a name with NUL": (named("chat", "chat\0"), MANIFEST),
    "a name that is empty": (named("chat", ""), MANIFEST),
    "a name in capitals": (named("chat", "CHAT"), MANIFEST),
    "a template that leads out": (replaced("chat.yaml", link("../outside/canary.yaml")), OUTSIDE),
    "a template that leads nowhere": (replaced("chat.yaml", link("../outside/none")), "template-missing"),
    "a template that leads to itself": (replaced("chat.yaml", link("chat.yaml")), OUTSIDE),
    "a template that is a pipe": (replaced("chat.yaml", os.mkfifo), KIND),
    "a template that is a folder": (replaced("chat.yaml", Path.mkdir), KIND),
    "a template that is gone": (replaced("chat.yaml", gone), "template-missing"),
    "a template of 300 KiB": (holding(b"#" * 300 * 1024), "template-too-large"),
    "a template in Latin-1": (holding("base: café".encode("latin-1")), "template-not-utf8"),
    "a template with another letter": (
        replaced("chat.yaml", lambda path: path.write_text("base: other\n")),
        "template-changed",
    ),
    "a manifest that leads out": (replaced("manifest.json", link("../outside/manifest.json")), OUTSIDE),
    "a manifest that is a pipe": (replaced("manifest.json", os.mkfifo), KIND),
    "a manifest that is gone": (replaced("manifest.json", gone), "template-missing"),
}


def reads_nothing_outside(folder: Path, opened: list[str]) -> None:
    outside = folder.parent / "outside"
    assert not [name for name in opened if outside.resolve() in Path(name).resolve().parents]
    assert not {"/etc/hostname", str(Path.home() / ".profile")} & set(opened)


@pytest.mark.parametrize("case", TAMPERED)
def test_a_tampered_folder_is_a_template_error_and_reads_nothing_outside(
    folder: Path, opened: Opened, case: str
) -> None:
    tamper, code = TAMPERED[case]
    tamper(folder)
    with opened() as names, pytest.raises(ConfigError) as refused:
        load_template("chat", folder)
    assert [problem.code for problem in refused.value.problems] == [code], refused.value
    assert refused.value.exit_code == 2
    reads_nothing_outside(folder, names)
    assert "\x1b" not in str(refused.value)
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize(
    "tamper",
    [replaced("data/chat.jsonl", link("../../outside/chat.jsonl")), replaced("data", link("../outside"))],
    ids=["a link", "a folder that is a link"],
)
def test_sample_rows_that_lead_out_are_refused_unread(folder: Path, opened: Opened, tamper: Tamper) -> None:
    tamper(folder)
    with opened() as names, pytest.raises(ConfigError, match="out of the folder"):
        load_sample("chat", folder)
    reads_nothing_outside(folder, names)


@pytest.mark.parametrize(
    "name", ["../outside/canary", "/etc/hostname", "chat\0", "", "chat.yaml", "x" * 1_000_000, "Chat"]
)
def test_a_name_that_is_not_in_the_manifest_reaches_no_file(folder: Path, opened: Opened, name: str) -> None:
    with opened() as names, pytest.raises(ConfigError, match="no such template"):
        load_template(name, folder)
    reads_nothing_outside(folder, names)
    assert {Path(name).name for name in names} == {"manifest.json"}


def test_the_witness_would_notice(folder: Path, opened: Opened) -> None:
    with opened() as names:
        (folder / ".." / "outside" / "canary.yaml").read_text()
    with pytest.raises(AssertionError):
        reads_nothing_outside(folder, names)


@pytest.mark.parametrize("name", ["../outside/secret.png", "other/a.png", "vision/../a.png", "/etc/hostname"])
def test_sample_rows_that_name_files_outside_of_their_own_folder_are_refused_unread(
    name: str, folder: Path, opened: Opened
) -> None:
    from soup_xb.core.template_copy import load_sample_files

    entry = json.loads((folder / "manifest.json").read_text())
    entry["templates"]["vision"] = entry["templates"].pop("chat") | {"task": "vision"}
    (folder / "manifest.json").write_text(json.dumps(entry))
    turn = {"role": "user", "content": [{"type": "image", "path": name}]}
    (folder / "data" / "vision.jsonl").write_text(json.dumps({"messages": [turn]}))
    (folder.parent / "outside" / "secret.png").write_bytes(b"secret")
    with opened() as files, pytest.raises(ConfigError):
        load_sample_files("vision", folder)
    assert not [file for file in files if "outside" in file or "hostname" in file]
