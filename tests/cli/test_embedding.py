"""`task: embedding` from a file to a model that sentence-transformers loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import in_two_processes
from safetensors.numpy import load_file

Soupx = Callable[..., Any]
Config = Callable[..., Path]
WORDS = ("tide", "harbour", "fog", "anchor", "pilot", "chart", "seal", "reef")


@pytest.fixture
def config(tmp_path: Path, tiny_encoder: Path) -> Config:
    """Writes a config on 40 pairs, two of three with a negative; keyword arguments are keys of `training`."""

    def write(
        base: Path = tiny_encoder, output: str = "out", backend: str = "torch", **training: Any
    ) -> Path:
        pairs = tmp_path / "pairs.jsonl"
        rows = []
        for index in range(40):
            word, other = WORDS[index % 8], WORDS[(index + 3) % 8]
            row = {"query": f"{word} {index}?", "positive": f"All of the {word}, number {index}."}
            rows.append(row | ({"negative": f"The {other}, {index}."} if index % 3 else {}))
        pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {
            "max_steps": 6,
            "lr": 0.005,
            "batch_size": 8,
            "save_steps": 3,
            "lora": {"r": 4},
            **training,
        }
        content = {
            "base": str(base),
            "task": "embedding",
            "backend": backend,
            "data": {
                "train": str(pairs),
                "max_length": 48,
                "val_split": 0.2,
                "query_prompt": "query: ",
                "document_prompt": "passage: ",
            },
            "training": settings,
            "output": str(tmp_path / output),
        }
        file = tmp_path / "soup.yaml"
        file.write_text(json.dumps(content))
        return file

    return write


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [event for event in found if event["event"] == kind]


def adapter(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_a_run_is_resumed_to_its_bytes_and_tells_accuracy(
    soupx: Soupx, config: Config, tmp_path: Path
) -> None:
    done = soupx("train", config(eval_steps=3))
    assert done.code == 0, done.err
    assert "accuracy" in done.err
    assert "perplexity" not in done.err
    out = tmp_path / "out"
    for event in events(out, "eval") + events(out, "step"):
        assert {"accuracy", "positive_cosine", "negative_cosine"} == event["means"].keys()
    page = (out / "report.html").read_text()
    assert "positives nearest" in page
    assert "perplexity" not in page
    whole = adapter(out)
    again = config(output="again", eval_steps=3)
    part = soupx("train", again, "--resume-from", out / "checkpoints" / "step-00000003")
    assert part.code == 0, part.err
    assert all(np.array_equal(array, adapter(tmp_path / "again")[name]) for name, array in whole.items())
    assert [event["loss"] for event in events(tmp_path / "again", "step")][-3:] == [
        event["loss"] for event in events(out, "step")
    ][-3:]


def test_the_commands_after_a_run(soupx: Soupx, config: Config, tmp_path: Path) -> None:
    assert soupx("train", config(embedding_scale=10)).code == 0
    out, pairs = tmp_path / "out", tmp_path / "pairs.jsonl"
    found = soupx("eval", out, "--data", pairs, "--batch-size", 40, "--json")
    assert found.code == 0, found.err
    figures = json.loads(found.out)
    assert figures["adapter"]["loss"] < figures["base"]["loss"] < np.log(70)
    assert all(0 <= figure["accuracy"] <= 1 for figure in figures.values())
    assert figures["adapter"]["rows"] == 40
    assert "accuracy" in soupx("eval", out, "--data", pairs).out
    for words in (
        ("generate", "--adapter", out, "--prompt", "Hello"),
        ("export", out, "--to", "mlx-lm", "--output", tmp_path / "exported"),
    ):
        refused = soupx(*words)
        assert refused.code == 4
        assert "error[embeds-only]" in refused.err
    on_mlx = soupx("eval", out, "--data", pairs, "--backend", "mlx")
    assert (on_mlx.code, "error[mlx-no-encoder]" in on_mlx.err) == (2, True)
    asked = soupx("train", config(), "--overwrite", "--prompt", "Hello")
    assert (asked.code, "error[no-answers]" in asked.err) == (2, True)
    card = (out / "adapter" / "README.md").read_text()
    assert "pipeline_tag: sentence-similarity" in card
    assert "SentenceTransformer(" in card


def test_what_a_run_of_a_config_can_say_beforehand(soupx: Soupx, config: Config, tmp_path: Path) -> None:
    planned = soupx("plan", config())
    assert planned.code == 0, planned.err
    assert "in layers 0-1 (12)" in planned.out
    shown = soupx("data", tmp_path / "pairs.jsonl", "--base", json.loads(config().read_text())["base"])
    assert shown.code == 0, shown.err
    assert "anchor-positive" in shown.out
    short = soupx("train", config(), "--set", "data.max_length=500")
    assert short.code == 0, short.err
    assert "texts are cut at 160 tokens" in short.err


@pytest.mark.parametrize(
    ("backend", "base", "form"),
    [
        ("torch", "encoder", "adapter"),
        ("mlx", "decoder", "adapter"),
        pytest.param("torch", "encoder", "merged", marks=pytest.mark.slow),
        pytest.param("torch", "decoder", "adapter", marks=pytest.mark.slow),
        pytest.param("torch", "decoder", "merged", marks=pytest.mark.slow),
        pytest.param("mlx", "decoder", "merged", marks=pytest.mark.slow),
    ],
)
def test_sentence_transformers_gives_the_live_vectors(
    soupx: Soupx,
    config: Config,
    tiny_encoder: Path,
    tiny_llama: Path,
    tmp_path: Path,
    backend: str,
    base: str,
    form: str,
) -> None:
    done = soupx("train", config({"encoder": tiny_encoder, "decoder": tiny_llama}[base], backend=backend))
    assert done.code == 0, done.err
    folder = tmp_path / "out" / "adapter"
    if form == "merged":
        folder = tmp_path / "merged"
        assert soupx("merge", tmp_path / "out", "--output", folder, "--backend", backend).code == 0
    texts = ["fog 3?", "a text that is longer than the others, and cut in the end " * 2, "x"]
    found = vectors_of_sentence_transformers(folder, texts)
    assert found == pytest.approx(
        live_vectors(tmp_path / "out", ["query: " + text for text in texts], backend), abs=1e-5
    )


def vectors_of_sentence_transformers(folder: Path, texts: list[str]) -> np.ndarray:
    """In a process of its own: the library and what it imports warn of much that is not ours."""
    code = (
        "import json, sys; from sentence_transformers import SentenceTransformer\n"
        "model = SentenceTransformer(sys.argv[1], device='cpu')\n"
        "print(json.dumps(model.encode_query(json.loads(sys.argv[2])).tolist()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), json.dumps(texts)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return np.array(json.loads(done.stdout.splitlines()[-1]))


def live_vectors(out: Path, texts: list[str], backend: str) -> np.ndarray:
    from soup_xb.core.rows.batches import collate
    from soup_xb.core.rows.examples import Source
    from soup_xb.core.rows.row import TokenSequence
    from soup_xb.data.tokenize import encode_texts
    from soup_xb.runs.adapters import TrainedOptions, open_trained

    with open_trained(TrainedOptions(backend, out)) as trained:
        assert trained.embedding is not None
        encoded = encode_texts(texts, trained.tokenizer, trained.embedding.max_length)
        assert any(one.truncated for one in encoded)
        sequences = [
            TokenSequence(one.tokens, np.zeros(len(one.tokens), np.bool_), Source("", 1)) for one in encoded
        ]
        assert trained.session.embedder is not None
        return trained.session.embedder.embeddings(collate(sequences, trained.tokenizer.pad_id))


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_two_processes_have_the_losses_of_one(
    soupx: Soupx, config: Config, tiny_encoder: Path, tiny_llama: Path, tmp_path: Path, backend: str
) -> None:
    base = {"torch": tiny_encoder, "mlx": tiny_llama}[backend]
    accumulated = {"backend": backend, "gradient_accumulation_steps": 2}
    alone = soupx("train", config(base, output="out-1", **accumulated))
    assert alone.code == 0, alone.err
    done = in_two_processes(backend, "-m", "soup_xb", "train", config(base, output="out-2", **accumulated))
    assert done.codes == (0, 0), done.err
    losses = []
    for folder in (tmp_path / "out-1", tmp_path / "out-2"):
        steps = events(folder, "step") + events(folder, "eval")
        losses.append([(event["loss"], event["means"]["accuracy"]) for event in steps])
    assert np.array(losses[0]) == pytest.approx(np.array(losses[1]), abs=1e-5)
    one, two = adapter(tmp_path / "out-1"), adapter(tmp_path / "out-2")
    assert all(array == pytest.approx(two[name], abs=1e-4) for name, array in one.items())
