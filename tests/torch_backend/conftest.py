"""Sessions on the tiny Llama with adapters attached, opened as often as a test likes."""

from __future__ import annotations

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
