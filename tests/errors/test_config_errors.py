"""The error table, part one: what can be wrong with a config file and with `--set`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from soup_xb.core.config.checks import DEPENDENCES
from soup_xb.core.config.schema import KEYS
from soup_xb.core.config.support_rows import ROWS as FEATURES

LEAST = "base: tiny\ndata:\n  train: rows.jsonl\n"


def training(line: str) -> str:
    """A config whose line 5 is below `training`."""
    return f"{LEAST}training:\n  {line}\n"


def lora(line: str) -> str:
    """A config whose line 6 is below `training.lora`."""
    return f"{LEAST}training:\n  lora:\n    {line}\n"


def no_file(place: Path) -> None:
    (place / "soup.yaml").unlink()


def large_file(place: Path) -> None:
    with (place / "soup.yaml").open("wb") as file:
        file.truncate(100_000_000)


FILES = {
    "no file": {
        "arrange": no_file,
        "argv": "check",
        "code": "config-not-found",
        "where": "soup.yaml: ",
        "help": "create it",
    },
    "no file, to train on": {"arrange": no_file, "argv": "train", "code": "config-not-found"},
    "near name": {"argv": "check soup.yml", "code": "config-not-found", "help": "did you mean `soup.yaml`?"},
    "a folder": {
        "argv": "check base",
        "code": "config-is-folder",
        "where": "base: ",
        "help": "name the file",
    },
    "a path below a file": {"argv": "check soup.yaml/x.yaml", "code": "config-not-found"},
    "a name that no disk takes": {
        "argv": f"check {'x' * 300}",
        "code": "config-unreadable",
        "words": "too long",
    },
    "empty": {"text": "", "argv": "check", "code": "config-empty", "words": "is empty", "help": "`base:`"},
    "only a comment": {"text": "# later\n", "argv": "check", "code": "config-empty"},
    "a list": {"text": "- base\n", "code": "not-a-mapping", "where": "soup.yaml:1: ", "words": "got a list"},
    "a word": {"text": "hello\n", "code": "not-a-mapping", "words": 'got "hello"'},
    "data instead of a config": {
        "argv": "check train.jsonl",
        "code": "yaml-syntax",
        "where": "train.jsonl:2: ",
    },
    "100 MB": {"arrange": large_file, "code": "config-too-large", "words": "256 KiB"},
    "UTF-16": {"text": LEAST.encode("utf-16"), "code": "config-not-utf8", "where": "soup.yaml:1: "},
    "Latin-1": {"text": b"base: x\nname: caf\xe9\n", "code": "config-not-utf8", "where": "soup.yaml:2: "},
    "a NUL": {"text": "base: a\0b\n", "code": "control-character", "words": "U+0000"},
}

SYNTAX = {
    "a tab": {
        "text": "base: x\ndata:\n\ttrain: y\n",
        "code": "yaml-syntax",
        "where": "soup.yaml:3: ",
        "words": ("line 3, column 1", "a tab is used"),
        "help": "replace the tab",
    },
    "an unclosed quote": {
        "text": 'base: "x\ndata: y\n',
        "code": "yaml-syntax",
        "where": "soup.yaml:1: ",
        "words": ("column 7", "a quote is opened and never closed"),
        "help": "close the quote",
    },
    "an unclosed bracket": {
        "text": "base: x\ndata: {train: [a, b\n",
        "code": "yaml-syntax",
        "where": "soup.yaml:2: ",
        "words": "`[` is opened",
    },
    "a colon in a text": {"text": "base: a: b\n", "code": "yaml-syntax", "help": "quote a text"},
    "wrong indentation": {"text": "base: x\n data: y\n", "code": "yaml-syntax", "where": "soup.yaml:2: "},
    "a duplicate key": {
        "text": LEAST + "base: other\n",
        "code": "duplicate-key",
        "where": "soup.yaml:4: ",
        "words": "`base` is given twice: lines 1 and 4",
    },
    "a tag that would run code": {
        "text": "base: !!python/object/apply:os.system [id]\n",
        "code": "yaml-tag",
        "where": "soup.yaml:1: ",
        "words": "not allowed",
    },
    "an alias bomb": {
        "text": "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n",
        "code": "yaml-alias",
        "words": "anchor (`&a`) is not allowed",
    },
    "nested 3,000 deep": {"text": "a: " + "[" * 3000, "code": "yaml-too-deep", "words": "32 deep"},
    "two documents": {"text": LEAST + "---\n" + LEAST, "code": "yaml-documents", "where": "soup.yaml:4: "},
    "a directive": {"text": "%YAML 1.1\n---\n" + LEAST, "code": "yaml-directive"},
    "a key that is a list": {"text": "? [a, b]\n: c\n", "code": "yaml-key"},
    "an escape that names no character": {"text": 'base: "\\UFFFFFFFF"\n', "code": "yaml-syntax"},
}

VALUES = {
    "an unknown key": {
        "text": training("lora: {}\n  rnak: 8"),
        "code": "unknown-key",
        "where": "soup.yaml:6: training.rnak: ",
        "words": "no such key",
        "help": "did you mean",
    },
    "a slip of the keyboard": {"text": training("learing_rate: 1e-4"), "code": "unknown-key", "help": "`lr`"},
    "another tool's name": {
        "text": training("lora_r: 8"),
        "code": "unknown-key",
        "help": "`training.lora.r`",
    },
    "a key in the wrong section": {
        "text": LEAST + "epochs: 3\n",
        "code": "unknown-key",
        "help": "`training.epochs`",
    },
    "no base": {"text": "data: {train: x.jsonl}\n", "code": "missing-key", "where": "soup.yaml: base: "},
    "no data": {"text": "base: tiny\n", "code": "missing-key", "where": "soup.yaml: data.train: "},
    "a key without a value": {
        "text": training("lr:"),
        "code": "missing-value",
        "where": "soup.yaml:5: training.lr: ",
    },
    "a section that is a list": {"text": "base: x\ndata: [a]\n", "code": "wrong-type", "words": "got a list"},
    "lr: fast": {
        "text": training("lr: fast"),
        "code": "wrong-type",
        "where": "soup.yaml:5: training.lr: ",
        "words": ("must be a number", '"fast"'),
    },
    "lr: -1": {"text": training("lr: -1"), "code": "out-of-range", "words": ("above 0", "got -1")},
    "lr: .nan": {"text": training("lr: .nan"), "code": "not-finite", "words": "finite"},
    "lr: .inf": {"text": training("lr: .inf"), "code": "not-finite", "words": "got inf"},
    "lr: 1e400": {"text": training("lr: 1e400"), "code": "not-finite"},
    "epochs: 0": {"text": training("epochs: 0"), "code": "out-of-range", "words": ("1 to 10000", "got 0")},
    "epochs: twenty digits": {"text": training("epochs: 99999999999999999999"), "code": "out-of-range"},
    "batch_size: '4'": {
        "text": training("batch_size: '4'"),
        "code": "wrong-type",
        "words": 'got "4"',
        "help": "without quotes",
    },
    "seed: -1": {"text": training("seed: -1"), "code": "out-of-range"},
    "gradient_checkpointing: yes": {
        "text": training("gradient_checkpointing: yes"),
        "code": "wrong-type",
        "words": ("true or false", '"yes"'),
    },
    "r: 0": {"text": lora("r: 0"), "code": "out-of-range", "where": "soup.yaml:6: training.lora.r: "},
    "r: 1.9": {"text": lora("r: 1.9"), "code": "wrong-type", "words": "got 1.9"},
    "r: true": {"text": lora("r: true"), "code": "wrong-type", "words": "got true"},
    "dropout: 1.0": {"text": lora("dropout: 1.0"), "code": "out-of-range", "words": "below 1"},
    "a rank that is a bool": {
        "text": lora("rank_pattern: {q_proj: true}"),
        "code": "wrong-type",
        "where": "soup.yaml:6: training.lora.rank_pattern: ",
        "words": "`q_proj` must be an integer, got true",
    },
    "257 patterns": {
        "text": lora("rank_pattern: {" + ", ".join(f"m{index}: 4" for index in range(257)) + "}"),
        "code": "too-many-patterns",
        "words": ("257", "at most 256"),
    },
    "a rank of 1025": {
        "text": lora("rank_pattern: {q_proj: 1025}"),
        "code": "out-of-range",
        "words": "1 to 1024",
    },
    "an empty pattern": {"text": lora("rank_pattern: {'': 4}"), "code": "bad-pattern", "words": "is empty"},
    "a pattern with NUL": {"text": lora('rank_pattern: {"a\\0": 4}'), "code": "bad-pattern", "words": "NUL"},
    "a pattern of 2,000 characters": {"text": lora(f"target_modules: {'x' * 2000}"), "code": "bad-pattern"},
    "an access token": {
        "text": f"base: hf_{'aB3d' * 9}\ndata: {{train: x}}\n",
        "code": "access-token",
        "where": "soup.yaml:1: base: ",
        "help": "hf auth login",
    },
    "init_strategy: pizza": {
        "text": lora("init_strategy: pizza"),
        "code": "unknown-choice",
        "words": "random, pissa, olora",
        "help": "did you mean `pissa`?",
    },
    "an empty list of files": {
        "text": "base: x\ndata: {train: []}\n",
        "code": "wrong-type",
        "words": "an empty list",
    },
    "an escape sequence in a path": {
        "text": 'base: "\\e[31mx"\ndata: {train: x}\n',
        "code": "control-character",
    },
    "a token for a key": {"text": LEAST + f"sk-proj-{'a1B2' * 8}: 1\n", "code": "unknown-key"},
}

CONTRADICTIONS = {
    "use_olora beside pissa": {
        "text": lora("use_olora: true\n    init_strategy: pissa"),
        "code": "contradiction",
        "words": ("line 6", "line 7"),
    },
    "patterns beside VeRA": {
        "text": lora("use_vera: true\n    rank_pattern: {q_proj: 8}"),
        "argv": "check --backend torch",
        "code": "contradiction",
        "words": ("use_vera", "line 6"),
    },
    "pissa beside DoRA": {"text": lora("use_dora: true\n    init_strategy: pissa"), "code": "contradiction"},
    "two ways of warming up": {
        "text": training("warmup_steps: 5\n  warmup_ratio: 0.1"),
        "code": "key-without-effect",
    },
    "relora keys without relora_steps": {
        "text": training("relora_prune_ratio: 0.5"),
        "code": "key-without-effect",
        "help": "training.relora_steps",
    },
    "prune ratio for a merge": {
        "text": training("relora_steps: 5\n  relora_mode: merge\n  relora_prune_ratio: 0.5"),
        "code": "key-without-effect",
        "where": "soup.yaml:7: ",
    },
    "merge into a quantized base": {
        "text": training("relora_steps: 5\n  relora_mode: merge\n  quantization: 4bit"),
        "code": "contradiction",
        "words": "quantized base",
    },
    "rewarming longer than the restarts are apart": {
        "text": training("relora_steps: 5\n  relora_mode: merge\n  relora_rewarm_steps: 5"),
        "code": "contradiction",
    },
    "two sets to evaluate on": {
        "text": "base: x\ndata: {train: a.jsonl, eval: b.jsonl, val_split: 0.1}\n",
        "code": "contradiction",
        "words": "data.eval",
    },
    "evaluation without rows": {
        "text": training("eval_steps: 5"),
        "code": "contradiction",
        "help": "data.val_split",
    },
    "a column that no row of the task has": {
        "text": LEAST + "  columns:\n    instruciton: question\n",
        "code": "unknown-column",
        "where": "soup.yaml:5: data.columns.instruciton: ",
        "words": "our name comes first",
        "help": "did you mean `instruction`?",
    },
    "a column that the format does not have": {
        "text": LEAST + "  format: text\n  columns: {output: answer}\n",
        "code": "unknown-column",
        "words": "format text",
        "help": "our names: text.",
    },
    "columns in a list": {
        "text": LEAST + "  columns: [question, answer]\n",
        "code": "wrong-type",
        "where": "soup.yaml:4: data.columns: ",
        "help": "{instruction: question, output: answer}",
    },
    "a column by a number": {
        "text": LEAST + "  columns: {text: 3}\n",
        "code": "wrong-type",
        "words": "`text` must be text, got 3",
    },
    "a split of a local file": {"text": LEAST + "  split: test\n", "code": "key-without-effect"},
    "streaming without steps": {
        "text": "base: x\ndata:\n  train: org/rows\n  streaming: true\n",
        "code": "streaming-without-steps",
        "where": "soup.yaml:4: data.streaming: ",
        "help": "training.max_steps",
    },
    "streaming a local file": {
        "text": "base: x\ndata: {train: a.jsonl, streaming: true}\ntraining: {max_steps: 2}\n",
        "code": "streaming-local-data",
        "where": "soup.yaml:2: data.train: ",
        "words": "tokenized into the cache",
    },
    "streaming several datasets": {
        "text": "base: x\ndata: {train: [org/rows, org/more], streaming: true}\ntraining: {max_steps: 2}\n",
        "code": "streaming-several",
        "words": "how many rows each gives",
    },
    "evaluating on a hub dataset beside streaming": {
        "text": "base: x\ndata: {train: org/a, eval: org/b, streaming: true}\ntraining: {max_steps: 2}\n",
        "code": "streaming-eval",
        "help": "data.val_split",
    },
    "streaming rows that name pictures": {
        "text": "base: x\ntask: vision\ndata: {train: org/a, streaming: true}\ntraining: {max_steps: 2}\n",
        "argv": "check --backend torch",
        "code": "contradiction",
        "words": "image files",
    },
    "streaming rows that name sounds": {
        "text": "base: x\ntask: audio\ndata: {train: org/a, streaming: true}\ntraining: {max_steps: 2}\n",
        "argv": "check --backend torch",
        "code": "contradiction",
        "words": "audio files",
    },
    "output into the base": {
        "text": "base: ./m\ndata: {train: a.jsonl}\noutput: m\n",
        "code": "contradiction",
        "where": "soup.yaml:3: output: ",
    },
    "every problem in one round": {
        "text": LEAST + "training:\n  precision: fp16\n  lr: -1\n  lora: {r: 0, rnak: 1}\n",
        "argv": "check --backend torch",
        "code": ["torch-no-fp16", "out-of-range", "unknown-key", "out-of-range"],
    },
    "several refusals at once": {
        "text": LEAST + "task: vision\ntraining: {relora_steps: 5, precision: fp16}\n",
        "argv": "check --backend mlx",
        "code": ["mlx-no-vision", "mlx-no-fp16", "mlx-no-relora"],
    },
}

OVERRIDES = {
    "no value": {
        "argv": "check --set lr=",
        "code": "override",
        "where": "command line: ",
        "words": "not key=value",
    },
    "no equals sign": {"argv": "check --set a", "code": "override", "help": "--set training.lr=1e-4"},
    "no key": {"argv": "check --set =5", "code": "override"},
    "unknown": {
        "argv": "check --set training.lora.rr=8",
        "code": "unknown-key",
        "where": "command line: training.lora.rr: ",
        "help": "`training.lora.r`",
    },
    "a section": {"argv": "check --set training.lora=8", "code": "override", "words": "is a section"},
    "broken YAML": {"argv": "check --set training.lr=[", "code": "yaml-syntax"},
    "a tag": {"argv": "check --set 'base=!!python/name:os.system'", "code": "yaml-tag"},
    "an entry of a map": {"argv": "check --set training.lora.rank_pattern.q_proj=8", "code": "unknown-key"},
    "out of range": {
        "argv": "check --set training.lr=2",
        "code": "out-of-range",
        "where": "command line: training.lr: ",
    },
    "all of them": {"argv": "check --set a --set training.lr=x", "code": ["wrong-type", "override"]},
}

# Written in ways that people use, and meant to be taken.
ACCEPTED = {
    "a byte order mark": {"text": "\ufeff" + LEAST},
    "line ends of Windows": {"text": LEAST.replace("\n", "\r\n")},
    "2e-4 and 1_000 are numbers": {"text": training("lr: 2e-4\n  max_steps: 1_000")},
    "a quoted number where a float stands": {"text": training("lr: '1e-4'")},
    "a date is a name": {"text": LEAST + "output: 2026-01-01\n"},
    "a warning leaves the exit code": {
        "argv": "check --set training.max_steps=5 --set training.epochs=2",
        "tells": "warning[key-without-effect] command line: training.epochs: ",
    },
}

ROWS: dict[str, Any] = {
    f"{table}: {name}": {"argv": "check", "exit": 2, **row}
    for table, rows in {
        "file": FILES,
        "syntax": SYNTAX,
        "value": VALUES,
        "contradiction": CONTRADICTIONS,
        "--set": OVERRIDES,
    }.items()
    for name, row in rows.items()
}


@pytest.mark.parametrize("name", ROWS)
def test_a_wrong_config_is_answered_in_one_shape(name: str, check: Callable[[Any], Any]) -> None:
    answer = check(ROWS[name])
    assert answer.out == ""


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_people_write_is_taken(name: str, check: Callable[[Any], Any]) -> None:
    check({"argv": "check", "exit": 0, **ACCEPTED[name]})


# Keys without which a choice means nothing.
NEEDED: dict[str, dict[str, object]] = {
    "task=grpo": {"training.rewards": "exact-match"},
    "task=rlhf": {"training.reward_model": "judge"},
    "training.rope_scaling.type=dynamic": {"training.rope_scaling.factor": 2},
}


def _asking(row: Any) -> list[str]:
    """`--set` words that ask for the feature of a support row, with the keys that it means something beside."""
    wanted = dict(NEEDED.get(row.name, {}))
    for dependence in DEPENDENCES:
        if dependence.key == row.key:
            wanted[dependence.on] = 5 if dependence.absent else dependence.values[0]
    if row.key == "data.format":
        wanted["task"] = {"preference": "dpo", "unpaired-preference": "kto"}[row.choice]
    key = KEYS[row.key]
    # Another value than the default that its range holds.
    value = {"boolean": "true", "number": 0.25}.get(key.kind, 5)
    wanted[row.key] = row.choice or value
    return [word for name, asked in wanted.items() for word in ("--set", f"{name}={asked}")]


REFUSED = [
    (backend, row)
    for backend in ("torch", "mlx")
    for row in FEATURES
    if row.answer(backend) is not None and not row.follows and " " not in row.choice
]


@pytest.mark.parametrize(
    ("backend", "row"), REFUSED, ids=[f"{backend}-{row.name}" for backend, row in REFUSED]
)
def test_each_feature_that_a_backend_refuses_says_because_and_instead(
    backend: str, row: Any, soupx: Callable[..., Any], workplace: Path
) -> None:
    (workplace / "soup.yaml").write_text(LEAST)
    answer = soupx("check", "--backend", backend, *_asking(row))
    assert answer.code == 2, answer.err
    no = row.answer(backend)
    lines = answer.err.splitlines()
    told = next(place for place, line in enumerate(lines) if f"error[{backend}-no-{row.feature}]" in line)
    assert f"command line: {row.key}: " in lines[told]
    assert no.because in lines[told]
    assert no.instead.rstrip(".") in lines[told + 1]
    codes = [line.partition("]")[0] for line in lines if line.startswith("error[")]
    assert all(f"[{backend}-no-" in code for code in codes), answer.err


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_a_backend_that_is_not_installed_says_what_to_install(
    backend: str, check: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # So Python answers for a package that cannot be imported.
    monkeypatch.setitem(sys.modules, backend, None)
    check(
        {
            "argv": f"train --backend {backend}",
            "exit": 2,
            "code": "backend-not-installed",
            "words": f"`{backend}`",
            "help": f'pip install "soup-xb[{backend}]"',
        }
    )
