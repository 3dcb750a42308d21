"""The error table, part three: what can be wrong with a base, on both engines."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

CONFIG, WEIGHTS = "base/config.json", "base/model.safetensors"
INDEX = "base/model.safetensors.index.json"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
CANARY = "raise SystemExit('the code of a model folder ran')"
Act = Callable[[Path], Any]


def settings(file: str = CONFIG, **values: object) -> Act:
    """Changes keys of a JSON file."""

    def act(place: Path) -> None:
        (place / file).write_text(json.dumps({**json.loads((place / file).read_text()), **values}))

    return act


def content(file: str, text: str | bytes) -> Act:
    """Replaces a file."""
    return lambda place: (place / file).write_bytes(text if isinstance(text, bytes) else text.encode())


def gone(file: str) -> Act:
    return lambda place: shutil.rmtree(place / file) if (place / file).is_dir() else (place / file).unlink()


def renamed(file: str, name: str) -> Act:
    return lambda place: (place / file).rename(place / name)


def tensors(change: Callable[[dict[str, Any]], object]) -> Act:
    """Rewrites the weights after a change to them."""

    def act(place: Path) -> None:
        found = load_file(place / WEIGHTS)
        change(found)
        save_file(found, place / WEIGHTS, metadata={"format": "pt"})

    return act


def header(change: Callable[[dict[str, Any]], object]) -> Act:
    """Rewrites the header of the weights and leaves the bytes behind it."""

    def act(place: Path) -> None:
        raw = (place / WEIGHTS).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        written = json.loads(raw[8 : 8 + length])
        change(written)
        text = json.dumps(written).encode()
        (place / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])

    return act


def index(weight_map: object, metadata: object = None) -> Act:
    """Puts an index in place of the single file."""

    def act(place: Path) -> None:
        (place / WEIGHTS).rename(place / "base/model-00001-of-00001.safetensors")
        written = {"metadata": {} if metadata is None else metadata, "weight_map": weight_map}
        (place / INDEX).write_text(json.dumps(written))

    return act


def cut(place: Path) -> None:
    (place / WEIGHTS).write_bytes((place / WEIGHTS).read_bytes()[:-1000])


def trailing(place: Path) -> None:
    (place / WEIGHTS).write_bytes((place / WEIGHTS).read_bytes() + b"more")


def overlapping(written: dict[str, Any]) -> None:
    written[Q_PROJ]["data_offsets"] = [0, 16384]


def no_template(place: Path) -> None:
    (place / "base" / "chat_template.jinja").unlink()


def pipe(place: Path) -> None:
    (place / WEIGHTS).unlink()
    os.mkfifo(place / WEIGHTS)


def own_code(place: Path) -> None:
    (place / "base" / "evil.py").write_text(CANARY)
    settings(model_type="frobnicator", auto_map={"AutoModelForCausalLM": "evil.Model"})(place)


def own_tokenizer(place: Path) -> None:
    (place / "base" / "evil.py").write_text(CANARY)
    values = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    settings("base/tokenizer_config.json", **values)(place)


FOLDERS = {
    "no folder": {"arrange": gone("base"), "code": "base-not-found", "words": "`./base`", "help": "hub id"},
    "a file": {"argv": "train --set base=train.jsonl", "code": "base-not-found", "words": "is not a folder"},
    "a name that no disk takes": {
        "argv": f"train --set base={'x' * 300}",
        "code": "base-not-found",
        "words": "too long",
    },
    "out of the folder, and not there": {"argv": "train --set base=../../nowhere", "code": "base-not-found"},
    "a hub id without network": {
        "argv": "train --set base=nobody/nothing",
        "code": "base-not-cached",
        "where": "base: ",
        "help": "hf download nobody/nothing",
    },
    "an adapter": {
        "arrange": content("base/adapter_config.json", "{}"),
        "code": "base-is-adapter",
        "help": "this folder as `adapter`",
    },
    "no config.json": {"arrange": gone(CONFIG), "code": "base-config", "words": "there is no config.json"},
    "an empty config.json": {
        "arrange": content(CONFIG, ""),
        "code": "base-config",
        "where": "base/config.json: ",
    },
    "a broken config.json": {"arrange": content(CONFIG, "{"), "code": "base-config", "words": "is not JSON"},
    "a config.json in UTF-16": {"arrange": content(CONFIG, b"\xff\xfe{}"), "code": "base-config"},
    "a config.json nested 90,000 deep": {"arrange": content(CONFIG, "[" * 90_000), "code": "base-config"},
    "a config.json of 5 MB": {
        "arrange": settings(filler="x" * 5_000_000),
        "code": "base-config",
        "words": "is larger than",
    },
    "a config that is a list": {"arrange": content(CONFIG, "[]"), "code": "base-config", "words": "got list"},
    "no model type": {"arrange": settings(model_type=5), "code": "base-config", "words": "`model_type`"},
}

SIZES = {
    "ten million layers": {"arrange": settings(num_hidden_layers=10**7), "words": "1 to 4096"},
    "no heads": {"arrange": settings(num_attention_heads=0), "words": "`num_attention_heads`"},
    "a vocabulary of 10^12": {"arrange": settings(vocab_size=10**12), "words": "`vocab_size`"},
    "a hidden size in words": {"arrange": settings(hidden_size="wide"), "words": 'got "wide"'},
    "a size of a nested part": {
        "arrange": settings(text_config={"hidden_size": 10**9}),
        "words": "`hidden_size`",
    },
    "an odd head": {"arrange": settings(head_dim=7), "words": "even rotary dimension"},
    "an epsilon in words": {"arrange": settings(rms_norm_eps="small"), "words": "rms_norm_eps"},
    "kinds of layers that nobody knows": {"arrange": settings(layer_types=["x", "y"]), "words": "layer_type"},
    "an auto_map that is a number": {"arrange": settings(auto_map=5), "words": "`auto_map`"},
    "weights by another name": {
        "arrange": settings(transformers_weights="../../elsewhere.safetensors"),
        "words": "`transformers_weights`",
    },
}

CODE = {
    "an unknown type with code": {
        "arrange": own_code,
        "code": "remote-code",
        "words": ("frobnicator", "AutoModelForCausalLM"),
        "help": "never runs code",
    },
    "a file with the model": {
        "arrange": settings(model_file="model.py"),
        "code": "remote-code",
        "words": "model_file: model.py",
    },
    "a tokenizer with code": {
        "arrange": own_tokenizer,
        "code": "remote-code",
        "where": "base/tokenizer_config.json: ",
    },
    "an unknown type": {
        "arrange": settings(model_type="frobnicator"),
        "code": "unknown-model-type",
        "help": "a newer transformers",
    },
}

FORMATS = {
    f"only {name}": {
        "arrange": renamed(WEIGHTS, f"base/{name}"),
        "code": "foreign-weights",
        "words": words,
        "help": help,
    }
    for name, words, help in (
        ("pytorch_model.bin", "is a pickle, which can run code", "save_pretrained"),
        ("consolidated.00.pth", "is a pickle", "save_pretrained"),
        ("model.pt", "is a pickle", "save_pretrained"),
        ("model.pkl", "is a pickle", "save_pretrained"),
        ("model.ckpt", "is a pickle", "save_pretrained"),
        ("model-Q4_1.gguf", "is GGUF", "the safetensors repository"),
        ("weights.npz", "is a NumPy archive", "mlx_lm.convert"),
        ("tf_model.h5", "Keras", "save_pretrained"),
        ("flax_model.msgpack", "Flax", "save_pretrained"),
    )
} | {
    "no weights": {"arrange": gone(WEIGHTS), "code": "no-weights", "words": "there is no safetensors file"},
    "weights under another name": {
        "arrange": renamed(WEIGHTS, "base/weights.safetensors"),
        "code": "no-weights",
        "words": "only `weights.safetensors`",
    },
}

FILES = {
    "empty": {
        "arrange": content(WEIGHTS, b""),
        "code": "damaged-weights",
        "where": "base/model.safetensors: ",
    },
    "cut off": {"arrange": cut, "code": "damaged-weights", "help": "download the file again"},
    "trailing bytes": {"arrange": trailing, "code": "damaged-weights"},
    "a header of a terabyte": {
        "arrange": content(WEIGHTS, (2**40).to_bytes(8, "little") + b"{}"),
        "code": "damaged-weights",
        "words": "header too large",
    },
    "a header that is no JSON": {
        "arrange": content(WEIGHTS, (9).to_bytes(8, "little") + b"no JSON!!"),
        "code": "damaged-weights",
    },
    "tensors that overlap": {
        "arrange": header(overlapping),
        "code": "damaged-weights",
        "words": "invalid offset",
    },
    "a tensor of 10^24 numbers": {
        "arrange": header(lambda written: written[Q_PROJ].update(shape=[2**40, 2**40])),
        "code": "damaged-weights",
    },
    "a type that nobody knows": {
        "arrange": header(lambda written: written[Q_PROJ].update(dtype="F99")),
        "code": "damaged-weights",
    },
    "a pipe": {
        "arrange": pipe,
        "code": "damaged-weights",
        "words": "is not a file",
    },
    "a weight that is missing": {
        "arrange": tensors(lambda found: found.pop(Q_PROJ)),
        "code": "incomplete-weights",
        "words": ("1 weights are missing", Q_PROJ),
    },
    "a weight of another shape": {
        "arrange": tensors(lambda found: found.update({Q_PROJ: np.zeros((8, 64), np.float32)})),
        "code": "incomplete-weights",
        "words": "shape",
    },
    "another vocabulary": {
        "arrange": settings(vocab_size=100),
        "exit": 3,
        "code": "token-without-row",
        "words": "rows for 0 to 99",
    },
}

SHARDS = {
    "missing": {
        "arrange": index({"a": "model-00001-of-00001.safetensors", "b": "model-00002-of-00002.safetensors"}),
        "code": "missing-shard",
        "words": ("1 of 2", "model-00002-of-00002.safetensors"),
    },
    "above the folder": {"arrange": index({"a": "../model.safetensors"}), "words": "../model.safetensors"},
    "absolute": {"arrange": index({"a": "/etc/x.safetensors"}), "words": "not a plain file name"},
    "with NUL": {"arrange": index({"a": "a\0.safetensors"}), "words": "not a plain file name"},
    "with a backslash": {"arrange": index({"a": "..\\a.safetensors"}), "words": "not a plain file name"},
    "of another kind": {"arrange": index({"a": "config.json"}), "words": "ends in .safetensors"},
    "too many": {
        "arrange": index({f"a{number}": f"m{number}.safetensors" for number in range(5000)}),
        "words": "5000 files",
    },
    "none": {"arrange": index({}), "words": "missing or empty"},
    "in a list": {"arrange": index(["model.safetensors"]), "words": "missing or empty"},
    "without metadata": {
        "arrange": index({"a": "model-00001-of-00001.safetensors"}, metadata=5),
        "words": "`metadata`",
    },
}

TOKENIZERS = {
    "no tokenizer": {
        "arrange": lambda place: [
            (place / "base" / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")
        ],
        "code": "no-tokenizer",
    },
    "a broken tokenizer.json": {"arrange": content("base/tokenizer.json", "{"), "code": "broken-tokenizer"},
    "a special token that is a number": {
        "arrange": settings("base/tokenizer_config.json", eos_token=5),
        "code": "broken-tokenizer",
        "words": "eos_token",
    },
    "a broken generation_config.json": {
        "arrange": content("base/generation_config.json", "[]"),
        "code": "base-config",
    },
    "no chat template": {
        "arrange": no_template,
        "code": "no-chat-template",
        "help": "data.chat_template",
    },
    "a template that is not Jinja": {
        "arrange": content("base/chat_template.jinja", "{% for m in messages %}"),
        "code": "bad-chat-template",
        "words": "line 1",
    },
    "a template of 300 KB": {
        "arrange": content("base/chat_template.jinja", "{{ 1 }}" + "x" * 300_000),
        "code": "chat-template-too-large",
        "words": "256.0 KiB",
    },
    "a template that is a number": {
        "arrange": lambda place: (
            no_template(place),
            settings("base/tokenizer_config.json", chat_template=5)(place),
        ),
        "code": "bad-chat-template",
        "words": "must be text",
    },
    "a template with half a surrogate pair": {
        "arrange": lambda place: (
            no_template(place),
            settings("base/tokenizer_config.json", chat_template="{{ '\ud800' }}")(place),
        ),
        "code": "bad-chat-template",
        "words": "surrogate",
    },
    "several templates and no default": {
        "arrange": lambda place: (
            no_template(place),
            settings("base/tokenizer_config.json", chat_template=[{"name": "a", "template": "x"}])(place),
        ),
        "code": "no-default-chat-template",
        "words": "the chat templates a",
    },
    "a template that runs away": {
        "arrange": content("base/chat_template.jinja", LOOPS),
        "code": "runaway-chat-template",
        "words": "processor time",
    },
    "a template that fills the memory": {
        "arrange": content("base/chat_template.jinja", "{{ ('x' * 10 ** 11) | length }}"),
        "code": "runaway-chat-template",
        "words": "memory",
    },
    "a template that breaks out": {
        "arrange": content("base/chat_template.jinja", "{{ cycler.__init__.__globals__ }}"),
        "exit": 3,
        "code": "template-refuses",
        "where": "train.jsonl:1: ",
        "words": "unsafe",
    },
    "a template file that is not there": {
        "argv": "train --set data.chat_template=no.jinja",
        "exit": 2,
        "code": "chat-template-file",
        "where": "data.chat_template: ",
    },
}

LOSS = {
    "weights that are not finite": {
        "arrange": tensors(lambda found: found[Q_PROJ].fill(np.nan)),
        "exit": 6,
        "code": "non-finite-loss",
        "words": ("step 1", "train.jsonl:", "Learning rate"),
    },
}

ROWS: dict[str, Any] = {
    f"{table}: {name}": {"exit": 4, "argv": "train", **defaults, **row}
    for table, rows, defaults in (
        ("folder", FOLDERS, {}),
        ("size", SIZES, {"code": "base-config"}),
        ("code", CODE, {}),
        ("format", FORMATS, {}),
        ("file", FILES, {}),
        ("shard", SHARDS, {"code": "base-index"}),
        ("tokenizer", TOKENIZERS, {}),
        ("loss", LOSS, {}),
    )
    for name, row in rows.items()
}


@pytest.fixture(autouse=True)
def _short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    from soup_xb.data.rendering import renderer

    monkeypatch.setattr(renderer(), "seconds", 0.3)


@pytest.mark.parametrize("backend", ["torch", "mlx"])
@pytest.mark.parametrize("name", ROWS)
def test_a_wrong_base_is_answered_in_one_shape(
    name: str, backend: str, check: Callable[[Any], Any], workplace: Path
) -> None:
    row = ROWS[name]
    check({**row, "argv": f"{row['argv']} --backend {backend}"})
    assert not (workplace / "out" / "adapter").exists()


def test_a_type_that_only_its_own_code_knows_is_refused_when_planned_too(check: Callable[[Any], Any]) -> None:
    check({**CODE["an unknown type with code"], "argv": "plan", "exit": 4})


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_the_code_beside_a_known_type_is_never_imported(
    backend: str, check: Callable[[Any], Any], workplace: Path
) -> None:
    (workplace / "base" / "evil.py").write_text(CANARY)
    settings(auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})(workplace)
    check({"argv": f"train --backend {backend}", "exit": 0})


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_kernel_that_a_base_names_is_not_fetched(
    key: str, check: Callable[[Any], Any], workplace: Path
) -> None:
    settings(**{key: "somebody/kernel"})(workplace)
    check({"argv": "train", "exit": 0})


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_both_engines_read_the_single_file_whatever_lies_beside_it(
    backend: str, check: Callable[[Any], Any], workplace: Path
) -> None:
    """A second file with other weights, and an index that names it, change nothing."""
    check({"argv": f"train --backend {backend} --output plain", "exit": 0})
    weights = load_file(workplace / WEIGHTS)
    save_file({name: array + 1 for name, array in weights.items()}, workplace / "base" / "z.safetensors")
    (workplace / INDEX).write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, "z.safetensors")})
    )
    check({"argv": f"train --backend {backend} --output other", "exit": 0})
    files = [workplace / name / "adapter" / "adapter_model.safetensors" for name in ("plain", "other")]
    assert files[0].read_bytes() == files[1].read_bytes()
