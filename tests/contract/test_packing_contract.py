"""Packed documents do not see one another, on either backend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from soup_xb.core.config.support_rows import BACKENDS
from soup_xb.core.errors import ModelError
from soup_xb.core.rows.batches import collate_rows
from soup_xb.core.rows.examples import Source
from soup_xb.core.rows.packing import pack
from soup_xb.core.rows.row import Row, text_row
from soup_xb.core.run.plan import Plan
from soup_xb.core.run.session import Session, StepSettings
from soup_xb.runs.open import check_apart

Opener = Callable[..., tuple[Session, Plan]]
LENGTHS = (5, 9, 12, 3, 20, 7)


def rows() -> list[Row]:
    rng = np.random.default_rng(3)
    return [
        text_row(rng.integers(3, 250, length), np.arange(length) > 0, Source("rows.jsonl", line))
        for line, length in enumerate(LENGTHS, 1)
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_rows_have_the_loss_of_single_ones(opener: Opener, backend: str) -> None:
    session, _ = opener(backend)
    packed = pack(rows(), 24)
    assert len(packed) < len(LENGTHS)
    together = session.evaluate([collate_rows(packed, None, 0)])
    alone = session.evaluate([collate_rows([row], None, 0) for row in rows()])
    assert together.target_tokens == alone.target_tokens
    assert together.total == pytest.approx(alone.total, rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_on_packed_rows_is_the_step_on_single_ones(
    opener: Opener, backend: str, checkpointing: bool
) -> None:
    targets = sum(row.target_tokens for row in rows())
    results, factors = [], []
    for batches in (
        [collate_rows(pack(rows(), 24), None, 0)],
        [collate_rows([row], None, 0) for row in rows()],
    ):
        session, _ = opener(backend, gradient_checkpointing=checkpointing)
        for step in (1, 2, 3):
            result = session.train_step(batches, StepSettings(step, 5e-3, targets))
        results.append(result)
        factors.append(session.factors())
    assert results[0].loss == pytest.approx(results[1].loss, abs=1e-5)
    assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-4)
    for name, arrays in factors[0].items():
        np.testing.assert_allclose(arrays["lora_B"], factors[1][name]["lora_B"], atol=2e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_base_that_keeps_documents_apart_passes_the_check(opener: Opener, backend: str) -> None:
    session, _ = opener(backend)
    check_apart(session, pack(rows(), 24), 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_base_that_lets_documents_see_each_other_is_refused(
    opener: Opener, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, _ = opener(backend)
    real: Any = session.evaluate

    def crossing(batches: Any, adapter: bool = True) -> Any:
        from attrs import evolve

        return real([evolve(batch, position_ids=None) for batch in batches], adapter)

    monkeypatch.setattr(session, "evaluate", crossing)
    with pytest.raises(ModelError, match="lets a document see the one before it"):
        check_apart(session, pack(rows(), 24), 0)


SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
GPT2 = {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MAMBA = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("backend", "config"),
    [
        ("torch", transformers.Gemma3TextConfig(**SIZES, **SLIDING)),
        ("mlx", transformers.Gemma3TextConfig(**SIZES, **SLIDING)),
        ("torch", transformers.GPT2Config(**GPT2, bos_token_id=1, eos_token_id=2)),
    ],
    ids=["sliding window on torch", "sliding window on mlx", "learned positions"],
)
def test_documents_stay_apart_whatever_the_kind_of_attention(
    save_model: Callable[..., Path], opener: Opener, tmp_path: Path, backend: str, config: Any
) -> None:
    session, _ = opener(backend, base=save_model(tmp_path / "base", config), attach=False)
    together = session.evaluate([collate_rows(pack(rows(), 40), None, 0)])
    alone = session.evaluate([collate_rows([row], None, 0) for row in rows()])
    assert together.total == pytest.approx(alone.total, rel=1e-5)


def test_a_recurrent_base_is_refused(save_model: Callable[..., Path], opener: Opener, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", transformers.MambaConfig(**MAMBA))
    session, _ = opener("torch", base=base, attach=False)
    with pytest.raises(ModelError, match="see the one before it") as refused:
        check_apart(session, pack(rows(), 40), 0)
    assert refused.value.problems[0].code == "documents-not-apart"
