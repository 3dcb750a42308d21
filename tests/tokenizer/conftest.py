"""Small tokenizers, trained in the test, and the chat templates beside this file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from soup_xb.data.tokenizer import ChatTokenizer, open_tokenizer

TEMPLATES = Path(__file__).with_name("chat_templates")
SPECIAL = [
    "<s>",
    "</s>",
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "[INST]",
    "[/INST]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
]
TEXT = [
    "You are a helpful assistant. What is the capital of France? The capital of France is Paris.",
    "And of Italy? Rome, of course. It has a long history.\n\nUser: yes\nAssistant: no.\n",
    "\n\n",
    "system user assistant model think Terse. The first answer. The second answer.",
] * 4


def byte_level(like_llama3: bool = False) -> Tokenizer:
    """Byte-level BPE, cut as GPT-2 does or as Llama 3, which joins line breaks and trims offsets."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if like_llama3:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r" ?\p{L}+| ?[^\s\p{L}]+[\r\n]*|\s*[\r\n]+|\s+"), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def sentence_piece() -> Tokenizer:
    """BPE over words that carry their leading space, unknown characters as bytes; it begins texts with `<s>`."""
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*SPECIAL, *fallback], show_progress=False)
    pieces.train_from_iterator(TEXT, trainer)
    merges = json.loads(pieces.to_str())["model"]["merges"]
    tokenizer = Tokenizer(
        models.BPE(vocab=pieces.get_vocab(), merges=[tuple(pair) for pair in merges], byte_fallback=True)
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "llama3-like": lambda: byte_level(like_llama3=True),
    "sentence-piece": sentence_piece,
}


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each kind of tokenizer, without a chat template."""
    folders = {}
    for kind, build in KINDS.items():
        folders[kind] = tmp_path_factory.mktemp(kind)
        save(build(), folders[kind])
    return folders


def save(tokenizer: Tokenizer, folder: Path, **settings: Any) -> None:
    from transformers import PreTrainedTokenizerFast

    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**tokens, **settings}).save_pretrained(folder)


@pytest.fixture(scope="session")
def opened(bases: dict[str, Path]) -> Callable[[str, str | None], ChatTokenizer]:
    """A kind of tokenizer with a chat template of the folder beside this file."""
    cache: dict[tuple[str, str | None], ChatTokenizer] = {}

    def open_one(kind: str, template: str | None) -> ChatTokenizer:
        if (kind, template) not in cache:
            path = None if template is None else str(TEMPLATES / f"{template}.jinja")
            cache[kind, template] = open_tokenizer(bases[kind], path)
        return cache[kind, template]

    return open_one
