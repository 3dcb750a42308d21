"""What the clients are given by default: adapters that soup-xb trains on the demo's base, exports and merged models.

Everything is made by `soupx` as a user would call it, and made again where the project's source or the case has
changed. The learning rates are far above useful ones: an adapter that hardly moves a logit would agree with anything.
rsLoRA's are a quarter, since its scale is four times as large at rank 16.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rows import docstring_rows

from soup_xb.demo.base import prepare_base

PROJECT = Path(__file__).parents[1]
Settings = Mapping[str, Any]

# Three blocks whose names end alike, and one projection of all others: what `rank_pattern` is for.
BY_LAYER = {r"layers\.[0-2]\.mlp\.down_proj": 32, r"layers\.29\..*": 4}
DOCS_RANKS = {r"layers\.0\.self_attn\.q_proj": 32, "q_proj": 8, "down_proj": 8}
DOCS_ALPHAS = {r"layers\.0\.self_attn\.q_proj": 64, "q_proj": 16, "down_proj": 16}
RELORA = {"relora_steps": 2, "relora_warmup_ratio": 0.0}
MERGING = {**RELORA, "relora_mode": "merge", "relora_rewarm_steps": 1}
# Short answers, each trained on often enough that its end is learned with it.
TURNS = (
    ("What is the capital of France?", "Paris."),
    ("What is the capital of Spain?", "Madrid."),
    ("How many days has a week?", "Seven."),
    ("Which colour has the sky?", "Blue."),
)


@dataclass(frozen=True)
class Case:
    """One adapter to train: what its config says beside the common settings.

    `base` names a variant in `BASES`. `form` is what `soupx export` makes of it before the clients see it.
    `merged` asks for the whole model instead, folded by `backend`.
    """

    name: str
    lora: Settings = field(default_factory=dict)
    training: Settings = field(default_factory=dict)
    backend: str = "torch"
    base: str = "plain"
    form: str = ""
    merged: bool = False
    chats: bool = False


CASES = (
    Case("plain"),
    Case("pissa", {"init_strategy": "pissa"}, {"lr": 1e-3}),
    Case("olora", {"init_strategy": "olora"}, {"lr": 1e-3}),
    Case("ReLoRA merge", training=MERGING),
    Case("ReLoRA prune", training={**RELORA, "relora_mode": "prune", "relora_prune_ratio": 0.5}),
    Case("rank_pattern, README", {"rank_pattern": {"down_proj": 8}}),
    Case("rank_pattern by layer", {"rank_pattern": BY_LAYER}),
    Case("alpha_pattern", {"alpha_pattern": {"q_proj": 8, "down_proj": 64}}),
    Case("rsLoRA", {"use_rslora": True}, {"lr": 1.25e-3}),
    Case("pissa, rank_pattern", {"init_strategy": "pissa", "rank_pattern": {"down_proj": 8}}, {"lr": 1e-3}),
    Case("ReLoRA merge, rank_pattern", {"rank_pattern": {"down_proj": 8}}, MERGING),
    Case("rsLoRA, rank_pattern", {"use_rslora": True, "rank_pattern": {"down_proj": 8}}, {"lr": 1.25e-3}),
    Case(
        "rank and alpha pattern, one scale",
        {"rank_pattern": {"down_proj": 8}, "alpha_pattern": {"down_proj": 16}},
    ),
    Case("docs/starts.md's patterns", {"rank_pattern": DOCS_RANKS, "alpha_pattern": DOCS_ALPHAS}),
    Case("DoRA", {"use_dora": True}),
    Case("VeRA", {"use_vera": True, "r": 64}, {"lr": 3e-2}),
    Case("VeRA, exported to PEFT", {"use_vera": True, "r": 64}, {"lr": 3e-2}, form="peft"),
    Case("tied head", {"target_modules": ["lm_head", "q_proj"]}),
    Case("mlx: plain", backend="mlx"),
    Case("mlx: pissa", {"init_strategy": "pissa"}, {"lr": 1e-3}, backend="mlx"),
    Case("mlx: olora", {"init_strategy": "olora"}, {"lr": 1e-3}, backend="mlx"),
    Case(
        "mlx: patterns",
        {"rank_pattern": {"down_proj": 8}, "alpha_pattern": {"q_proj": 8}},
        backend="mlx",
    ),
    Case("merged", merged=True),
    Case("merged by mlx", backend="mlx", merged=True),
    Case("merged, linear", training={"rope_scaling": {"type": "linear", "factor": 4.0}}, merged=True),
    Case("merged, yarn", training={"rope_scaling": {"type": "yarn", "factor": 4.0}}, merged=True),
    Case("merged, llama3", base="llama3", merged=True),
    Case("other end", base="other end", training={"lr": 1e-3, "max_steps": 16}, chats=True),
    Case(
        "other end, merged", base="other end", training={"lr": 1e-3, "max_steps": 16}, chats=True, merged=True
    ),
    Case(
        "other end, merged by mlx",
        base="other end",
        training={"lr": 1e-3, "max_steps": 16},
        backend="mlx",
        chats=True,
        merged=True,
    ),
)


@dataclass(frozen=True)
class Made:
    """What a case left on the disk: `adapter` on `base`, perhaps a whole `model`, and mlx-lm's form.

    Where soupx refused to make one of them, its place is empty and `refused` holds soupx's words by what it was.
    """

    base: Path
    adapter: Path | None = None
    model: Path | None = None
    mlx_lm: Path | None = None
    refused: Mapping[str, str] = field(default_factory=dict)


class SoupxError(Exception):
    """`soupx` ended with an error; the message is its own."""


def make(case: Case, folder: Path, keep: bool = False) -> Made:
    """Train, export and merge below `folder`, or take what an earlier call made of the same source.

    With `keep` the source may have changed since.
    """
    home = folder / "made" / slug(case.name)
    digest = case_digest(case)
    stamp = home / "made.txt"
    base = variant_base(case.base, folder / "bases")
    if not stamp.is_file() or (stamp.read_text("utf-8") != digest and not keep):
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        refused = make_files(case, base, home)
        (home / "refused.json").write_text(json.dumps(refused), "utf-8")
        stamp.write_text(digest, "utf-8")
    found = {name: home / place for name, place in PLACES.items() if (home / place).is_dir()}
    if case.form and "plain" in found:
        found["adapter"] = found["plain"]
    found.pop("plain", None)
    return Made(base, **found, refused=json.loads((home / "refused.json").read_text("utf-8")))


PLACES = {"adapter": "run/adapter", "plain": "plain", "model": "merged", "mlx_lm": "mlx-lm"}


def make_files(case: Case, base: Path, home: Path) -> dict[str, str]:
    """Call soupx; what it refused, by the name of what it was to make."""
    (home / "soup.yaml").write_text(json.dumps(config_of(case, base, home), indent=2), "utf-8")
    run = str(home / "run")
    steps = {"adapter": ["train", str(home / "soup.yaml")]}
    if case.form:
        steps["plain"] = ["export", run, "--to", case.form, "--output", str(home / "plain")]
    if case.merged:
        steps["model"] = ["merge", run, "--output", str(home / "merged"), "--backend", case.backend]
    else:
        steps["mlx_lm"] = ["export", run, "--to", "mlx-lm", "--output", str(home / "mlx-lm")]
    refused = {}
    for what, words in steps.items():
        try:
            soupx(words)
        except SoupxError as error:
            refused[what] = str(error)
            if what == "adapter":
                break
    shutil.rmtree(home / "run" / "checkpoints", ignore_errors=True)
    return refused


def config_of(case: Case, base: Path, home: Path) -> dict[str, Any]:
    """The config of a case; its rows are written beside it."""
    rows: Sequence[dict[str, Any]] = docstring_rows(24)
    if case.chats:
        rows = [
            {
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": said},
                ]
            }
            for question, said in TURNS
        ] * 8
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    common = {"max_steps": 6, "batch_size": 2, "lr": 5e-3, "scheduler": "constant", "precision": "fp32"}
    return {
        "base": str(base),
        "task": "sft",
        "backend": case.backend,
        "data": {"train": str(home / "rows.jsonl"), "max_length": 96},
        "training": {**common, **case.training, "lora": {"r": 16, "alpha": 32, **case.lora}},
        "output": str(home / "run"),
    }


def soupx(words: Sequence[str]) -> None:
    """Run a command of this source tree. Raises SoupxError."""
    places = [str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, "-m", "soup_xb", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        told = [line for line in done.stderr.splitlines() if line.startswith("error[")]
        raise SoupxError((told or done.stderr.strip().splitlines() or ["no message"])[0])


def variant_base(name: str, folder: Path) -> Path:
    """The demo's base, or a folder with the same weights and other settings."""
    plain = prepare_base()
    changes = BASES[name]
    if not changes:
        return plain
    target = folder / slug(name)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in plain.iterdir():
        if file.name in changes:
            settings = {**json.loads(file.read_text("utf-8")), **changes[file.name]}
            (target / file.name).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
        elif file.name != "prepared.json":
            (target / file.name).symlink_to(file.resolve())
    return target


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 100000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
# `<|endoftext|>`, where a turn of the chat template ends with `<|im_end|>`.
OTHER_END = {"eos_token_id": 0, "pad_token_id": 0}
BASES: Mapping[str, Mapping[str, Settings]] = {
    "plain": {},
    "llama3": {"config.json": {"rope_parameters": LLAMA3_ROPE, "rope_scaling": LLAMA3_ROPE}},
    "other end": {
        "config.json": OTHER_END,
        "generation_config.json": OTHER_END,
        "tokenizer_config.json": {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    },
}


def case_digest(case: Case) -> str:
    """Changes with the case and with any line of the package."""
    digest = hashlib.sha256(repr((case, BASES[case.base], TURNS)).encode())
    for file in sorted((PROJECT / "soup_xb").rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def slug(name: str) -> str:
    """A folder's name.

    >>> slug("mlx: rank and alpha, one scale")
    'mlx-rank-and-alpha-one-scale'
    """
    return "-".join("".join(letter if letter.isalnum() else " " for letter in name.lower()).split())
