"""Tiny real models, made from configs: no download, no mock."""

from __future__ import annotations

import json
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen

# Before torch or mlx is imported: tiny products are faster on one thread, and threads that spin starve each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# So that the folders of tests share modules. The tables at the end are printed by the process that runs no test, and it
# reads this file alone.
sys.path.insert(0, str(Path(__file__).parent))
from case_counts import pytest_terminal_summary  # noqa: F401

VOCABULARY = 320
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer with ChatML's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(tokens[:3])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        bos_token="<|im_start|>",
        chat_template=CHAT_TEMPLATE,
    )
    fast.save_pretrained(folder)


def save_tiny_model(folder: Path, config: Any, seed: int = 0) -> Path:
    """A causal model with random weights of a size that matters, its tokenizer beside it."""
    import torch
    import transformers

    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.15)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def rendering_process_that_stays() -> Iterator[None]:
    """One rendering process for all runs inside a test process: to start one takes longer than a tiny run.

    That a command ends it is seen by the tests that start commands (tests/torture/test_growth.py).
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("soup_xb.runs.open.renderer", lambda: types.SimpleNamespace(close=lambda: None))
        yield


@pytest.fixture(scope="session")
def save_model() -> Callable[..., Path]:
    """`save_model(folder, config)` writes a causal model of that config, and gives the folder back."""
    return save_tiny_model


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two blocks with grouped heads and a tied output head."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return save_tiny_model(tmp_path_factory.mktemp("tiny-llama"), config)


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers, whose tokenizer puts a token before a text and one behind it."""
    import torch
    import transformers
    from tokenizers import Tokenizer, processors

    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=160,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.15)
    folder = tmp_path_factory.mktemp("tiny-encoder")
    model.save_pretrained(folder)
    save_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def media_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`media_base("llava")` is a tiny base that sees or hears, one of `media_bases.BASES`, made once."""
    from media_bases import BASES

    made: dict[str, Path] = {}

    def base(name: str) -> Path:
        if name not in made:
            made[name] = BASES[name](tmp_path_factory.mktemp(f"tiny-{name}"))
        return made[name]

    return base


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty short conversations of uneven length."""
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {index} and {index % 7}?"},
                {"role": "assistant", "content": f"It is {index + index % 7}." + " Sure." * (index % 5)},
            ]
        }
        for index in range(50)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


@frozen
class Answer:
    """How a command ended, and what it wrote."""

    code: int
    out: str
    err: str


@pytest.fixture
def soupx(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Run `soupx` with these arguments in this process, through the same edge that a shell meets."""
    from soup_xb.cli import run

    def call(*arguments: object) -> Answer:
        monkeypatch.setattr("sys.argv", ["soupx", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run()
        out, err = capsys.readouterr()
        return Answer(int(stopped.value.code or 0), out, err)

    return call
