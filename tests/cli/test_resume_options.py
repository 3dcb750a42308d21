"""What may differ when a run goes on, and the warm start from a checkpoint."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from soup_xb.core.run.manifest import fingerprint

Soupx = Callable[..., Any]
Config = Callable[..., Path]


@pytest.fixture
def rows(tmp_path: Path, chat_file: Path) -> Path:
    """Rows of the test's own, which it may change."""
    return Path(shutil.copy(chat_file, tmp_path / "rows.jsonl"))


@pytest.fixture
def config(tmp_path: Path, tiny_llama: Path, rows: Path) -> Config:
    """Writes a small config that saves every third step; keyword arguments are keys of `training`."""

    def write(backend: str = "torch", **training: Any) -> Path:
        settings = {
            "max_steps": 6,
            "save_steps": 3,
            "lr": 0.005,
            "batch_size": 4,
            "lora": {"r": 4},
            **training,
        }
        content = {
            "base": str(tiny_llama),
            "backend": backend,
            "data": {"train": str(rows), "val_split": 0.1, "max_length": 128},
            "training": settings,
            "output": str(tmp_path / "out"),
        }
        file = tmp_path / "soup.yaml"
        file.write_text(json.dumps(content, indent=1))
        return file

    return write


@pytest.fixture
def cut(soupx: Soupx, config: Config, tmp_path: Path) -> Path:
    """A whole run's checkpoint of its third step of six."""
    done = soupx("train", config())
    assert done.code == 0, done.err
    return tmp_path / "out" / "checkpoints" / "step-00000003"


def test_a_clock_in_the_chat_template_tells_the_day_of_the_first_start(
    soupx: Soupx, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on(day: str) -> None:
        today = SimpleNamespace(isoformat=lambda: day)
        monkeypatch.setattr("soup_xb.data.chat_template.date", SimpleNamespace(today=lambda: today))

    file, out = config(), tmp_path / "out"
    content = json.loads(file.read_text())
    content["data"]["chat_template"] = (
        "{{ strftime_now('%d %B') }}{% for m in messages %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    file.write_text(json.dumps(content))
    on("2025-06-14")
    assert soupx("train", file).code == 0
    whole = factors(out)
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    shutil.rmtree(out / "adapter")
    on("2025-06-15")
    done = soupx("train", file, "--resume")
    assert done.code == 0, done.err
    assert "2025-06-14" in done.err
    assert json.loads((out / "run.json").read_text())["day"] == "2025-06-14"
    assert all(array.tobytes() == whole[name].tobytes() for name, array in factors(out).items())
    done = soupx("train", file, "--overwrite")
    assert json.loads((out / "run.json").read_text())["day"] == "2025-06-15"


def losses(folder: Path) -> dict[int, float]:
    events = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {event["step"]: event["loss"] for event in events if event["event"] == "step"}


def factors(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def manifest_with(checkpoint: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Writes other settings into a checkpoint, and gives the manifest that fits them, without its own sha256."""
    content = json.dumps(settings).encode()
    (checkpoint / "settings.json").write_bytes(content)
    manifest: dict[str, Any] = json.loads((checkpoint / "manifest.json").read_text())
    entry = next(entry for entry in manifest["files"] if entry["name"] == "settings.json")
    entry.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    del manifest["sha256"]
    return manifest


def test_a_changed_key_goes_on_once_it_is_named(
    soupx: Soupx, config: Config, cut: Path, tmp_path: Path
) -> None:
    before = losses(tmp_path / "out")
    change = (
        "train",
        config(),
        "--resume-from",
        cut,
        "--set",
        "training.lr=0.0001",
        "--set",
        "training.seed=5",
    )
    refused = soupx(*change, "--override-resume", "training.lr")
    assert refused.code == 5
    assert "`training.seed` was 42 and is 5" in refused.err
    assert "`training.lr` was" not in refused.err
    assert "--override-resume training.seed" in refused.err
    gone_on = soupx(*change, "--override-resume", "training.lr", "--override-resume", "training.seed")
    assert gone_on.code == 0, gone_on.err
    assert "`training.lr` was 0.005 and is 0.0001; allowed by name" in gone_on.err
    after = losses(tmp_path / "out")
    assert sorted(after) == [1, 2, 3, 4, 5, 6]
    assert [after[step] for step in (1, 2, 3)] == [before[step] for step in (1, 2, 3)]
    assert after[6] != before[6]


def test_keys_that_mean_nothing_beside_a_new_value_need_no_name(
    soupx: Soupx, config: Config, cut: Path
) -> None:
    change = ("train", config(), "--resume-from", cut, "--set", "training.warmup_steps=2")
    refused = soupx(*change)
    assert "`training.warmup_steps` was null and is 2" in refused.err
    assert "`training.warmup_ratio`" not in refused.err
    assert soupx(*change, "--override-resume", "training.warmup_steps").code == 0


def test_a_section_names_all_its_keys_and_the_data_itself(
    soupx: Soupx, config: Config, cut: Path, chat_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(chat_file.read_text().splitlines()[:40]))
    change = ("train", config(), "--resume-from", cut, "--set", f"data.train={other}")
    assert soupx(*change).code == 5
    gone_on = soupx(*change, "--override-resume", "data")
    assert gone_on.code == 0, gone_on.err


def test_rows_that_changed_under_the_same_name_are_noticed_and_can_be_allowed(
    soupx: Soupx, config: Config, cut: Path, rows: Path
) -> None:
    lines = rows.read_text().splitlines()
    rows.write_text("\n".join(lines[: len(lines) // 2]))
    change = ("train", config(), "--resume-from", cut)
    refused = soupx(*change)
    assert refused.code == 5
    assert "error[changed-data]" in refused.err
    assert soupx(*change, "--override-resume", "data").code == 0


def test_another_base_under_the_same_name_is_noticed_and_can_be_allowed(
    soupx: Soupx, config: Config, tiny_llama: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    words = ("train", config(), "--set", f"base={base}")
    assert soupx(*words, "--set", "training.max_steps=3").code == 0
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"] * 1.01
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    change = (*words, "--resume-from", tmp_path / "out" / "checkpoints" / "step-00000003")
    refused = soupx(*change)
    assert refused.code == 5
    assert f"error[changed-base] {tmp_path}" in refused.err
    assert soupx(*change, "--override-resume", "base").code == 0


def test_keys_left_out_other_packages_and_a_longer_patience_are_no_hindrance(
    soupx: Soupx, config: Config, cut: Path
) -> None:
    settings = json.loads((cut / "settings.json").read_text())
    del settings["training.sharding"], settings["data.eval"]
    manifest = manifest_with(cut, settings)
    manifest["versions"]["numpy"] = "1.0"
    (cut / "manifest.json").write_text(json.dumps({**manifest, "sha256": fingerprint(manifest)}))
    words = ("train", config(), "--resume-from", cut, "--set", "training.process_timeout=60")
    gone_on = soupx(*words)
    assert gone_on.code == 0, gone_on.err
    assert "written with other versions (numpy 1.0 -> " in gone_on.err


def test_what_auto_came_to_on_another_device_is_noticed(soupx: Soupx, config: Config, cut: Path) -> None:
    settings = json.loads((cut / "settings.json").read_text())
    assert settings["training.precision"] == "fp32"
    manifest = manifest_with(cut, {**settings, "training.precision": "bf16"})
    (cut / "manifest.json").write_text(json.dumps({**manifest, "sha256": fingerprint(manifest)}))
    refused = soupx("train", config(), "--resume-from", cut)
    assert refused.code == 5
    assert '`training.precision` was "bf16" and is "fp32"' in refused.err


@pytest.mark.parametrize("other", ["mlx"])
def test_a_run_goes_on_with_the_other_engine_from_the_same_state(
    soupx: Soupx, config: Config, cut: Path, tmp_path: Path, other: str
) -> None:
    whole = losses(tmp_path / "out")
    change = ("train", config(), "--resume-from", cut, "--backend", other)
    refused = soupx(*change)
    assert refused.code == 5
    assert "error[other-backend]" in refused.err
    gone_on = soupx(*change, "--override-resume", "backend")
    assert gone_on.code == 0, gone_on.err
    after = losses(tmp_path / "out")
    assert after.keys() == whole.keys()
    assert max(abs(after[step] - whole[step]) for step in whole) < 1e-4
    assert json.loads((tmp_path / "out" / "run.json").read_text())["backend"] == other


def test_a_rank_allowed_by_name_still_has_to_fit(soupx: Soupx, config: Config, cut: Path) -> None:
    change = ("train", config(lora={"r": 8}), "--resume-from", cut, "--override-resume", "training.lora.r")
    refused = soupx(*change)
    assert refused.code == 5
    assert "error[foreign-checkpoint]" in refused.err
    assert "Traceback" not in refused.err


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_a_warm_start_takes_the_factors_alone(
    soupx: Soupx, config: Config, cut: Path, tmp_path: Path, backend: str
) -> None:
    new = tmp_path / "new"
    started = soupx(
        "train", config(backend=backend), "--resume-from", cut, "--resume-weights-only", "--output", new,
        "--set", "training.lr=1e-12",
    )  # fmt: skip
    assert started.code == 0, started.err
    assert "warm start" in started.err
    assert sorted(losses(new)) == [1, 2, 3, 4, 5, 6]
    kept = load_file(cut / "factors.safetensors")
    saved = factors(new)
    for name, array in kept.items():
        np.testing.assert_allclose(saved[f"base_model.model.{name}.weight"], array, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--resume-weights-only",), "weights-from-where"),
        (("--override-resume", "training.lr"), "nothing-to-override"),
        (("--resume", "--override-resume", "training.lrr"), "unknown-key"),
        (("--resume-from", "CUT", "--overwrite", "--resume-weights-only"), "contradiction"),
    ],
)
def test_options_that_mean_nothing_together_are_refused(
    soupx: Soupx, config: Config, cut: Path, options: tuple[str, ...], code: str
) -> None:
    words = [str(cut) if option == "CUT" else option for option in options]
    refused = soupx("train", config(), *words)
    assert refused.code == 2
    assert f"error[{code}]" in refused.err
    assert cut.is_dir()
