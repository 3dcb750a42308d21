"""Sessions on the tiny Llama with adapters attached, opened as often as a test likes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from soup_xb.core.config import Config, DataConfig, LoraConfig, TrainingConfig
from soup_xb.core.examples import Source, TokenRow
from soup_xb.core.modules import resolve_adapters
from soup_xb.core.plan import Plan, make_plan, optimizer_settings
from soup_xb.core.session import Session, SessionSettings

Attached = Callable[..., tuple[Session, Plan]]


def _rows(count: int, seed: int) -> tuple[TokenRow, ...]:
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        length = int(rng.integers(6, 40))
        tokens = rng.integers(3, 250, length)
        rows.append(TokenRow(tokens, np.arange(length) >= length // 3, Source("rows.jsonl", index + 1)))
    return tuple(rows)


@pytest.fixture(scope="session")
def tiny_gemma4(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 4 with text, vision and audio towers: 34 clippable linears, 22 of them with finite clamps.

    Two of its four decoder blocks share the keys and values of the other two.
    """
    import torch
    import transformers

    attention = {"num_attention_heads": 4, "hidden_size": 32}
    text = {
        "vocab_size": 320, "vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 8,
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "intermediate_size": 48, "sliding_window": 16,
        "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16, "max_position_embeddings": 256,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "final_logit_softcapping": 30.0,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "num_hidden_layers": 2, "intermediate_size": 48, "num_key_value_heads": 4, "head_dim": 8,
        "patch_size": 4, "pooling_kernel_size": 2, "position_embedding_size": 64, "use_clipped_linears": True,
    }  # fmt: skip
    audio = {
        "num_hidden_layers": 2, "subsampling_conv_channels": [8, 4], "attention_chunk_size": 4,
        "attention_context_left": 5, "output_proj_dims": 32,
    }  # fmt: skip
    config = transformers.Gemma4Config(
        text_config=attention | text, vision_config=attention | vision, audio_config=attention | audio,
        image_token_id=300, audio_token_id=301, video_token_id=302, boi_token_id=303, eoi_token_id=304,
        boa_token_id=305, eoa_token_index=306,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    wrappers = [module for module in model.modules() if type(module).__name__ == "Gemma4ClippableLinear"]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.15)
        for wrapper in wrappers[::3] + wrappers[1::3][:10]:
            for bound, value in (
                ("input_min", -0.5),
                ("input_max", 0.6),
                ("output_min", -0.3),
                ("output_max", 0.4),
            ):
                getattr(wrapper, bound).fill_(value)
    folder = tmp_path_factory.mktemp("tower-base")
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_llama / file, folder / file)
    return folder


@pytest.fixture
def attached(tiny_llama: Path) -> Iterator[Attached]:
    """`attached(lora={…}, base=…, **training)` gives a session and its plan; closed after the test."""
    from soup_xb.backends.torch.session import open_session

    sessions: list[Session] = []

    def open_it(
        lora: dict[str, Any] | None = None, base: Path = tiny_llama, **training: Any
    ) -> tuple[Session, Plan]:
        adapter = LoraConfig(**{"r": 4, "alpha": 8, **(lora or {})})
        settings = TrainingConfig(**{"max_steps": 8, "lr": 5e-3, "lora": adapter, **training})
        config = Config(base=str(base), data=DataConfig(train=("rows.jsonl",)), training=settings)
        session = open_session(
            SessionSettings(
                base=base,
                precision=settings.precision,
                quantization=settings.quantization,
                gradient_checkpointing=settings.gradient_checkpointing,
                optimizer=optimizer_settings(settings),
                seed=settings.seed,
            )
        )
        sessions.append(session)
        resolution = resolve_adapters(session.describe().modules, adapter, {})
        plan = make_plan(config, resolution, _rows(24, 0), _rows(5, 1), pad_id=0)
        session.attach(plan.adapters)
        return session, plan

    yield open_it
    for session in sessions:
        session.close()


@pytest.fixture
def stock_logits(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`stock_logits(session, plan, tokens)`: the saved adapter's logits on the untouched base, in stock PEFT."""

    def logits(session: Session, plan: Plan, tokens: Any, base: Path = tiny_llama) -> Any:
        import torch
        import transformers
        from peft import PeftModel

        from soup_xb.core.adapter_file import write_adapter

        folder = tmp_path_factory.mktemp("adapter")
        names = [module.name for module in session.describe().modules]
        write_adapter(folder, plan.adapters, session.factors(), str(base), names)
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        stock = PeftModel.from_pretrained(model, folder)
        with torch.no_grad():
            return stock(torch.tensor(tokens, dtype=torch.int64)).logits.numpy()

    return logits
