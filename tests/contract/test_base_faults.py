"""Bases whose config and files disagree: both backends compute the same model, or refuse it with one code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families.tiny import CASES, config_of, tiny_base
from safetensors.torch import load_file, save_file

from soup_xb.core.base.folder import has_tied_head, inspect_base
from soup_xb.core.errors import ModelError
from soup_xb.core.run.session import GenerationSettings

Tensors = dict[str, torch.Tensor]
Act = Callable[[Path], Any]

TOKENS = np.random.default_rng(0).integers(3, 100, (2, 12))
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
# Rows, columns: 96 of 64 and 64 of 64 numbers.
UP, Q = "layers.0.mlp.up_proj.weight", "layers.0.self_attn.q_proj.weight"
SAME = "same"


def write(file: Path, found: Tensors) -> None:
    save_file({name: tensor.contiguous().clone() for name, tensor in found.items()}, file, {"format": "pt"})


def tensors(change: Callable[[Tensors], object]) -> Act:
    def act(base: Path) -> None:
        found = load_file(base / "model.safetensors")
        change(found)
        write(base / "model.safetensors", found)

    return act


def settings(**values: object) -> Act:
    """Keys of config.json; a text model's own are changed there too, and None takes a key away."""

    def act(base: Path) -> None:
        file = base / "config.json"
        config = json.loads(file.read_text())
        for part in (config, config.get("text_config")):
            if part is not None:
                part.update(values)
                for name in [name for name, value in values.items() if value is None]:
                    del part[name]
        file.write_text(json.dumps(config))

    return act


def shards(change: Callable[[Tensors, Tensors], object]) -> Act:
    """Two files in the place of one, the query's weight in the second, after a change to both."""

    def act(base: Path) -> None:
        found = load_file(base / "model.safetensors")
        (base / "model.safetensors").unlink()
        second = {name: found.pop(name) for name in list(found) if "self_attn" in name}
        places = {**dict.fromkeys(found, SHARDS[0]), **dict.fromkeys(second, SHARDS[1])}
        change(found, second)
        for name, part in zip(SHARDS, (found, second), strict=True):
            write(base / name, part)
        index = {"metadata": {}, "weight_map": places}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))

    return act


def all_of(*acts: Act) -> Act:
    return lambda base: [act(base) for act in acts]


def named(found: Tensors, end: str) -> str:
    return next(name for name in found if name.endswith(end))


def noise(rows: int) -> torch.Tensor:
    return 0.1 * torch.randn(rows, 64, generator=torch.Generator().manual_seed(7))


def head(make: Callable[[torch.Tensor], torch.Tensor], name: str = "lm_head.weight") -> Act:
    """A head that is made from the embedding."""
    return tensors(lambda found: found.update({name: make(found[named(found, "embed_tokens.weight")])}))


def instead(end: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Act:
    """Another tensor in the place of that one."""
    return tensors(lambda found: found.update({named(found, end): make(found[named(found, end)])}))


def beside(end: str, name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Act:
    """A tensor whose name ends otherwise, made from another one."""
    return tensors(
        lambda found: found.update({named(found, end).replace(end, name): make(found[named(found, end)])})
    )


def without(end: str) -> Act:
    return tensors(lambda found: found.pop(named(found, end)))


def without_prefix(found: Tensors) -> None:
    for name in list(found):
        found[name.removeprefix("model.")] = found.pop(name)


def one_more_layer(found: Tensors) -> None:
    for name in [name for name in found if ".layers.3." in name]:
        found[name.replace(".layers.3.", ".layers.4.")] = found[name]


OTHER = head(lambda embedding: noise(len(embedding)))
TIED, UNTIED = settings(tie_word_embeddings=True), settings(tie_word_embeddings=False)
HEADS: dict[str, tuple[Act, str]] = {
    "tied, no head": (TIED, SAME),
    "tied, the embedding as head": (all_of(TIED, head(lambda embedding: embedding)), SAME),
    "tied, the embedding as head in another format": (
        all_of(instead("embed_tokens.weight", lambda e: e.bfloat16()), TIED, head(lambda e: e.float())),
        SAME,
    ),
    "tied, another head": (all_of(TIED, OTHER), "untied-head"),
    "tied, a rounded head": (all_of(TIED, head(lambda embedding: embedding.bfloat16())), "untied-head"),
    "tied, a head with one other value": (
        all_of(TIED, head(lambda e: e.clone().index_fill_(0, torch.tensor(len(e) - 1), 0.5))),
        "untied-head",
    ),
    "tied, a head with fewer rows": (all_of(TIED, head(lambda e: e[:-8])), "untied-head"),
    "tied, a turned head": (all_of(TIED, head(lambda embedding: embedding.T)), "untied-head"),
    "tied, another head inside the decoder": (
        all_of(TIED, head(lambda e: noise(len(e)), "model.lm_head.weight")),
        "untied-head",
    ),
    "tied, the head has a bias": (
        all_of(TIED, tensors(lambda found: found.update({"lm_head.bias": torch.ones(128)}))),
        "incomplete-weights",
    ),
    "untied, another head": (all_of(UNTIED, OTHER), SAME),
    "untied, the embedding as head": (all_of(UNTIED, head(lambda embedding: embedding)), SAME),
    "untied, no head": (UNTIED, "incomplete-weights"),
    "untied, a head with fewer rows": (
        all_of(UNTIED, head(lambda e: noise(len(e) - 8))),
        "incomplete-weights",
    ),
    "the flag in words": (settings(tie_word_embeddings="yes"), "unreadable-base"),
}
# Gemma 3 in mlx-lm has no head of its own, and Gemma's flag is true by default.
OF_LLAMA: dict[str, tuple[Act, str]] = {
    "untold, another head": (all_of(settings(tie_word_embeddings=None), OTHER), SAME),
    "untold, no head": (settings(tie_word_embeddings=None), "incomplete-weights"),
    "saved without the class's prefix": (tensors(without_prefix), SAME),
    "a weight with and without the prefix": (
        tensors(lambda found: found.update({Q: -found[f"model.{Q}"]})),
        "doubled-weight",
    ),
}
OF_GEMMA: dict[str, tuple[Act, str]] = {
    "untold, another head": (all_of(settings(tie_word_embeddings=None), OTHER), "untied-head"),
    "untold, no head": (settings(tie_word_embeddings=None), SAME),
}
FILES: dict[str, tuple[Act, str]] = {
    "one more layer": (tensors(one_more_layer), "incomplete-weights"),
    "a bias that the model has not": (
        beside(Q, Q.replace("weight", "bias"), lambda q: torch.ones(len(q))),
        "incomplete-weights",
    ),
    "an adapter beside its linear": (
        beside(Q, Q.replace("weight", "lora_A.weight"), lambda q: q[:4]),
        "incomplete-weights",
    ),
    "scales without quantization": (
        beside(Q, Q.replace("weight", "weight_scale"), lambda q: torch.ones(1)),
        "incomplete-weights",
    ),
    "a buffer of older bases": (
        beside(Q, Q.replace("q_proj.weight", "rotary_emb.inv_freq"), lambda q: torch.ones(8)),
        SAME,
    ),
    "no query": (without(Q), "incomplete-weights"),
    "no embedding": (without("embed_tokens.weight"), "incomplete-weights"),
    "a turned weight": (instead(UP, lambda up: up.T), "incomplete-weights"),
    "a flat weight": (instead(Q, torch.flatten), "incomplete-weights"),
    "a vocabulary of fewer rows": (settings(vocab_size=120), "incomplete-weights"),
    "a vocabulary of more rows": (settings(vocab_size=160), "incomplete-weights"),
    "an embedding of fewer rows": (instead("embed_tokens.weight", lambda e: e[:-8]), "incomplete-weights"),
    "float16": (instead(Q, lambda q: q.half()), SAME),
    "integers": (instead(Q, lambda q: (q * 10).to(torch.int8)), "weight-format"),
    "float8": (instead(Q, lambda q: q.to(torch.float8_e4m3fn)), "weight-format"),
    "complex numbers": (instead(Q, lambda q: q.to(torch.complex64)), "weight-format"),
    "two shards": (shards(lambda first, second: None), SAME),
    "a weight in both shards": (
        shards(lambda first, second: first.update({named(second, Q): second[named(second, Q)]})),
        SAME,
    ),
    "another weight in either shard": (
        shards(lambda first, second: first.update({named(second, Q): -second[named(second, Q)]})),
        "doubled-weight",
    ),
    "a file that the index does not name": (
        all_of(
            shards(lambda first, second: None),
            lambda base: write(base / "model-3.safetensors", {"model.norm.weight": torch.zeros(64)}),
        ),
        SAME,
    ),
}
BASES: dict[str, tuple[str, dict[str, Any], dict[str, tuple[Act, str]]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}, {**HEADS, **OF_LLAMA, **FILES}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}, HEADS),
    "gemma3": (
        "gemma3",
        {},
        {**{name: row for name, row in HEADS.items() if name.startswith("tied")}, **OF_GEMMA, **FILES},
    ),
}
ROWS = [(kind, name) for kind, (_, _, faults) in BASES.items() for name in faults]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tied bases that hold no head of their own."""
    root = tmp_path_factory.mktemp("bases")
    return {name: tiny_base(kind, root / name, **changes) for name, (kind, changes, _) in BASES.items()}


def computed(opener: Callable[..., Any], backend: str, base: Path) -> Any:
    """The logits, or the code of the refusal."""
    try:
        return opener(backend, base=base, attach=False)[0].logits(TOKENS)
    except ModelError as refused:
        (problem,) = refused.problems
        assert str(base) in problem.where and problem.help
        return problem.code


@pytest.mark.parametrize(("kind", "fault"), ROWS)
def test_config_and_files_are_one_model_on_both_backends_or_none(
    kind: str, fault: str, bases: dict[str, Path], tmp_path: Path, opener: Callable[..., Any]
) -> None:
    act, expected = BASES[kind][2][fault]
    base = shutil.copytree(bases[kind], tmp_path / "base")
    act(base)
    found = {backend: computed(opener, backend, base) for backend in ("torch", "mlx")}
    if expected == SAME:
        assert not isinstance(found["torch"], str) and not isinstance(found["mlx"], str), found
        np.testing.assert_allclose(found["mlx"], found["torch"], atol=1e-4)
    else:
        assert found == {"torch": expected, "mlx": expected}


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_an_answer_ends_where_it_is_told_to_whatever_the_files_say_of_generation(
    backend: str, bases: dict[str, Path], tmp_path: Path, opener: Callable[..., Any]
) -> None:
    """The ends of both files are collected by the tokenizer, once for both backends (test_turn_ends.py)."""
    prompt = TOKENS[0].astype(np.int32)
    greedy = GenerationSettings(8, 0.0, ())
    plain = opener("torch", base=bases["llama"])[0].generate(prompt, greedy).tolist()
    base = shutil.copytree(bases["llama"], tmp_path / "base")
    settings(eos_token_id=plain[2], pad_token_id=plain[1])(base)
    told = {"eos_token_id": plain[3], "pad_token_id": plain[0], "repetition_penalty": 9.0, "temperature": 5.0}
    (base / "generation_config.json").write_text(json.dumps({**told, "do_sample": True}))
    session, _ = opener(backend, base=base)
    assert session.generate(prompt, greedy).tolist() == plain
    end = plain[4]
    stopped = session.generate(prompt, GenerationSettings(8, 0.0, (end,))).tolist()
    assert stopped == plain[: plain.index(end)]


@pytest.mark.parametrize("where", ["config", "text"])
@pytest.mark.parametrize(
    "name", ["gemma3", "lfm2_vl", "llama4", "llava", "qwen2_vl", "qwen3_5", "qwen3_vl_moe"]
)
def test_both_backends_read_the_flag_that_transformers_reads(name: str, where: str, tmp_path: Path) -> None:
    """Of a config in a config each has a flag: it depends on the class that opens the base which one counts."""
    from soup_xb.backends.mlx.reading import read_base
    from soup_xb.backends.torch.load import is_tied, read_config

    assert name in CASES
    told = json.loads(config_of(name).to_json_string(use_diff=False))
    for flag in (True, False):
        for part, own in ((told, where == "config"), (told["text_config"], where == "text")):
            part["tie_word_embeddings"] = flag if own else not flag
        (tmp_path / "config.json").write_text(json.dumps(told))
        folder = inspect_base(tmp_path, weights=False)
        assert read_base(folder).is_tied == is_tied(*read_config(folder))


@pytest.mark.parametrize(
    ("act", "tied"),
    [
        (TIED, True),
        (all_of(TIED, head(lambda embedding: embedding)), True),
        (all_of(UNTIED, OTHER), False),
        (all_of(UNTIED, head(lambda embedding: embedding)), False),
        (all_of(settings(tie_word_embeddings=None), OTHER), False),
        (settings(tie_word_embeddings=None), True),
    ],
)
def test_an_export_takes_the_head_for_what_the_backends_do(
    act: Act, tied: bool, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = shutil.copytree(bases["llama"], tmp_path / "base")
    act(base)
    assert has_tied_head(inspect_base(base)) is tied


def test_heads_are_compared_in_pieces_to_the_last_one(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opener: Callable[..., Any]
) -> None:
    monkeypatch.setattr("soup_xb.core.base.folder._COMPARED", 1000)
    for fault in ("tied, the embedding as head in another format", "tied, a head with one other value"):
        base = shutil.copytree(bases["llama"], tmp_path / fault)
        BASES["llama"][2][fault][0](base)
        found = computed(opener, "torch", base)
        assert isinstance(found, str) is (fault == "tied, a head with one other value")
