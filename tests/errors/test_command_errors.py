"""The error table, part six: command lines, templates, and what the environment says."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Act = Callable[[Path], Any]


def own_templates(**values: object) -> Act:
    """A folder of templates whose one entry has these values."""

    def act(place: Path) -> None:
        folder = place / "mine"
        folder.mkdir()
        (folder / "chat.yaml").write_text("base: tiny\ndata: {train: x.jsonl}\n")
        (place / "secret.yaml").write_text("base: secret\n")
        digest = hashlib.sha256((folder / "chat.yaml").read_bytes()).hexdigest()
        entry = {
            "file": "chat.yaml",
            "description": "d",
            "task": "sft",
            "backends": ["torch"],
            "sha256": digest,
        }
        manifest = {"version": 1, "templates": {"chat": {**entry, **values}}}
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return act


def broken_manifest(place: Path) -> None:
    own_templates()(place)
    (place / "mine" / "manifest.json").write_text("{")


def linked_template(place: Path) -> None:
    own_templates()(place)
    (place / "mine" / "chat.yaml").unlink()
    (place / "mine" / "chat.yaml").symlink_to(place / "secret.yaml")


def copied(place: Path) -> None:
    shutil.copytree(place / "base", place / "elsewhere")


COMMAND_LINES = {
    "a slip in a command": {"argv": "chekc", "code": "usage", "words": "did you mean `check`"},
    "an unknown option": {"argv": "check --fast", "code": "usage", "words": "--fast", "help": "soupx --help"},
    "an unknown backend": {"argv": "train --backend cuda", "code": "usage", "words": "cuda"},
    "two files": {"argv": "check a.yaml --config b.yaml", "code": "usage", "words": "two files"},
    "an argument too many": {"argv": "schema x", "code": "usage"},
    "an option without its value": {"argv": "check --set", "code": "usage"},
    "a number in words": {"argv": "plan --processes many", "code": "usage", "words": "many"},
    "no processes": {"argv": "plan --processes 0", "code": "usage"},
    "no steps": {"argv": "parity --steps 0", "code": "usage"},
    "nothing to answer": {"argv": "generate --base base", "code": "usage", "words": "no prompt"},
    "a temperature below zero": {"argv": "generate --base base --prompt x --temperature -1", "code": "usage"},
    "rows of length one": {"argv": "data train.jsonl --max-length 1", "code": "usage"},
    "no data to evaluate on": {"argv": "eval out", "code": "usage", "words": "--data"},
    "a form that nobody reads": {"argv": "export out --to gguf --output x", "code": "usage", "words": "gguf"},
    "no file to migrate": {"argv": "migrate nowhere.yaml", "code": "config-not-found"},
    "runs of a folder that is not there": {
        "argv": "runs nowhere",
        "code": "no-such-folder",
        "where": "nowhere: ",
    },
    "runs of a file": {"argv": "runs train.jsonl", "code": "no-such-folder"},
    "parity where an engine refuses": {
        "argv": "parity --set training.relora_steps=2",
        "code": "mlx-no-relora",
        "where": "command line: training.relora_steps: ",
    },
}

BASES_AND_ADAPTERS = {
    "no base named": {"argv": "generate --prompt x", "code": "no-base", "help": "--base"},
    "no such base": {
        "argv": "generate --base nowhere --prompt x",
        "code": "base-not-found",
        "words": "`nowhere`",
    },
    "no such adapter": {"argv": "generate --adapter nowhere --prompt x", "code": "adapter-not-found"},
    "no such adapter to evaluate": {"argv": "eval nowhere --data train.jsonl", "code": "adapter-not-found"},
    "no such adapter to merge": {"argv": "merge nowhere --output x", "code": "adapter-not-found"},
    "no such adapter to export": {
        "argv": "export nowhere --to mlx-lm --output x",
        "code": "adapter-not-found",
    },
    "a base for an adapter": {"argv": "export base --to mlx-lm --output x", "code": "adapter-not-found"},
    "no base to read data with": {"argv": "data train.jsonl --base nowhere", "code": "base-not-found"},
    "a broken template to read data with": {
        "argv": "data train.jsonl --base base --chat-template '{% if %}'",
        "code": "bad-chat-template",
        "where": "data.chat_template: ",
    },
}

PLACES = {
    "merge over something": {
        "arrange": copied,
        "argv": "merge base --output elsewhere",
        "code": "output-exists",
        "where": "elsewhere: ",
    },
    "merge below a file": {
        "argv": "merge base --output train.jsonl/x",
        "exit": 4,
        "code": "adapter-not-found",
    },
}

TEMPLATES = {
    "unknown": {
        "argv": "init --template caht --output a.yaml",
        "code": "template-unknown",
        "help": "did you mean `chat`?",
    },
    "a path for a name": {
        "argv": "init --template ../../etc/passwd --output a.yaml",
        "code": "template-unknown",
    },
    "existing output": {"argv": "init --template chat", "code": "file-exists", "help": "--force"},
    "a folder for output": {"argv": "init --template chat --output base", "code": "output-is-folder"},
    "nobody to ask": {"argv": "init --output a.yaml", "code": "template-not-named", "help": "--template"},
    "no folder of templates": {"argv": "templates --templates-dir nowhere", "code": "template-missing"},
    "a changed template": {
        "arrange": own_templates(sha256="0" * 64),
        "code": "template-changed",
        "help": "sha256",
    },
    "a manifest that names a file above": {"arrange": own_templates(file="../secret.yaml")},
    "a manifest that names an absolute file": {"arrange": own_templates(file="/etc/passwd")},
    "a manifest with NUL in a name": {"arrange": own_templates(file="a\0.yaml")},
    "a template that is a link": {"arrange": linked_template, "code": "template-outside"},
    "a broken manifest": {"arrange": broken_manifest},
}

ENVIRONMENTS = {
    "a count of processes in words": {
        "env": {"WORLD_SIZE": "two"},
        "code": "bad-launch",
        "words": "`WORLD_SIZE`",
    },
    "no processes": {"env": {"WORLD_SIZE": "0"}, "code": "bad-launch"},
    "two processes, and which is this": {"env": {"WORLD_SIZE": "2"}, "code": "bad-launch", "words": "`RANK`"},
    "a rank in words": {
        "env": {"RANK": "first"},
        "code": "bad-launch",
        "words": "`RANK` must be a whole number",
    },
    "a rank beyond the processes": {
        "env": {"RANK": "3", "WORLD_SIZE": "2"},
        "code": "bad-launch",
        "words": "from 0 to 1",
    },
    "processes that never meet": {
        "env": {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": None, "MASTER_PORT": None},
        "code": "launch-failed",
        "help": "torchrun",
    },
    "hosts in no file": {
        "env": {"MLX_HOSTFILE": "nowhere.json"},
        "code": "bad-launch",
        "words": "MLX_HOSTFILE",
    },
    "a ring that is none": {
        "argv": "train --backend mlx",
        "env": {"MLX_RANK": "0"},
        "code": "launch-failed",
        "help": "mlx.launch",
    },
}

MANIFEST = {"exit": 2, "argv": "templates chat --templates-dir mine", "code": "template-manifest"}
ROWS: dict[str, Any] = {
    f"{table}: {name}": {**defaults, **row}
    for table, rows, defaults in (
        ("command line", COMMAND_LINES, {"exit": 2}),
        ("base or adapter", BASES_AND_ADAPTERS, {"exit": 4}),
        ("place", PLACES, {"exit": 7}),
        ("template", TEMPLATES, MANIFEST),
        ("environment", ENVIRONMENTS, {"exit": 2, "argv": "train"}),
    )
    for name, row in rows.items()
}


@pytest.mark.parametrize("name", ROWS)
def test_a_wrong_command_is_answered_in_one_shape(name: str, check: Callable[[Any], Any]) -> None:
    answer = check(ROWS[name])
    assert "secret" not in answer.out


def test_no_command_at_all_shows_what_there_is(check: Callable[[Any], Any]) -> None:
    assert "Commands:" in check({"argv": "", "exit": 0}).out


def test_an_adapter_that_has_the_form_already_says_so(
    check: Callable[[Any], Any], spoiled_run: Callable[[str], Path]
) -> None:
    spoiled_run("torch")
    check({"argv": "export out --to peft --output x", "exit": 4, "code": "same-form", "help": "--to mlx-lm"})
    check({"argv": "export out --to mlx-lm --output base", "exit": 7, "code": "output-exists"})
    check({"argv": "merge out --output train.jsonl/x", "exit": 7, "code": "write-failed"})


def test_half_a_character_in_a_prompt_is_told(check: Callable[[Any], Any]) -> None:
    """What a shell passes on that is not UTF-8 reaches Python as half a surrogate pair."""
    check({"argv": "generate --base base --prompt '\udcff'", "exit": 3, "code": "broken-text"})


def test_what_the_system_refuses_is_no_bug(check: Callable[[Any], Any]) -> None:
    check(
        {
            "argv": f"merge base --output {'x' * 300}",
            "exit": 7,
            "code": "system-refused",
            "words": "File name too long",
        }
    )


def test_a_bug_asks_to_be_reported_and_shows_its_traceback_only_when_asked(
    check: Callable[[Any], Any], soupx: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that breaks: the one thing that a user cannot cause."""
    token = "hf_" + "aB3d" * 9

    def broken(*_: object) -> None:
        raise RuntimeError(f"the token is {token}")

    monkeypatch.setattr("soup_xb.core.config.pages.config_schema", broken)
    check({"argv": "schema", "exit": 1, "code": "bug", "words": "RuntimeError", "help": "report"})
    answer = soupx("--debug", "schema")
    assert answer.code == 1
    assert "Traceback" in answer.err
    assert token not in answer.err
