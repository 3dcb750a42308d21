"""Access tokens may stand in the environment, in foreign files and in names of folders; a run leaves and says none."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HUB, SERVICE = "hf_" + "CaNaRy" * 6, "sk-proj-" + "c4n4ry" * 7
TOKENS = (HUB, SERVICE)
VARIABLES = {
    "HF_TOKEN": HUB,
    "HUGGING_FACE_HUB_TOKEN": HUB,
    "OPENAI_API_KEY": SERVICE,
    "WANDB_API_KEY": SERVICE,
    "AWS_SECRET_ACCESS_KEY": SERVICE,
}


def leaks(folder: Path, *texts: str) -> list[str]:
    """The files below a folder, and the texts, that hold a token."""
    needles = [token.encode() for token in TOKENS]
    found = [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and any(needle in path.read_bytes() for needle in needles)
    ]
    return found + [text for text in texts if any(token in text for token in TOKENS)]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def guarded(workplace: Path, environment: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run below a folder whose name is a token, on a base whose files hold one."""
    below = workplace / HUB
    below.mkdir()
    for name in ("base", "train.jsonl", "soup.yaml"):
        shutil.move(workplace / name, below / name)
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        file = below / "base" / name
        written = json.loads(file.read_text())
        file.write_text(json.dumps({**written, "_name_or_path": f"https://me:{HUB}@hub/base"}))
    monkeypatch.chdir(below)
    return below


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_nothing_that_a_run_leaves_or_says_holds_a_token(
    backend: str, guarded: Path, check: Callable[[Any], Any]
) -> None:
    said = [
        check({"argv": f"train --backend {backend} --prompt Hello --json", "exit": 0}),
        check({"argv": "check --json", "exit": 0}),
        check({"argv": "plan --json", "exit": 0}),
        check({"argv": "runs --json", "exit": 0}),
        check({"argv": "doctor --json", "exit": 0}),
        check({"argv": "eval out --data train.jsonl --json", "exit": 0}),
        check({"argv": "export out --to mlx-lm --output there", "exit": 0}),
        check({"argv": f"merge out --output merged --backend {backend}", "exit": 0}),
        check({"argv": "train --output out", "exit": 7, "code": "output-holds-a-run"}),
    ]
    names = {path.name for path in (guarded / "out").rglob("*")}
    assert {"run.json", "metrics.jsonl", "report.html", "README.md", "adapter_config.json"} <= names
    assert leaks(guarded / "out", *(answer.out + answer.err for answer in said)) == []
    assert leaks(guarded / "there") == []
    assert leaks(guarded / "merged") == []


WHERE = {
    "the base": "--set base=./{token}/base",
    "a web address": "--set base=https://me:{token}@hub/base",
    "the data": "--set data.train=./{token}/rows.jsonl",
    "one of several files": "--set 'data.train=[train.jsonl, {token}.jsonl]'",
    "the rows to evaluate on": "--set data.eval=./{token}.jsonl",
    "a subset": "--set data.train=a/b --set data.subset={token}",
    "the adapter": "--set adapter=./{token}",
    "the output": "--set output=./{token}/out",
    "the output, as an option": "--output ./{token}/out",
    "a chat template": "--set 'data.chat_template=\"{{{{ 1 }}}} {token}\"'",
    "a pattern": "--set training.lora.target_modules={token}",
    "a rank's pattern": "--set 'training.lora.rank_pattern={{{token}: 4}}'",
    "a choice": "--set task={token}",
    "a number": "--set training.lr={token}",
    "a key": "--set {token}=1",
    "no key at all": "--set {token}",
    "the config's name": "./{token}.yaml",
    "a command's option": "--backend {token}",
    "a checkpoint's name": "--resume-from ./{token}",
}


@pytest.mark.parametrize("token", TOKENS, ids=["hub", "service"])
@pytest.mark.parametrize("name", WHERE)
def test_a_token_that_somebody_writes_is_never_shown_nor_saved(
    name: str, token: str, environment: None, soupx: Callable[..., Any], workplace: Path
) -> None:
    words = shlex.split(WHERE[name].format(token=token))
    answer = soupx("train", *words)
    assert answer.code in (2, 5), answer.err
    assert "error[" in answer.err
    assert leaks(workplace / "out", answer.out, answer.err) == []


def test_a_failed_run_does_not_save_the_token_in_its_message(
    environment: None, workplace: Path, check: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that puts a token into its error, in the middle of a run."""

    def broken(*_: object) -> None:
        raise RuntimeError(f"403 for https://me:{HUB}@hub")

    monkeypatch.setattr("soup_xb.runs.train.run_loop", broken)
    answer = check({"argv": "train", "exit": 1, "code": "bug"})
    assert json.loads((workplace / "out" / "run.json").read_text())["status"] == "failed"
    assert leaks(workplace / "out", answer.err) == []


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        (f"Bearer {SERVICE}", True),
        ("ghp_" + "a1B2" * 9, True),
        ("glpat-" + "a1B2" * 5, True),
        ("xoxb-123456789012-" + "a1B2" * 6, True),
        ("AKIA" + "ABCD1234" * 2, True),
        ("AIza" + "SyA1" * 9, True),
        ("hf_smollm_tuned/checkpoint-1000", False),
        ("./risk-adjusted-returns-of-many-years", False),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", False),
        ("model.layers.0.self_attn.q_proj", False),
        ("3f786850e387550fdab836ed7e6dc881de23001b", False),
    ],
)
def test_what_looks_like_a_token_is_masked_and_nothing_else(text: str, hidden: bool) -> None:
    from soup_xb.core.text import holds_token, masked

    assert holds_token(text) is hidden
    assert (masked(text) == text) is not hidden
