"""A saved adapter in another library's form, and the full model with the adapter folded in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from attrs import evolve, frozen

from soup_xb.core import disk
from soup_xb.core.adapter.extras import MODULE_FOLDERS, is_reward_model, write_head
from soup_xb.core.adapter.foreign_settings import read_settings
from soup_xb.core.adapter.mlx_lm_file import (
    StretchedBase,
    check_exportable,
    is_mlx_lm_adapter,
    mlx_lm_base,
    read_mlx_lm,
    to_mlx_lm,
    tokenizer_readme,
    write_mlx_lm,
)
from soup_xb.core.adapter.peft_file import (
    SETTINGS,
    Factors,
    SavedAdapter,
    adapter_folder,
    adapter_modules,
    read_adapter,
    read_stored,
    saved_form,
    write_adapter,
)
from soup_xb.core.adapter.plan import AdapterPlan
from soup_xb.core.adapter.probe import share_off
from soup_xb.core.adapter.readers import (
    NativeRanks,
    SavedForm,
    has_universal_form,
    is_head,
    is_universal,
    scales_rounded,
)
from soup_xb.core.base.folder import has_tied_head, inspect_base, read_object
from soup_xb.core.base.rope import RopeScaling, note_scaling, noted_scaling
from soup_xb.core.disk import disk_errors, write_text
from soup_xb.core.errors import ModelError, Problem, ResourceError
from soup_xb.core.rows.batches import collate
from soup_xb.core.rows.examples import Source
from soup_xb.core.rows.row import TokenSequence
from soup_xb.core.run.record import RECORD, read_record
from soup_xb.core.text import mask_file
from soup_xb.data.hub import base_at_hand, portable_name, resolve_base
from soup_xb.data.media_inputs import is_processor_folder
from soup_xb.data.model_files import copy_processor, copy_saved_tokenizer, read_saved_chat
from soup_xb.runs.adapters import (
    LoadedAdapter,
    TrainedOptions,
    base_modules,
    base_of,
    embedder_of,
    media_task,
    open_again,
    open_trained,
    plan_of,
    refuse_embeddings,
    save_embedding_model,
    saved_facts,
)

Array = np.ndarray[Any, Any]


@frozen
class ExportOptions:
    """What to write: `form` is `peft` or `mlx-lm`; `base` names the base where the adapter does not.

    `compact` asks for PEFT's patterns with each module's own rank, in place of the one rank that all programs read.
    """

    form: str
    base: str | None = None
    compact: bool = False


def export_adapter(source: Path, target: Path, options: ExportOptions) -> tuple[Problem, ...]:
    """Write an adapter (a run's output folder, a PEFT folder or an mlx-lm folder) in another form.

    VeRA becomes the plain LoRA that it equals, in either form; the sides of its modules are the base's to tell. Returns
    what the user should know. Raises ModelError for an adapter that is damaged or already in that form, ResourceError
    where `target` exists.
    """
    folder = adapter_folder(source)
    if is_mlx_lm_adapter(folder):
        _refuse_same_form(folder, options.form, "mlx-lm")
        return _from_mlx_lm(folder, target, options)
    saved = read_adapter(folder)
    if options.form == "mlx-lm":
        return _to_mlx_lm(saved, folder, target, options.base)
    return _to_peft(saved, folder, target, options)


def _from_mlx_lm(folder: Path, target: Path, options: ExportOptions) -> tuple[Problem, ...]:
    refuse_existing(target)
    name = options.base or mlx_lm_base(folder)
    model_type, notices = _model_type(name)
    plan, factors = read_mlx_lm(folder, model_type)
    scaling = noted_scaling(read_settings(folder / SETTINGS), folder)
    form = saved_form(plan, factors, "compact" if options.compact else "universal")
    with _published(target) as staged:
        # Without the base no short name is known to reach the adapted modules alone.
        write_adapter(staged, form, portable_name(name), names=())
        copy_saved_tokenizer(folder, staged)
        if scaling is not None:
            note_scaling(staged, scaling)
        return (*notices, *_form_notices(form), _deviation(plan, factors, read_stored(staged), staged))


def _to_mlx_lm(saved: SavedAdapter, folder: Path, target: Path, base: str | None) -> tuple[Problem, ...]:
    _refuse_for_mlx_lm(saved, folder)
    scaling = noted_scaling(saved.settings, folder)
    if scaling is not None:
        check_exportable(scaling, folder)
    refuse_existing(target)
    name = portable_name(base or base_of(saved, folder))
    plain = saved.plain(base_modules(name) if saved.is_vera else (), folder)
    model_type, notices = _model_type(name)
    plan = plan_of(plain, folder)
    _refuse_tied_head(plan, name, folder)
    adapter = to_mlx_lm(plain, folder, name, model_type)
    if saved.is_vera:
        notices = (*notices, _plain_notice(adapter.settings["lora_parameters"]["rank"]))
    stretched = None if scaling is None else _stretched(scaling, name)
    chat, readme = read_saved_chat(folder), []
    with _published(target) as staged:
        write_mlx_lm(staged, adapter)
        copy_saved_tokenizer(folder, staged)
        if stretched is not None:
            note_scaling(staged, stretched.scaling)
            readme.append(stretched.readme())
            notices = (*notices, stretched.notice(target))
        if chat.differs:
            load = stretched.code(".") if stretched else f'mlx_lm.load({json.dumps(name)}, adapter_path=".")'
            readme.append(tokenizer_readme(load, name, chat.end_ids, chat.new_template))
        if readme:
            write_text(staged / "README.md", "\n".join(readme))
        back, factors = read_mlx_lm(staged, model_type)
        read = SavedAdapter(
            factors, {}, native=NativeRanks(False, {m.name: (m.rank, m.alpha) for m in back.modules})
        )
        return (*notices, _deviation(plan, plain.factors, read, staged))


def _to_peft(saved: SavedAdapter, folder: Path, target: Path, options: ExportOptions) -> tuple[Problem, ...]:
    """The other form of a LoRA, or VeRA as the plain LoRA that it equals, with all else that its folder holds."""
    name = portable_name(options.base or base_of(saved, folder))
    plain = saved
    names: tuple[str, ...] = ()
    if saved.is_vera:
        refuse_existing(target)
        opened = inspect_base(resolve_base(name), weights=False)
        modules = base_modules(name, saved_facts(saved, folder, opened), media_task(opened.path, folder))
        plain, names = saved.plain(modules, folder), tuple(module.name for module in modules)
    plan = plan_of(plain, folder)
    if not has_universal_form(plan):
        raise ModelError(
            "experts-one-form",
            "the adapter has stacks of experts, which are saved in one form alone",
            where=str(folder),
            help="use the folder as it is with PEFT, or write the whole model with `soupx merge`.",
        )
    if not saved.is_vera:
        _refuse_equal_form(saved, folder, options.compact)
        refuse_existing(target)
    form = saved_form(plan, plain.factors, "compact" if options.compact else "universal")
    with _published(target) as staged:
        write_adapter(staged, form, name, names)
        if saved.head is not None:
            write_head(staged, saved.head)
        if (scaling := noted_scaling(saved.settings, folder)) is not None:
            note_scaling(staged, scaling)
        _copy_beside(folder, staged)
        notices = [_plain_notice(form.plan.modules[0].rank)] if saved.is_vera else []
        return (*notices, *_form_notices(form), _deviation(plan, plain.factors, read_stored(staged), staged))


def _refuse_equal_form(saved: SavedAdapter, folder: Path, compact: bool) -> None:
    stored = read_stored(folder)
    is_there = (
        saved.native is None if compact else is_universal(stored.settings, adapter_modules(stored, folder))
    )
    if is_there:
        raise ModelError(
            "same-form",
            "each module has its own rank and alpha already"
            if compact
            else "the adapter already is in peft's form, with one rank and one alpha for all modules",
            where=str(folder),
            help="use the folder as it is, or `--to mlx-lm`.",
        )


def _form_notices(form: SavedForm) -> tuple[Problem, ...]:
    return (scales_rounded(form),) if form.rounded else ()


def _deviation(plan: AdapterPlan, factors: Factors, written: SavedAdapter, folder: Path) -> Problem:
    """How far what was written, read back from the disk, is from the adapter, on the module that is furthest off."""
    off = []
    for module in adapter_modules(written, folder):
        own = next(one for one in plan.modules if one.name == module.name)
        off.append((share_off((own, factors[own.name]), (module, written.factors[module.name])), module.name))
    largest, name = max(off)
    return Problem(
        "export-deviation",
        f"read back from the disk, each of {len(off)} modules adds what the adapter adds; the largest deviation is "
        f"{largest:.1e} of it (`{name}`)",
    )


def _model_type(name: str) -> tuple[str, tuple[Problem, ...]]:
    """The type of a base that is on this machine; empty, with a notice, for one that is not."""
    base = base_at_hand(name)
    if base is not None:
        return inspect_base(base, weights=False).model_type, ()
    missing = f"the base `{name}` is not on this machine" if name else "no base is named"
    text = (
        f"{missing}: whether mlx-lm gives its modules the names that transformers gives them was not checked"
    )
    return "", (
        Problem("names-not-checked", text, help="name it with `--base`, or download it, to have it checked."),
    )


def _refuse_tied_head(plan: AdapterPlan, name: str, folder: Path) -> None:
    base = base_at_hand(name)
    if base is None or not any(is_head(module.name) for module in plan.modules):
        return
    if has_tied_head(inspect_base(base)):
        raise ModelError(
            "tied-head-not-exported",
            "the adapter is on the output head, which in this base is the embedding: mlx-lm has no such head to adapt",
            where=str(folder),
            help="write the whole model with `soupx merge`, which gives the head a weight of its own, or train without "
            "`lm_head` in `target_modules`.",
        )


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


# What base, adapter and merged model are compared on: ordinary words, digits, code and another alphabet.
_PROBE_TEXT = (
    "The quick way to find out whether two models are the same is to ask both for the next word, again and again. In "
    "1984 a library of 3,256 books moved 12.5 km to the north; nobody had counted the maps. def area(width, height): "
    "return width * height  # in square metres. Ein kurzer Satz auf Deutsch, una frase en español, und dann weiter. "
    "Dear customer, thank you for your order of two boxes of tea. They left our warehouse on Tuesday and should reach "
    "you within five days. If anything is broken, write to us and we will send it again. Water boils at 100 °C at sea "
    "level and at about 72 °C on the highest mountain. Question: who wrote the first program? Answer: opinions differ."
)
_LONGEST = 200
# Of the largest live logit: what rounding may make of a float32 model that was written and opened again.
_MERGE_TOLERANCE = 1e-2


def merge_adapter(options: TrainedOptions, target: Path) -> tuple[Problem, ...]:
    """Write the full model, base and adapter in one, with its tokenizer; sentence-transformers loads one that embeds.

    It is opened again and compared with the live model before it is published. Returns what the user should know.
    Raises ModelError for a quantized base and for a merged model that computes something else, ResourceError where
    `target` exists or the disk is full.
    """
    refuse_existing(target)
    with ExitStack() as stack:
        with open_trained(options) as trained:
            staged = stack.enter_context(_published(target, trained.base.weight_bytes))
            # A model that hears has no outputs for a text alone.
            probed = not trained.base.config.get("is_encoder_decoder")
            outputs = [_outputs(trained, adapter) for adapter in (True, False) if probed]
            trained.session.save_merged(staged)
            mask_file(staged / "config.json")
            if (
                read_object(staged / "config.json", "base-config").get("model_type")
                == trained.base.model_type
            ):
                copy_processor(trained.base.path, staged, trained.tokenizer.new_template)
            if trained.embedding is None:
                trained.tokenizer.save(staged)
            else:
                facts = evolve(trained.embedding, pooling=embedder_of(trained.session).pooling)
                save_embedding_model(staged, facts, trained.session, trained.tokenizer)
            precision = trained.session.precision
        if not probed:
            return ()
        with open_again(trained, options.backend, staged) as session:
            merged = _outputs(evolve(trained, session=session))
        return _merge_notices(options, trained, staged, _Compared(outputs[0], merged, outputs[1], precision))


@frozen(eq=False)
class _Compared:
    """Outputs for the same text: of the live model, of the merged one, and of the base; logits, or a unit vector."""

    live: Array
    merged: Array
    base: Array
    precision: str

    @property
    def off(self) -> float:
        return float(np.abs(self.merged - self.live).max())

    @property
    def moved(self) -> float:
        return float(np.abs(self.live - self.base).max())


def _outputs(trained: LoadedAdapter, adapter: bool = True) -> Array:
    text = trained.base.config.get("text_config")
    longest = (text if isinstance(text, dict) else trained.base.config).get(
        "max_position_embeddings"
    ) or _LONGEST
    tokens = trained.tokenizer.text_ids(_PROBE_TEXT)[: min(longest, _LONGEST)]
    if trained.embedding is None:
        return trained.session.logits(tokens[None], adapter)
    row = TokenSequence(tokens, [False] * tokens.size, Source("probe", 1))
    return embedder_of(trained.session).embeddings(collate([row], trained.tokenizer.pad_id), adapter)


def _merge_notices(
    options: TrainedOptions, trained: LoadedAdapter, staged: Path, compared: _Compared
) -> tuple[Problem, ...]:
    """How far the merged model is from the live one. Raises ModelError where rounding does not explain it."""
    scale = max(1.0, float(np.abs(compared.live).max()))
    exact = compared.precision == "fp32"
    if not compared.off <= scale * (_MERGE_TOLERANCE if exact else 0.5):
        raise ModelError(
            "merge-not-proven",
            f"opened again, the merged model is another one than base and adapter: its outputs differ by up to "
            f"{compared.off:.2g}, and the adapter moves them by up to {compared.moved:.2g}",
            where=str(staged),
            help="nothing was published; use the adapter beside its base, and report this with the base's name.",
        )
    text = (
        f"opened again, the merged model's outputs differ from those of base and adapter by at most "
        f"{compared.off:.1e}, in {compared.precision}; the adapter moves them by up to {compared.moved:.2g}"
    )
    quantization = _trained_on(options)
    if quantization == "none":
        return (Problem("merge-deviation", text),)
    other = (
        f"the adapter was trained on a base in {quantization}, and the merged model has the plain base: "
        f"{_quantized_text(options, trained, quantization, compared)}"
    )
    return Problem("merge-deviation", text), Problem("merge-of-quantized", other)


def _trained_on(options: TrainedOptions) -> str:
    """The quantization that the run trained on, as far as its folder tells."""
    if options.adapter is None or not (options.adapter / RECORD).is_file():
        return "none"
    training = read_record(options.adapter).config.get("training")
    told = training.get("quantization", "none") if isinstance(training, dict) else "none"
    return str(told)


def _quantized_text(
    options: TrainedOptions, trained: LoadedAdapter, quantization: str, compared: _Compared
) -> str:
    if options.backend != "torch":
        return "merge with `--backend torch` to have the difference measured"
    with open_trained(options, quantization) as live:
        off = float(np.abs(compared.merged - _outputs(live)).max())
    return f"its outputs differ from those that were trained by up to {off:.2g}"


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
