"""Tiny bases that see or hear, made from configs, each with its processor."""

from __future__ import annotations

import json
import wave
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}MARK{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SIGHT = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip


def tokenizer(extra: Sequence[str], mark: str = "", **named: Any) -> Any:
    """A byte-level tokenizer with ChatML's special tokens and `extra` ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *extra]
    engine = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens([*special, *extra])
    return PreTrainedTokenizerFast(
        tokenizer_object=engine,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        bos_token="<|im_start|>",
        chat_template=TEMPLATE.replace("MARK", mark) if mark else None,
        **named,
    )


def save_model(folder: Path, auto: Any, config: Any) -> Path:
    import torch

    torch.manual_seed(0)
    model = auto._from_config(config) if hasattr(auto, "_from_config") else auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.15)
    model.save_pretrained(folder)
    return folder


def save_llava(folder: Path) -> Path:
    """LLaVA: a CLIP tower, a projector and a Llama; 16 tokens a picture."""
    import transformers as hf

    words = tokenizer(["<image>"], "<image>")
    pictures = hf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    hf.LlavaProcessor(
        pictures,
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=words.chat_template,
    ).save_pretrained(folder)
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**SIGHT, projection_dim=16).to_dict(),
        text_config=hf.LlamaConfig(**TEXT).to_dict(),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    return save_model(folder, hf.AutoModelForImageTextToText, config)


def save_idefics3(folder: Path) -> Path:
    """SmolVLM's kind: pictures in tiles, several a row padded to one grid, with a mask of their pixels."""
    import transformers as hf

    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 3) for column in range(1, 3)]
    special = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *tiles]
    words = tokenizer(special, "<image>")
    pictures = hf.Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = hf.Idefics3Processor(pictures, words, image_seq_len=4, chat_template=words.chat_template)
    processor.save_pretrained(folder)
    config = hf.Idefics3Config(
        vision_config=SIGHT,
        text_config=hf.LlamaConfig(**TEXT).to_dict(),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )
    return save_model(folder, hf.AutoModelForImageTextToText, config)


def save_qwen_vl(folder: Path) -> Path:
    """Qwen2.5-VL: patches of all pictures in one array beside a grid; its processor asks for one of videos too."""
    import transformers as hf

    special = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    words = tokenizer(special, "<|vision_start|><|image_pad|><|vision_end|>")
    words.save_pretrained(folder)
    hf.Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56, patch_size=14).save_pretrained(folder)
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {name: words.convert_tokens_to_ids(token) for name, token in zip(names, special, strict=True)}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    config = hf.Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_parameters": rope},
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32,
            "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1],
        },
        **ids,
    )  # fmt: skip
    return save_model(folder, hf.AutoModelForImageTextToText, config)


def save_gemma4(folder: Path, hears: bool = False) -> Path:
    """Gemma 4 that sees: its tower's linears are clippable, with finite clamps."""
    import transformers as hf

    named = {
        "image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>",
        "audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>",
    }  # fmt: skip
    words = tokenizer([*named.values(), "<|video|>"], "<|image|>", extra_special_tokens=named)
    words.save_pretrained(folder)
    pictures = hf.Gemma4ImageProcessorPil(patch_size=8, max_soft_tokens=70, pooling_kernel_size=2)
    parts = {
        "image_processor": pictures,
        "feature_extractor": hf.Gemma4AudioFeatureExtractor(feature_size=32),
    }
    settings = {name: json.loads(part.to_json_string()) for name, part in parts.items()}
    (folder / "processor_config.json").write_text(
        json.dumps({"processor_class": "Gemma4Processor", **settings})
    )
    attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = hf.Gemma4Config(
        text_config=TEXT | attention | {
            "global_head_dim": 16, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 320,
            "layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0,
        },
        vision_config=attention | {
            "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "patch_size": 8,
            "pooling_kernel_size": 2, "position_embedding_size": 64, "use_clipped_linears": True,
        },
        audio_config={
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "output_proj_dims": 32,
            "subsampling_conv_channels": [32, 4], "attention_chunk_size": 4, "attention_context_left": 5,
            "conv_kernel_size": 3,
        } if hears else None,
        image_token_id=words.image_token_id, boi_token_id=words.boi_token_id,
        eoi_token_id=words.eoi_token_id, audio_token_id=words.audio_token_id,
    )  # fmt: skip
    return save_model(folder, hf.AutoModelForImageTextToText, config)


def save_whisper(folder: Path) -> Path:
    """Whisper, which hears two seconds at a time and knows English and German."""
    import transformers as hf
    from tokenizers import pre_tokenizers

    marks = ["startoftranscript", "en", "de", "translate", "transcribe", "notimestamps"]
    special = [f"<|{mark}|>" for mark in marks]
    tokens = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *special]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    words = hf.WhisperTokenizer(vocab=vocabulary, merges=[], pad_token="<|endoftext|>")
    words.add_special_tokens({"additional_special_tokens": special})
    sounds = hf.WhisperFeatureExtractor(feature_size=16, chunk_length=2)
    hf.WhisperProcessor(sounds, words).save_pretrained(folder)
    config = hf.WhisperConfig(
        vocab_size=320, num_mel_bins=16, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
        max_source_positions=100, max_target_positions=64, decoder_start_token_id=vocabulary[special[0]],
        bos_token_id=0, eos_token_id=0, pad_token_id=0, begin_suppress_tokens=None, suppress_tokens=None,
    )  # fmt: skip
    return save_model(folder, hf.AutoModelForSpeechSeq2Seq, config)


def save_qwen_audio(folder: Path) -> Path:
    """Qwen2-Audio: Whisper's ear before a chat model."""
    import transformers as hf

    special = ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
    words = tokenizer(special, "<|audio_bos|><|AUDIO|><|audio_eos|>")
    sounds = hf.WhisperFeatureExtractor(feature_size=16, chunk_length=2)
    hf.Qwen2AudioProcessor(sounds, words, chat_template=words.chat_template).save_pretrained(folder)
    config = hf.Qwen2AudioConfig(
        audio_config={
            "num_mel_bins": 16, "d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32, "max_source_positions": 100,
        },
        text_config=hf.Qwen2Config(**TEXT).to_dict(),
        audio_token_index=words.convert_tokens_to_ids(special[0]),
    )  # fmt: skip
    return save_model(folder, hf.AutoModelForMultimodalLM, config)


BASES = {
    "llava": save_llava,
    "idefics3": save_idefics3,
    "qwen-vl": save_qwen_vl,
    "gemma-4": save_gemma4,
    "gemma-4-audio": partial(save_gemma4, hears=True),
    "whisper": save_whisper,
    "qwen-audio": save_qwen_audio,
}


def save_picture(file: Path, colour: tuple[int, int, int], size: tuple[int, int] = (32, 32)) -> Path:
    from PIL import Image

    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(file)
    return file


def save_tone(file: Path, pitch: float, seconds: float = 0.2, rate: int = 16000) -> Path:
    import numpy as np

    file.parent.mkdir(parents=True, exist_ok=True)
    samples = np.sin(np.arange(int(seconds * rate)) * 2 * np.pi * pitch / rate)
    with wave.open(str(file), "wb") as written:
        written.setnchannels(1)
        written.setsampwidth(2)
        written.setframerate(rate)
        written.writeframes((samples * 20000).astype("<i2").tobytes())
    return file
