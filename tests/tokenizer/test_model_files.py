"""The base's tokenizer files beside an adapter and a merged model: the very bytes, and what older tools ask of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaTokenizer

from soup_xb.core.rows.examples import Message
from soup_xb.data.model_files import older_spelling, read_saved_chat
from soup_xb.data.tokenizer import open_tokenizer

TEXTS = (
    "Hello world",
    "<|im_start|>user\nhi<|im_end|>\n",
    "a <|endoftext|> b",
    "  two  spaces\n\n",
    "naïve 日本",
)
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
ASKED = [Message("user", "Paris?")]


@pytest.fixture
def base(bases: dict[str, Path], tmp_path: Path) -> Path:
    """A tokenizer in the words of transformers 4, with an odd layout of its own, beside files that are not its."""
    folder = tmp_path / "base"
    shutil.copytree(bases["byte-level"], folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings = older_spelling(settings) | {"chat_template": "{{ messages[0].content }}</s>", "own_key": 1}
    del settings["backend"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=5))
    for name in ("prepared.json", "README.md", "optimizer.pt", "merges.txt", "special_tokens_map.json"):
        (folder / name).write_text("{}")
    return folder


def saved(base: Path, folder: Path, template: str | None = None, **more: Any) -> Path:
    folder.mkdir()
    open_tokenizer(base, template).save(folder, **more)
    return folder


def ids(folder: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer(text).input_ids for text in TEXTS]


def written(folder: Path, name: str = "tokenizer_config.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name).read_text())
    return found


def test_the_base_s_own_files_travel_byte_for_byte(base: Path, tmp_path: Path) -> None:
    folder = saved(base, tmp_path / "saved")
    own = {"tokenizer.json", "tokenizer_config.json", "merges.txt", "special_tokens_map.json"}
    assert {file.name for file in folder.iterdir()} == own | {"generation_config.json"}
    for name in own:
        assert (folder / name).read_bytes() == (base / name).read_bytes()
    assert read_saved_chat(folder).differs is False


def test_a_template_of_the_run_s_own_stands_where_every_tool_looks(base: Path, tmp_path: Path) -> None:
    folder = saved(base, tmp_path / "saved", TEMPLATE)
    assert (folder / "chat_template.jinja").read_text() == TEMPLATE
    settings = written(folder)
    assert settings.pop("chat_template") == TEMPLATE
    assert settings == {key: value for key, value in written(base).items() if key != "chat_template"}
    assert (
        open_tokenizer(folder).prompt_ids(ASKED).tolist()
        == open_tokenizer(base, TEMPLATE).prompt_ids(ASKED).tolist()
    )
    assert read_saved_chat(folder).new_template


def test_the_base_s_own_template_given_by_hand_changes_nothing(base: Path, tmp_path: Path) -> None:
    folder = saved(base, tmp_path / "saved", written(base)["chat_template"])
    assert (folder / "tokenizer_config.json").read_bytes() == (base / "tokenizer_config.json").read_bytes()
    assert not (folder / "chat_template.jinja").exists()


def test_what_transformers_5_saved_is_spelled_as_before(bases: dict[str, Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases["byte-level"], base)
    new = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    named = {"model_specific_special_tokens": {"image_token": "[INST]"}}
    (base / "tokenizer_config.json").write_text(json.dumps({**written(base), **new, **named}))
    folder = saved(base, tmp_path / "saved")
    settings = written(folder)
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["additional_special_tokens"] == new["extra_special_tokens"]
    assert settings["extra_special_tokens"] == {"image_token": "[INST]"}
    assert ids(folder) == ids(base)
    before, after = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(folder)
    assert after.extra_special_tokens == before.extra_special_tokens
    assert after.image_token == before.image_token == "[INST]"


@pytest.mark.parametrize("bos", [True, False])
def test_llama_s_class_of_transformers_4_is_told_whether_texts_begin_with_bos(
    bos: bool, opened: Callable[..., Any], tmp_path: Path
) -> None:
    model = json.loads(opened("sentence-piece", None).hf.backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    base = tmp_path / "base"
    LlamaTokenizer(vocab=model["vocab"], merges=merges, add_bos_token=bos).save_pretrained(base)
    folder = saved(base, tmp_path / "saved")
    assert written(folder).get("add_bos_token") is (None if bos else False)
    assert ids(folder) == ids(base)


def test_an_adapter_s_folder_names_a_class_where_the_base_leaves_it_to_its_model(
    base: Path, tmp_path: Path
) -> None:
    settings = written(base)
    del settings["tokenizer_class"]
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    (base / "config.json").write_text(json.dumps({"model_type": "olmo2", "vocab_size": 500}))
    folder = saved(base, tmp_path / "saved")
    assert written(folder)["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert ids(folder) == ids(base)
    beside_a_model = tmp_path / "merged"
    beside_a_model.mkdir()
    shutil.copy(base / "config.json", beside_a_model)
    open_tokenizer(base).save(beside_a_model)
    assert (beside_a_model / "tokenizer_config.json").read_bytes() == (
        base / "tokenizer_config.json"
    ).read_bytes()


def test_a_class_that_only_the_model_s_type_overrules_is_not_named(base: Path, tmp_path: Path) -> None:
    """transformers builds Qwen 2's tokenizer anew from its vocabulary; for this type it takes the file as it stands."""
    (base / "tokenizer_config.json").write_text(
        json.dumps({**written(base), "tokenizer_class": "Qwen2Tokenizer"})
    )
    (base / "config.json").write_text(json.dumps({"model_type": "phi3", "pad_token_id": 0}))
    folder = saved(base, tmp_path / "saved")
    assert ids(folder) == ids(base)


def test_a_token_that_was_added_by_hand_is_saved(base: Path, tmp_path: Path) -> None:
    tokenizer = open_tokenizer(base)
    tokenizer.hf.add_tokens(["<new>"])
    folder = tmp_path / "saved"
    folder.mkdir()
    object.__setattr__(tokenizer, "encoder", type(tokenizer.encoder).of(tokenizer.hf))
    tokenizer.save(folder)
    again = AutoTokenizer.from_pretrained(folder)
    assert again("<new>").input_ids == tokenizer.hf("<new>").input_ids
    assert written(folder)["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_padding_token_changes_that_key_alone(base: Path, tmp_path: Path) -> None:
    settings = written(base)
    del settings["pad_token"]
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    folder = saved(base, tmp_path / "saved", pad_token="</s>")
    assert written(folder) == {**settings, "pad_token": "</s>"}


def test_the_generation_config_names_every_end(base: Path, tmp_path: Path) -> None:
    own = {"temperature": 0.6, "eos_token_id": 1, "top_p": 0.9}
    (base / "generation_config.json").write_text(json.dumps(own))
    plain, other = open_tokenizer(base), open_tokenizer(base, TEMPLATE)
    end = plain.hf.convert_tokens_to_ids("<|im_end|>")
    assert (plain.unnamed_end, other.unnamed_end) == ("", "<|im_end|>")
    same = saved(base, tmp_path / "same")
    assert (same / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
    folder = saved(base, tmp_path / "saved", TEMPLATE)
    assert written(folder, "generation_config.json") == {**own, "eos_token_id": [1, end]}
    assert read_saved_chat(folder).end_ids == (1, end)


def test_without_a_generation_config_the_ends_are_those_of_the_config(base: Path, tmp_path: Path) -> None:
    config = {"model_type": "llama", "eos_token_id": [1, 9], "bos_token_id": 0, "pad_token_id": 2}
    (base / "config.json").write_text(json.dumps(config))
    folder = saved(base, tmp_path / "saved", TEMPLATE)
    end = open_tokenizer(base).hf.convert_tokens_to_ids("<|im_end|>")
    expected = {"bos_token_id": 0, "pad_token_id": 2, "eos_token_id": [1, 9, end]}
    assert written(folder, "generation_config.json") == expected


def test_an_adapter_without_a_generation_config_has_its_base_s(base: Path, tmp_path: Path) -> None:
    (base / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "eos_token_id": [1, 9]}))
    adapter = saved(base, tmp_path / "adapter")
    (adapter / "generation_config.json").unlink()
    tokenizer = open_tokenizer(adapter, model=base)
    assert tokenizer.end_ids == (1, 9)
    (tmp_path / "merged").mkdir()
    tokenizer.save(tmp_path / "merged")
    assert written(tmp_path / "merged", "generation_config.json") == {
        "temperature": 0.6,
        "eos_token_id": [1, 9],
    }
