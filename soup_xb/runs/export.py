"""A saved adapter in another library's form, and the full model with the adapter folded in."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attrs import evolve

from soup_xb.core import disk
from soup_xb.core.adapter.extras import MODULE_FOLDERS, is_reward_model, write_head
from soup_xb.core.adapter.foreign_settings import read_settings
from soup_xb.core.adapter.mlx_lm_file import (
    StretchedBase,
    check_exportable,
    is_mlx_lm_adapter,
    read_mlx_lm,
    to_mlx_lm,
    write_mlx_lm,
)
from soup_xb.core.adapter.peft_file import SETTINGS, SavedAdapter, adapter_folder, read_adapter, write_adapter
from soup_xb.core.base.folder import inspect_base
from soup_xb.core.base.rope import RopeScaling, note_scaling, noted_scaling
from soup_xb.core.disk import disk_errors, write_text
from soup_xb.core.errors import ModelError, Problem, ResourceError
from soup_xb.core.text import mask_file
from soup_xb.data.hub import resolve_base
from soup_xb.data.media_inputs import is_processor_folder
from soup_xb.runs.adapters import (
    TrainedOptions,
    base_modules,
    base_of,
    embedder_of,
    media_task,
    open_trained,
    plan_of,
    refuse_embeddings,
    save_embedding_model,
    saved_facts,
)


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
        scaling = noted_scaling(read_settings(folder / SETTINGS), folder)
        with _published(target) as staged:
            # Without the base no short name is known to reach the adapted modules alone.
            write_adapter(staged, plan, factors, base or "", names=())
            if scaling is not None:
                note_scaling(staged, scaling)
        return ()
    saved = read_adapter(folder)
    if not saved.is_vera:
        _refuse_same_form(folder, form, "peft")
    return (
        _to_mlx_lm(saved, folder, target, base)
        if form == "mlx-lm"
        else _to_plain(saved, folder, target, base)
    )


def _to_mlx_lm(saved: SavedAdapter, folder: Path, target: Path, base: str | None) -> tuple[Problem, ...]:
    _refuse_for_mlx_lm(saved, folder)
    scaling = noted_scaling(saved.settings, folder)
    if scaling is not None:
        check_exportable(scaling, folder)
    refuse_existing(target)
    modules = base_modules(base or base_of(saved, folder)) if saved.is_vera else ()
    adapter = to_mlx_lm(saved.plain(modules, folder), folder)
    notices = [_plain_notice(adapter.settings["lora_parameters"]["rank"])] if saved.is_vera else []
    stretched = None if scaling is None else _stretched(scaling, base or base_of(saved, folder))
    with _published(target) as staged:
        write_mlx_lm(staged, adapter)
        if stretched is not None:
            note_scaling(staged, stretched.scaling)
            write_text(staged / "README.md", stretched.readme())
            notices.append(stretched.notice(target))
    return tuple(notices)


def _to_plain(saved: SavedAdapter, folder: Path, target: Path, base: str | None) -> tuple[Problem, ...]:
    """VeRA as the plain LoRA that it equals, with all else that its folder holds for those who load it."""
    refuse_existing(target)
    name = base or base_of(saved, folder)
    opened = inspect_base(resolve_base(name), weights=False)
    facts = saved_facts(saved, folder, opened)
    modules = base_modules(name, facts, media_task(opened.path, folder))
    plain = saved.plain(modules, folder)
    plan = plan_of(plain, folder)
    with _published(target) as staged:
        write_adapter(staged, plan, plain.factors, name, [module.name for module in modules])
        if saved.head is not None:
            write_head(staged, saved.head)
        if (scaling := noted_scaling(saved.settings, folder)) is not None:
            note_scaling(staged, scaling)
        _copy_beside(folder, staged)
    return (_plain_notice(plan.modules[0].rank),)


def _stretched(scaling: RopeScaling, name: str) -> StretchedBase:
    if scaling.original or scaling.kind != "yarn":
        return StretchedBase(name, scaling, scaling.original)
    config = inspect_base(resolve_base(name), weights=False).config
    text = config.get("text_config")
    longest = (text if isinstance(text, dict) else config).get("max_position_embeddings")
    if not isinstance(longest, int):
        raise ModelError("base-config", "`max_position_embeddings` is missing", where=name)
    return StretchedBase(name, evolve(scaling, original=longest), longest)


def _refuse_for_mlx_lm(saved: SavedAdapter, folder: Path) -> None:
    """mlx-lm reads text and writes text."""
    refuse_embeddings(saved, folder, "mlx-lm writes text")
    if saved.head is not None:
        raise is_reward_model(folder)
    if is_processor_folder(folder):
        raise ModelError(
            "files-not-exported",
            "the adapter was trained on pictures or sounds, and mlx-lm reads text alone",
            where=str(folder),
            help="load it with transformers and PEFT (its README shows how), or write the whole model: `soupx merge`.",
        )


def _copy_beside(folder: Path, staged: Path) -> None:
    """The tokenizer's, processor's and sentence-transformers' files."""
    places = [folder, *(folder / name for name in MODULE_FOLDERS)]
    for file in (file for place in places if place.is_dir() for file in sorted(place.iterdir())):
        to = staged / file.relative_to(folder)
        if file.suffix in (".json", ".jinja", ".txt", ".model") and file.is_file() and not to.exists():
            to.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, to)


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
            facts = evolve(trained.embedding, pooling=embedder_of(trained.session).pooling)
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
        # The inner one speaks of the free space while what was staged still fills it.
        with disk.published(target) as staged, disk_errors(target, expected_bytes):
            yield staged


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
