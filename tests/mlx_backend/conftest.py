"""Sessions on the tiny Llama; OpenBLAS goes in front of MLX's own before a test imports mlx."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import soup_xb.backends.mlx  # noqa: F401
from soup_xb.core.base.modules import resolve_adapters
from soup_xb.core.config.schema import Config, DataConfig, LoraConfig, TrainingConfig
from soup_xb.core.rows.examples import Source
from soup_xb.core.rows.row import Row, text_row
from soup_xb.core.run.plan import Plan, make_plan, optimizer_settings
from soup_xb.core.run.session import SessionSettings

Opener = Callable[..., tuple[Any, Plan]]


def token_rows(count: int = 24, seed: int = 0) -> tuple[Row, ...]:
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        length = int(rng.integers(6, 40))
        tokens = rng.integers(3, 250, length)
        rows.append(text_row(tokens, np.arange(length) >= length // 3, Source("rows.jsonl", index + 1)))
    return tuple(rows)


@pytest.fixture
def opener(tiny_llama: Path) -> Iterator[Opener]:
    """`opener(lora=LoraConfig(…), base=…, **training)` gives a session and its plan; closed after the test."""
    from soup_xb.backends.mlx.session import open_session

    sessions = []

    def open_it(base: Path = tiny_llama, **training: Any) -> tuple[Any, Plan]:
        settings = TrainingConfig(**{"max_steps": 6, "lr": 5e-3, "lora": LoraConfig(r=4), **training})
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
        resolution = resolve_adapters(session.describe().modules, settings.lora, {})
        plan = make_plan(config, resolution, token_rows(), token_rows(5, seed=1), pad_id=0)
        session.attach(plan.adapters)
        return session, plan

    yield open_it
    for session in sessions:
        session.close()


@pytest.fixture(scope="session")
def quantized_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as mlx_lm.convert writes it, embedding and tied head in 4 bits too."""
    from mlx_lm.convert import convert

    folder = tmp_path_factory.mktemp("converted") / "llama-4bit"
    convert(str(tiny_llama), str(folder), quantize=True, q_bits=4, q_group_size=32, dtype="float32")
    return folder
