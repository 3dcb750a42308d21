"""`task: embedding` on torch: the loss is sentence-transformers', pooling and gradients are what they should be."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel

from soup_xb.backends.torch.session import TorchSession, open_session
from soup_xb.backends.torch.step import XP
from soup_xb.core.adapter.peft_file import saved_form, write_adapter
from soup_xb.core.base.modules import resolve_adapters
from soup_xb.core.config.schema import Config, DataConfig, LoraConfig, TrainingConfig
from soup_xb.core.errors import ModelError
from soup_xb.core.objectives import losses
from soup_xb.core.objectives.objective import EmbeddingObjective
from soup_xb.core.rows.batches import MicroBatch, collate
from soup_xb.core.rows.examples import Source
from soup_xb.core.rows.row import Row, TokenSequence
from soup_xb.core.run.plan import Plan, make_plan
from soup_xb.core.run.session import RestartSettings, StepSettings
from soup_xb.runs.open import session_settings

Opened = Callable[..., tuple[TorchSession, Plan]]


def text(rng: np.random.Generator) -> TokenSequence:
    tokens = rng.integers(3, 250, int(rng.integers(2, 24)))
    return TokenSequence(tokens, np.zeros(len(tokens), np.bool_), Source("rows.jsonl", 1))


def rows(count: int, negatives: bool = True) -> tuple[Row, ...]:
    rng = np.random.default_rng(0)
    return tuple(
        Row("embedding", tuple(text(rng) for _ in range(3 if negatives and index % 3 else 2)))
        for index in range(count)
    )


@pytest.fixture
def opened(tiny_encoder: Path) -> Iterator[Opened]:
    """`opened(lora={…}, base=…, **training)`: a session for embeddings with adapters, and its plan of 16 rows."""
    sessions = []

    def open_it(
        lora: dict[str, Any] | None = None, base: Path = tiny_encoder, **training: Any
    ) -> tuple[TorchSession, Plan]:
        adapter = LoraConfig(**{"r": 4, "alpha": 8, **(lora or {})})
        settings = TrainingConfig(
            **{"max_steps": 8, "lr": 5e-3, "batch_size": 8, "lora": adapter, **training}
        )
        data = DataConfig(train=("rows.jsonl",))
        config = Config(base=str(base), task="embedding", data=data, training=settings)
        session = open_session(session_settings(config, base))
        sessions.append(session)
        resolution = resolve_adapters(session.describe().modules, adapter, {})
        plan = make_plan(config, resolution, rows(16), (), pad_id=0)
        session.attach(plan.adapters)
        return session, plan

    yield open_it
    for session in sessions:
        session.close()


def train(session: TorchSession, plan: Plan, steps: int = 3) -> list[Any]:
    return [
        session.train_step(plan.micro_batches(step), StepSettings(step, 5e-3, 0, plan.examples(step)))
        for step in range(1, steps + 1)
    ]


def texts(plan: Plan) -> MicroBatch:
    return collate([sequence for row in plan.rows[:4] for sequence in row.sequences], plan.pad_id)


@pytest.mark.parametrize("negatives", [0, 1])
def test_the_loss_is_that_of_sentence_transformers(negatives: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    generator = torch.Generator().manual_seed(3)
    sides = [torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(2 + negatives)]
    oracle = MultipleNegativesRankingLoss(model=torch.nn.Identity(), scale=20.0)
    expected = oracle.compute_loss_from_embeddings(sides, torch.zeros(6))
    objective = EmbeddingObjective(losses.embedding, {"embedding_scale": 20.0}, {})
    constants = {"right": torch.arange(6), "compared": torch.ones(6)}
    found, told = objective.losses(XP, (sides[0], torch.cat(sides[1:])), constants, {})
    metrics = {name: values for name, (values, _) in told.items()}
    assert found.mean().item() == pytest.approx(expected.item(), abs=1e-12)
    cosines = torch.nn.functional.cosine_similarity(sides[0][:, None], torch.cat(sides[1:])[None], dim=-1)
    assert torch.allclose(metrics["positive_cosine"], cosines[range(6), range(6)])
    wrong = cosines.masked_fill(torch.eye(*cosines.shape, dtype=torch.bool), 0.0).sum(1)
    assert torch.allclose(metrics["negative_cosine"], wrong / (cosines.shape[1] - 1))


def test_a_step_is_the_formula_on_the_session_s_own_vectors(opened: Opened) -> None:
    session, plan = opened(embedding_scale=7.0)
    (batch,) = plan.micro_batches(1)
    assert batch.beside is not None
    anchors, candidates = (
        torch.from_numpy(session.embedder.embeddings(one)) for one in (batch, batch.beside)
    )
    expected = torch.nn.functional.cross_entropy(7.0 * anchors @ candidates.T, torch.arange(8))
    before = session.evaluate([batch])
    (result,) = train(session, plan, 1)
    assert before.examples == 8
    assert result.loss == pytest.approx(expected.item(), abs=1e-5)
    assert before.mean == pytest.approx(expected.item(), abs=1e-5)
    assert before.means == pytest.approx(dict(result.means), abs=1e-6)
    nearest = (anchors @ candidates.T).argmax(1) == torch.arange(8)
    assert result.means["accuracy"] == pytest.approx(nearest.float().mean().item())
    assert -1 <= result.means["negative_cosine"] <= result.means["positive_cosine"] + 1 <= 2


@pytest.mark.parametrize("base", ["encoder", "decoder"])
def test_stock_libraries_give_the_live_vectors(
    opened: Opened, tiny_encoder: Path, tiny_llama: Path, tmp_path: Path, base: str
) -> None:
    path = {"encoder": tiny_encoder, "decoder": tiny_llama}[base]
    session, plan = opened(base=path)
    assert session.embedder.pooling == {"encoder": "mean", "decoder": "last"}[base]
    train(session, plan)
    names = [module.name for module in session.describe().modules]
    write_adapter(tmp_path, saved_form(plan.adapters, session.factors()), str(path), names)
    model = transformers.AutoModel.from_pretrained(path, dtype=torch.float32)
    stock = PeftModel.from_pretrained(model, tmp_path).eval()
    assert stock.peft_config["default"].task_type == "FEATURE_EXTRACTION"
    live = session.embedder.embeddings(texts(plan))
    places = [sequence for row in plan.rows[:4] for sequence in row.sequences]
    for index, row in enumerate(places):
        with torch.no_grad():
            hidden = stock(input_ids=torch.tensor(row.tokens[None], dtype=torch.int64)).last_hidden_state[0]
        vector = hidden.mean(0) if base == "encoder" else hidden[-1]
        assert live[index] == pytest.approx((vector / vector.norm()).numpy(), abs=1e-5)
    assert np.abs(live - session.embedder.embeddings(texts(plan), adapter=False)).max() > 1e-3


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_padding_changes_no_vector(opened: Opened, pooling: str) -> None:
    session, plan = opened(pooling=pooling)
    train(session, plan, 1)
    together = session.embedder.embeddings(texts(plan))
    places = [sequence for row in plan.rows[:4] for sequence in row.sequences]
    alone = np.concatenate([session.embedder.embeddings(collate([row], 0)) for row in places])
    assert together == pytest.approx(alone, abs=1e-6)
    assert np.linalg.norm(together, axis=1) == pytest.approx(np.ones(len(together)), abs=1e-6)


def test_auto_reaches_every_linear_layer_of_the_blocks_and_no_pooler(opened: Opened) -> None:
    session, plan = opened()
    names = {adapter.name for adapter in plan.adapters.modules}
    linears = {module.name for module in session.describe().modules}
    assert linears - names == {"pooler.dense"}
    assert len(names) == 12
    result = train(session, plan, 1)[0]
    assert result.applied
    moved = [arrays["lora_B"].any() for arrays in session.factors().values()]
    assert all(moved)


@pytest.mark.parametrize(
    ("lora", "training"),
    [
        ({"init_strategy": "pissa"}, {}),
        ({"init_strategy": "olora"}, {}),
        ({"use_dora": True}, {}),
        ({"use_rslora": True}, {}),
        ({"use_vera": True}, {}),
        ({}, {"gradient_checkpointing": True}),
        ({"dropout": 0.1}, {}),
    ],
    ids=lambda value: str(next(iter(value), "")),
)
def test_every_kind_of_adapter_starts_at_the_base_and_learns(
    opened: Opened, lora: dict[str, Any], training: dict[str, Any]
) -> None:
    session, plan = opened(lora, **training)
    base, start = (
        session.embedder.embeddings(texts(plan), adapter=False),
        session.embedder.embeddings(texts(plan)),
    )
    assert start == pytest.approx(base, abs=1e-5)
    results = train(session, plan, 6)
    assert all(result.applied for result in results)
    assert np.abs(session.embedder.embeddings(texts(plan)) - base).max() > 1e-5
    assert session.embedder.embeddings(texts(plan), adapter=False) == pytest.approx(base, abs=1e-5)


@pytest.mark.parametrize("mode", ["prune", "merge"])
def test_a_restart_works_on_an_encoder(opened: Opened, mode: str) -> None:
    session, plan = opened(relora_steps=2, relora_mode=mode, relora_warmup_ratio=0.0)
    train(session, plan)
    base, before = (
        session.embedder.embeddings(texts(plan), adapter=False),
        session.embedder.embeddings(texts(plan)),
    )
    result = session.restart(RestartSettings(3, mode, 0.5, True))
    assert bool(result.pruned) == (mode == "prune")
    after = session.embedder.embeddings(texts(plan))
    assert (np.abs(after - before).max() < 1e-5) == (mode == "merge")
    assert session.embedder.embeddings(texts(plan), adapter=False) == pytest.approx(base, abs=1e-5)


def test_a_checkpointed_encoder_has_the_same_gradient(opened: Opened) -> None:
    norms = []
    for asked in (False, True):
        session, plan = opened(gradient_checkpointing=asked)
        norms.append(train(session, plan, 1)[0].grad_norm)
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_a_process_without_rows_takes_part_and_adds_nothing(opened: Opened) -> None:
    session, plan = opened()
    (batch,) = plan.micro_batches(1)
    nothing = plan.micro_batches(1, 8, 9)
    assert nothing[0].beside is not None
    assert not nothing[0].lengths.any()
    assert not nothing[0].counted.any()
    assert not nothing[0].constants["places"].size
    alone = session.evaluate([batch])
    assert session.evaluate([batch, *nothing]).mean == pytest.approx(alone.mean, abs=1e-6)
    found = session.train_step([batch, *nothing], StepSettings(1, 5e-3, 0, 8))
    assert found.applied
    assert found.loss == pytest.approx(alone.mean, abs=1e-5)


def test_an_encoder_decoder_is_refused(opened: Opened, tiny_encoder: Path, tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=320, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    transformers.T5Model(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError) as refused:
        opened(base=tmp_path)
    assert refused.value.problems[0].code == "not-a-text-model"
