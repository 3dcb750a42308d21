"""A saved adapter in another library's form, and the full model with the adapter folded in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from attrs import evolve

from soup_xb.core.adapter.mlx_lm_file import is_mlx_lm_adapter, read_mlx_lm, to_mlx_lm, write_mlx_lm
from soup_xb.core.adapter_file import adapter_folder, read_adapter, write_adapter
from soup_xb.core.disk import staging
from soup_xb.core.disk.durable import disk_errors
from soup_xb.core.errors import ModelError, Problem, ResourceError
from soup_xb.core.legible import mask_file
from soup_xb.core.objectives import Embedding
from soup_xb.core.session import EmbeddingSession
from soup_xb.embedding_model import refuse_embeddings, save_embedding_model, saved_facts
from soup_xb.trained import TrainedOptions, base_modules, base_of, open_trained, plan_of


def export_adapter(source: Path, target: Path, form: str, base: str | None = None) -> tuple[Problem, ...]:
    """Write an adapter (a run's output folder, a PEFT folder or an mlx-lm folder) as `peft` or `mlx-lm`.

    VeRA becomes the plain LoRA that it equals, in either form; the sides of its modules are the base's to tell. Returns
    what the user should know. Raises ModelError for an adapter that is damaged or already in that form, ResourceError
    where `target` exists.
    """
    folder = adapter_folder(source)
    if is_mlx_lm_adapter(folder):
        _refuse_same_form(folder, form, "mlx-lm")
        refuse_existing(target)
        plan, factors = read_mlx_lm(folder)
        with _published(target) as staged:
            # Without the base no short name is known to reach the adapted modules alone.
            write_adapter(staged, plan, factors, base or "", names=())
        return ()
    saved = read_adapter(folder)
    facts = saved_facts(saved, folder)
    if form == "mlx-lm":
        refuse_embeddings(saved, folder, "mlx-lm writes text")
    if not saved.is_vera:
        _refuse_same_form(folder, form, "peft")
    refuse_existing(target)
    objective = None if facts is None else Embedding(facts.scale, facts.pooling)
    modules = base_modules(base or base_of(saved, folder), objective) if saved.is_vera else ()
    plain = saved.plain(modules, folder)
    plan = plan_of(plain, folder)
    with _published(target) as staged:
        if form == "mlx-lm":
            write_mlx_lm(staged, to_mlx_lm(plain, folder))
        else:
            names = [module.name for module in modules]
            write_adapter(staged, plan, plain.factors, base or base_of(saved, folder), names)
    return (_plain_notice(plan.modules[0].rank),) if saved.is_vera else ()


def merge_adapter(options: TrainedOptions, target: Path) -> None:
    """Write the full model, base and adapter in one, with its tokenizer; sentence-transformers loads one that embeds.

    Raises ModelError for a quantized base, ResourceError where `target` exists or the disk is full.
    """
    refuse_existing(target)
    with open_trained(options) as trained, _published(target, trained.base.weight_bytes) as staged:
        trained.session.save_merged(staged)
        mask_file(staged / "config.json")
        if trained.embedding is None:
            trained.tokenizer.save(staged)
        else:
            pooling = cast("EmbeddingSession", trained.session).pooling
            facts = evolve(trained.embedding, pooling=pooling)
            save_embedding_model(staged, facts, trained.session, trained.tokenizer)


def refuse_existing(target: Path) -> None:
    """Raise ResourceError where something stands at `target`."""
    if target.exists():
        raise ResourceError(
            "output-exists",
            "already exists",
            where=str(target),
            help="choose another `--output`, or move it away.",
        )


@contextmanager
def _published(target: Path, expected_bytes: int = 0) -> Iterator[Path]:
    """A staged folder that stands at `target` once the block has filled it."""
    with disk_errors(target, expected_bytes):
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = staging.start(target)
        yield staged
        staging.publish(staged, target)


def _refuse_same_form(folder: Path, form: str, own: str) -> None:
    if form == own:
        raise ModelError(
            "same-form",
            f"the adapter already is in {form}'s form",
            where=str(folder),
            help=f"use the folder as it is, or `--to {'peft' if own == 'mlx-lm' else 'mlx-lm'}`.",
        )


def _plain_notice(rank: int) -> Problem:
    return Problem(
        "vera-as-lora",
        f"written as the plain LoRA of rank {rank} that the VeRA adapter equals, which every library reads; "
        "it is larger, because each module has its own copy of the factors",
    )
