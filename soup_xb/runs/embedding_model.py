"""An embedding model as sentence-transformers loads it: its files beside a saved adapter, or in a merged model."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from soup_xb.core.adapter.extras import (
    EMBEDDING_FILE,
    EmbeddingFacts,
    read_embedding_facts,
    write_embedding_files,
)
from soup_xb.core.adapter.peft_file import SavedAdapter, adapter_folder, read_adapter
from soup_xb.core.base.folder import BaseFolder
from soup_xb.core.errors import ModelError
from soup_xb.core.objectives.settings import Embedding
from soup_xb.core.run.session import EmbeddingSession, Session
from soup_xb.data.tokenize import fitted_data
from soup_xb.data.tokenizer import ChatTokenizer
from soup_xb.runs.open import OpenRun

TASK_TYPE = "FEATURE_EXTRACTION"


def trained_facts(run: OpenRun) -> EmbeddingFacts:
    """How a run turned texts into vectors."""
    config, session = run.loaded.config, cast("EmbeddingSession", run.session)
    return EmbeddingFacts(
        pooling=session.pooling,
        scale=config.training.embedding_scale or Embedding().scale,
        max_length=fitted_data(config, run.base, run.tokenizer)[0].max_length,
        query_prompt=config.data.query_prompt or "",
        document_prompt=config.data.document_prompt or "",
    )


def embeds(saved: SavedAdapter, folder: Path, base: BaseFolder | None = None) -> bool:
    """Whether a saved adapter's model makes vectors of texts.

    PEFT writes no task where it was given none: then the files beside it tell, or a `base` that writes none.
    """
    told = saved.settings.get("task_type")
    if told is not None or saved.head is not None:
        return bool(told == TASK_TYPE)
    return (folder / EMBEDDING_FILE).is_file() or (base is not None and base.is_encoder)


def saved_facts(
    saved: SavedAdapter | None, folder: Path | None, base: BaseFolder | None = None
) -> EmbeddingFacts | None:
    """How a saved adapter's model turns texts into vectors; None for an adapter that does not embed.

    One that another tool wrote has our defaults, and the pooling that fits its base.
    """
    if saved is None or folder is None or not embeds(saved, folder, base):
        return None
    default = Embedding()
    return read_embedding_facts(folder) or EmbeddingFacts(
        pooling=default.pooling, scale=default.scale, max_length=512
    )


def save_embedding_model(
    folder: Path, facts: EmbeddingFacts, session: Session, tokenizer: ChatTokenizer
) -> None:
    """Write sentence-transformers' files and the tokenizer, which needs a padding token where several texts meet."""
    write_embedding_files(folder, facts, session.describe().hidden_size)
    if tokenizer.hf.pad_token is None:
        tokenizer.hf.pad_token = tokenizer.hf.convert_ids_to_tokens(tokenizer.pad_id)
    tokenizer.save(folder)


def refuse_embeddings(saved: SavedAdapter, folder: Path, what: str) -> None:
    """Raise ModelError where an adapter that embeds texts is asked for words."""
    if embeds(saved, folder):
        raise ModelError(
            "embeds-only",
            f"the adapter makes vectors of texts, and {what}",
            where=str(folder),
            help="load the folder with `sentence_transformers.SentenceTransformer`, or use `soupx eval`.",
        )


def refuse_to_answer(adapter: Path | None) -> None:
    """Raise ModelError where a prompt is put to an adapter that embeds texts; before its base is opened."""
    if adapter is not None:
        folder = adapter_folder(adapter)
        refuse_embeddings(read_adapter(folder), folder, "has no answers to give")
