"""Sessions on the tiny Llama on either backend, opened as often as a test likes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# OpenBLAS goes in front of MLX's own before a test imports mlx.
import soup_xb.backends.mlx  # noqa: F401
from soup_xb.backends import open_session
from soup_xb.core.base.modules import resolve_adapters
from soup_xb.core.config.schema import Config, DataConfig, LoraConfig, TrainingConfig
from soup_xb.core.rows.examples import Source
from soup_xb.core.rows.row import Row, text_row
from soup_xb.core.run.plan import Plan, make_plan, optimizer_settings
from soup_xb.core.run.session import Session, SessionSettings

Opener = Callable[..., tuple[Session, Plan]]


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
    """`opener(backend, lora=LoraConfig(…), base=…, **training)` gives a session and its plan; closed after the test."""
    sessions = []

    def open_it(
        backend: str, base: Path = tiny_llama, attach: bool = True, weights: bool = True, **training: Any
    ) -> tuple[Session, Plan]:
        settings = TrainingConfig(**{"max_steps": 6, "lr": 5e-3, "lora": LoraConfig(r=4), **training})
        config = Config(base=str(base), data=DataConfig(train=("rows.jsonl",)), training=settings)
        session = open_session(
            backend,
            SessionSettings(
                base=base,
                precision=settings.precision,
                quantization=settings.quantization,
                gradient_checkpointing=settings.gradient_checkpointing,
                optimizer=optimizer_settings(settings),
                seed=settings.seed,
                weights=weights,
            ),
        )
        sessions.append(session)
        resolution = resolve_adapters(session.describe().modules, settings.lora, {})
        plan = make_plan(config, resolution, token_rows(), token_rows(5, seed=1), pad_id=0)
        if attach and weights:
            session.attach(plan.adapters)
        return session, plan

    yield open_it
    for session in sessions:
        session.close()
