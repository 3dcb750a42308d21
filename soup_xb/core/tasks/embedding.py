"""Embedding models, as sentence-transformers loads them."""

from __future__ import annotations

from soup_xb.core.objectives import losses
from soup_xb.core.tasks.task import Task

TASK = Task(
    name="embedding",
    about="Train vectors of texts: those that belong together are near each other.",
    formats=("anchor-positive",),
    kind="embedding",
    loss=losses.embedding,
    objective="embeddings",
    keys=("training.pooling", "data.query_prompt", "data.document_prompt"),
    peft_type="FEATURE_EXTRACTION",
    no_sharding="encoders, and bases without their head, are not cut over processes here; most of them are small",
    feature="embedding",
)
