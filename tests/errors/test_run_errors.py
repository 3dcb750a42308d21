"""The error table, part five: targets, output folders, checkpoints and a resume."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

CHECKPOINT = "out/checkpoints/step-00000002"
Act = Callable[[Path], Any]


def content(file: str, text: str | bytes) -> Act:
    def act(place: Path) -> None:
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        (place / file).write_bytes(text if isinstance(text, bytes) else text.encode())

    return act


def flipped(file: str) -> Act:
    def act(place: Path) -> None:
        found = bytearray((place / file).read_bytes())
        found[len(found) // 2] ^= 1
        (place / file).write_bytes(bytes(found))

    return act


def gone(file: str) -> Act:
    return lambda place: shutil.rmtree(place / file) if (place / file).is_dir() else (place / file).unlink()


def manifest(change: Callable[[dict[str, Any]], object]) -> Act:
    """Rewrites the manifest of the checkpoint after a change, its own sha256 right: a forgery, no damage."""

    def act(place: Path) -> None:
        file = place / CHECKPOINT / "manifest.json"
        written = json.loads(file.read_text())
        del written["sha256"]
        change(written)
        text = json.dumps(written, sort_keys=True, separators=(",", ":"))
        file.write_text(json.dumps({**written, "sha256": hashlib.sha256(text.encode()).hexdigest()}))

    return act


def forged(name: str, change: Act) -> Act:
    """Changes a file of the checkpoint and vouches for it in the manifest."""

    def act(place: Path) -> None:
        file = place / CHECKPOINT / name
        change(file)
        found = file.read_bytes()

        def vouch(written: dict[str, Any]) -> None:
            entry = next(entry for entry in written["files"] if entry["name"] == name)
            entry.update(bytes=len(found), sha256=hashlib.sha256(found).hexdigest())

        manifest(vouch)(place)

    return act


def arrays(change: Callable[[Any], Any]) -> Act:
    """Applies a change to every tensor of a file."""
    return lambda file: save_file({name: change(array) for name, array in load_file(file).items()}, file)


def listed(name: str) -> Act:
    """Lists one more file in the manifest."""
    entry = {"name": name, "bytes": 1, "sha256": "0" * 64}
    return manifest(lambda written: written["files"].append(entry))


def linked(place: Path) -> None:
    (place / CHECKPOINT / "settings.json").rename(place / "settings.json")
    (place / CHECKPOINT / "settings.json").symlink_to(place / "settings.json")


TARGETS = {
    "a pattern that matches nothing": {
        "argv": "train --set training.lora.target_modules=q_pro",
        "code": "pattern-without-module",
        "where": "command line: training.lora.target_modules: ",
        "words": "`q_pro` matches none of the",
        "help": "q_proj",
    },
    "a rank for nothing": {
        "argv": "plan --set 'training.lora.rank_pattern={w_proj: 4}'",
        "code": "pattern-without-module",
        "help": "close names",
    },
    "a rank for what is not adapted": {
        "argv": "train --set training.lora.target_modules=q_proj --set 'training.lora.rank_pattern={v_proj: 4}'",
        "code": "pattern-outside-targets",
    },
    "a pattern that is none": {
        "argv": "train --set 'training.lora.target_modules=(.w'",
        "code": "bad-pattern",
        "words": "not a regular expression",
    },
    "a pattern that only some readers know": {
        "argv": "train --set 'training.lora.target_modules=\"(?R)\"'",
        "code": "bad-pattern",
    },
    "a pattern nested 400 deep": {
        "argv": f"train --set 'training.lora.target_modules=\"{'(' * 400}q{')' * 400}\"'",
        "code": "bad-pattern",
    },
    "a pattern that runs away": {
        "argv": """train --set 'training.lora.target_modules="(?:.|..|...)*[A-Z]"'""",
        "code": "runaway-pattern",
        "words": "takes more than",
        "help": "a repetition inside a repetition",
    },
    "relora longer than the run": {
        "argv": "train --backend torch --set training.relora_steps=500",
        "code": "no-restart",
        "where": "training.relora_steps: ",
        "words": ("no restart would happen", "500", "4 steps"),
    },
    "a batch that does not split": {
        "argv": "plan --processes 3",
        "code": "batch-not-divisible",
        "where": "soup.yaml: training.batch_size: ",
        "help": "use 3",
    },
    "a rank above a module's side for pissa": {
        "argv": "plan --set training.lora.r=128 --set training.lora.init_strategy=pissa",
        "code": "rank-above-side",
        "words": "above 64",
    },
}

OUTPUTS = {
    "a file": {"arrange": content("out", "mine"), "code": "output-is-file", "where": "out: "},
    "below a file": {"argv": "train --output train.jsonl/out", "code": "output-is-file"},
    "a device": {"argv": "train --output /dev/null", "code": "output-is-file"},
    "a name that no disk takes": {
        "argv": f"train --output {'x' * 300}",
        "code": "write-failed",
        "words": "too long",
    },
    "where nobody may write": {
        "argv": "train --output /proc/out",
        "code": "write-failed",
        "where": "/proc/out: ",
    },
    "a file in place of its adapter": {
        "arrange": content("out/adapter", "mine"),
        "code": "in-the-way",
        "where": "out/adapter: ",
    },
    "a folder in place of its report": {
        "arrange": content("out/report.html/x", "mine"),
        "code": "in-the-way",
    },
    "a lock that is a folder": {"arrange": content("out/.lock/x", "mine"), "code": "write-failed"},
}

HELD = {
    "a run": {
        "argv": "train",
        "code": "output-holds-a-run",
        "where": "out: ",
        "words": "`run.json`",
        "help": "--overwrite",
    },
    "--resume beside --overwrite": {"argv": "train --resume --overwrite", "exit": 2, "code": "contradiction"},
    "a resume of a finished run": {"argv": "train --resume", "exit": 0},
}

CHECKPOINTS = {
    "no such checkpoint": {
        "argv": "train --resume-from nowhere",
        "code": "no-checkpoint",
        "where": "nowhere: ",
    },
    "a file": {"argv": "train --resume-from soup.yaml", "code": "no-checkpoint"},
    "a flipped byte": {
        "arrange": flipped(f"{CHECKPOINT}/factors.safetensors"),
        "words": "`factors.safetensors` has changed since it was written",
        "help": "--resume-from",
    },
    "no optimizer state": {
        "arrange": gone(f"{CHECKPOINT}/optimizer.safetensors"),
        "words": "`optimizer.safetensors` is missing",
    },
    "an empty file": {"arrange": content(f"{CHECKPOINT}/factors.safetensors", ""), "words": "0 bytes"},
    "no manifest": {"arrange": gone(f"{CHECKPOINT}/manifest.json"), "words": "manifest.json is missing"},
    "a manifest cut off": {
        "arrange": content(f"{CHECKPOINT}/manifest.json", '{"step": 2'),
        "words": "not valid JSON",
    },
    "a manifest with a flipped byte": {
        "arrange": flipped(f"{CHECKPOINT}/manifest.json"),
        "words": "manifest.json",
    },
    "a manifest nested 90,000 deep": {"arrange": content(f"{CHECKPOINT}/manifest.json", "[" * 90_000)},
    "a name above the folder": {"arrange": listed("../../secret"), "words": "leaves the folder"},
    "an absolute name": {"arrange": listed("/etc/passwd"), "words": "leaves the folder"},
    "a name with NUL": {"arrange": listed("a\0b"), "words": "leaves the folder"},
    "a name with a backslash": {"arrange": listed("..\\secret"), "words": "leaves the folder"},
    "a link out of the folder": {"arrange": linked, "words": "symbolic link"},
    "no files": {"arrange": manifest(lambda written: written.update(files=[])), "words": "at least one"},
    "another step": {"arrange": manifest(lambda written: written.update(step=9)), "words": "step 9"},
    "a format of the future": {
        "arrange": manifest(lambda written: written.update(version=99)),
        "words": "version 99",
    },
    "other process count": {
        "arrange": manifest(lambda written: written.update(processes=4)),
        "code": "other-process-count",
        "words": "written by 4 processes",
    },
    "other data": {
        "arrange": content("train.jsonl", '{"text": "Something else."}\n' * 50),
        "code": "changed-data",
        "help": "--overwrite",
    },
    "a changed setting": {
        "argv": f"train --resume-from {CHECKPOINT} --set training.lr=0.5",
        "code": "changed-setting",
        "words": "`training.lr` was 0.0002 and is 0.5",
    },
    "settings nested 90,000 deep": {
        "arrange": forged("settings.json", lambda file: file.write_text("[" * 90_000)),
        "where": f"{CHECKPOINT}/settings.json: ",
    },
    "settings that are a list": {"arrange": forged("settings.json", lambda file: file.write_text("[]"))},
    "state of another shape": {
        "arrange": forged("optimizer.safetensors", arrays(lambda array: array[..., None])),
        "code": "foreign-checkpoint",
    },
    "state of another type": {
        "arrange": forged("optimizer.safetensors", arrays(lambda array: array.astype(np.int64))),
        "words": "float32",
    },
    "state that is not finite": {
        "arrange": forged("factors.safetensors", arrays(lambda array: np.full_like(array, np.nan))),
        "words": "finite",
    },
    "factors of another module": {
        "arrange": forged(
            "factors.safetensors", lambda file: save_file({"x.lora_A": np.zeros((4, 4), np.float32)}, file)
        ),
        "code": "foreign-checkpoint",
    },
}


@pytest.mark.parametrize("backend", ["torch", "mlx"])
@pytest.mark.parametrize("name", TARGETS)
def test_targets_that_cannot_be_are_named(
    name: str, backend: str, check: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("soup_xb.core.base.patterns.SECONDS_PER_PATTERN", 0.2)
    row: dict[str, Any] = {"exit": 2, **TARGETS[name]}
    argv = row["argv"] if "--backend" in row["argv"] else f"{row['argv']} --backend {backend}"
    check({**row, "argv": argv})


def test_patterns_that_disagree_are_a_warning_that_names_both(check: Callable[[Any], Any]) -> None:
    check(
        {
            "argv": "plan --set 'training.lora.rank_pattern={q_proj: 4, .*_proj: 2}'",
            "exit": 0,
            "tells": ("warning[patterns-disagree]", "`q_proj` and `.*_proj`"),
        }
    )


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_that_cannot_be_is_told_before_any_training(
    name: str, check: Callable[[Any], Any], workplace: Path
) -> None:
    answer = check({"argv": "train", "exit": 7, **OUTPUTS[name]})
    assert "step 1/" not in answer.err
    assert list(workplace.rglob("mine")) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_exits_7(check: Callable[[Any], Any], workplace: Path) -> None:
    (workplace / "closed").mkdir(mode=0o500)
    check({"argv": "train --output closed/out", "exit": 7, "code": "not-writable"})


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """A disk that takes no file larger than this."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_a_full_disk_names_path_and_need(backend: str, check: Callable[[Any], Any], workplace: Path) -> None:
    with files_up_to(20_000):
        check(
            {
                "argv": f"train --backend {backend}",
                "exit": 7,
                "code": "disk-full",
                "where": CHECKPOINT,
                "words": ("this write needs", "are free"),
                "help": "free some space",
            }
        )
    assert not (workplace / CHECKPOINT).exists()


@pytest.mark.parametrize("name", HELD)
def test_a_folder_that_holds_a_run_is_not_written_over(
    name: str, check: Callable[[Any], Any], spoiled_run: Callable[[str], Path]
) -> None:
    folder = spoiled_run("torch")
    before = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    answer = check({"exit": 7, **HELD[name]})
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == before
    if answer.code == 0:
        assert "already complete at step 4" in answer.out


@pytest.mark.parametrize("backend", ["torch", "mlx"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_wrong_checkpoint_is_named_and_never_trained_on(
    name: str, backend: str, check: Callable[[Any], Any], spoiled_run: Callable[[str], Path]
) -> None:
    folder = spoiled_run(backend)
    shutil.rmtree(folder / "adapter")
    row: dict[str, Any] = {
        "argv": f"train --resume-from {CHECKPOINT}",
        "exit": 5,
        "code": "checkpoint-damaged",
        **CHECKPOINTS[name],
    }
    answer = check({**row, "argv": f"{row['argv']} --backend {backend}"})
    assert "step 3/" not in answer.err
    assert not (folder / "adapter").exists()


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_a_resume_passes_over_a_damaged_checkpoint_and_says_so(
    backend: str, check: Callable[[Any], Any], spoiled_run: Callable[[str], Path]
) -> None:
    folder = spoiled_run(backend)
    shutil.rmtree(folder / "adapter")
    flipped("out/checkpoints/step-00000004/factors.safetensors")(folder.parent)
    check(
        {
            "argv": f"train --resume --backend {backend}",
            "exit": 0,
            "tells": ("out/checkpoints/step-00000004", "going on after step 2"),
        }
    )


def test_a_resume_without_a_checkpoint_starts_fresh_and_says_so(check: Callable[[Any], Any]) -> None:
    check({"argv": "train --resume", "exit": 0, "tells": "no whole checkpoint to resume from"})


def test_a_link_in_the_output_folder_is_replaced_and_what_it_points_to_stays(
    check: Callable[[Any], Any], spoiled_run: Callable[[str], Path]
) -> None:
    folder = spoiled_run("torch")
    shutil.rmtree(folder / "adapter")
    (folder.parent / "elsewhere").mkdir()
    (folder.parent / "elsewhere" / "mine.txt").write_text("mine")
    (folder / "adapter").symlink_to(folder.parent / "elsewhere")
    check({"argv": "train --overwrite", "exit": 0})
    assert [file.name for file in (folder.parent / "elsewhere").iterdir()] == ["mine.txt"]
    assert not (folder / "adapter").is_symlink()
