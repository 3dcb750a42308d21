"""Sessions on the tiny Llama with adapters attached, opened as often as a test likes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from soup_xb.core.base.modules import resolve_adapters
from soup_xb.core.config.schema import Config, DataConfig, LoraConfig, TrainingConfig
from soup_xb.core.rows.examples import Source
from soup_xb.core.rows.row import Row, text_row
from soup_xb.core.run.plan import Plan, make_plan
from soup_xb.core.run.session import Session
from soup_xb.runs.open import session_settings

Attached = Callable[..., tuple[Session, Plan]]


def _rows(count: int, seed: int) -> tuple[Row, ...]:
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        length = int(rng.integers(6, 40))
        tokens = rng.integers(3, 250, length)
        rows.append(text_row(tokens, np.arange(length) >= length // 3, Source("rows.jsonl", index + 1)))
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


# A config takes those of the sizes that its type knows.
_SIZES = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "sliding_window": 16,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "index_topk": 8, "index_n_heads": 2, "index_head_dim": 8,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8,
}  # fmt: skip
_EXPERTS = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "zero_expert_num"), 2
    ),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 24
    ),
    **dict.fromkeys(("shared_intermediate_size", "moe_shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("intermediate_size_mlp", "ffn_hidden_size"), 48),
    "moe_layer_start_index": 1,
}


@pytest.fixture(scope="session")
def tiny_experts(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_experts("mixtral")`: a base of that type with four small experts a layer; changes of its config follow."""
    import torch
    import transformers

    made: dict[str, Path] = {}

    def make(model_type: str, **changes: Any) -> Path:
        key = f"{model_type} {changes}"
        if key not in made:
            kind = type(transformers.CONFIG_MAPPING[model_type]().get_text_config())
            known, aliases = set(kind().to_dict()), getattr(kind, "attribute_map", {})
            sizes = {name: size for name, size in (_SIZES | _EXPERTS).items() if name in known | set(aliases)}
            sizes = {
                name: size
                for name, size in sizes.items()
                if aliases.get(name, name) not in sizes.keys() - {name}
            }
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(kind(**(sizes | changes)))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim > 1:
                        parameter.normal_(0.0, 0.15)
            folder = tmp_path_factory.mktemp(model_type)
            model.save_pretrained(folder)
            for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                shutil.copy(tiny_llama / file, folder / file)
            made[key] = folder
        return made[key]

    return make


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
        session = open_session(session_settings(config, base))
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

        from soup_xb.core.adapter.peft_file import saved_form, write_adapter

        folder = tmp_path_factory.mktemp("adapter")
        names = [module.name for module in session.describe().modules if not module.experts]
        write_adapter(folder, saved_form(plan.adapters, session.factors()), str(base), names)
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        stock = PeftModel.from_pretrained(model, folder)
        with torch.no_grad():
            return stock(torch.tensor(tokens, dtype=torch.int64)).logits.numpy()

    return logits
