"""What a finished run hands over: the portable adapter with its card, answers to prompts, and the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from attrs import frozen

from soup_xb import __version__
from soup_xb.core import disk
from soup_xb.core.adapter.extras import check_head, write_head
from soup_xb.core.adapter.foreign_settings import read_settings
from soup_xb.core.adapter.model_card import CardFacts, model_card
from soup_xb.core.adapter.peft_file import SETTINGS, saved_form, write_adapter
from soup_xb.core.adapter.proof import check_effect, prove
from soup_xb.core.adapter.readers import Misread, SavedForm, has_universal_form, misreadings, scales_rounded
from soup_xb.core.base.coverage_text import coverage_rows
from soup_xb.core.base.folder import has_tied_head
from soup_xb.core.base.modules import group_adapters, reachable_names
from soup_xb.core.base.rope import asked_scaling, note_scaling
from soup_xb.core.config.load import dump_config
from soup_xb.core.disk import disk_errors, write_text
from soup_xb.core.errors import Problem
from soup_xb.core.rows.examples import Message
from soup_xb.core.run.events import EvalEvent, Event, Notice, StepEvent, read_events
from soup_xb.core.run.folder import RunFolder
from soup_xb.core.run.loop import check_rewards
from soup_xb.core.run.record import RunRecord
from soup_xb.core.run.report import ModuleRow, ReportFacts, Sample, write_report
from soup_xb.core.run.session import GenerationSettings
from soup_xb.core.tasks import TASKS
from soup_xb.data.hub import portable_name
from soup_xb.runs.adapters import LoadedAdapter, continue_chat, save_embedding_model, trained_facts
from soup_xb.runs.open import OpenRun
from soup_xb.runs.writer import checkpoint_bytes

ANSWER_TOKENS = 120
_OF_A_STRETCHED_BASE = Problem(
    "stretched-base",
    "the adapter belongs to the base with `training.rope_scaling`: its README says how to load that; `soupx merge`, "
    "`eval` and `generate` do it by themselves",
)


@frozen
class Outcome:
    """How a run ended and where its adapter and report lie. `already_complete`: nothing was left to train."""

    record: RunRecord
    folder: Path
    samples: tuple[Sample, ...] = ()
    already_complete: bool = False

    @property
    def adapter(self) -> Path:
        """The portable adapter."""
        return self.folder / "adapter"

    @property
    def report(self) -> Path:
        """The page that a person reads."""
        return self.folder / "report.html"


def save_adapter(run: OpenRun, folder: RunFolder) -> tuple[Notice, ...]:
    """Write the portable adapter with its tokenizer and card, proven by reading it back, in one piece.

    Returns what the user should know about it. Raises ModelError, and publishes nothing, when what is on the disk does
    not do what the live model does, or adds nothing to the base.
    """
    factors = run.session.factors()
    names = reachable_names([module for module in run.session.describe().modules if not module.experts])
    with disk.published(folder.adapter) as staged, disk_errors(folder.adapter, checkpoint_bytes(run.plan)):
        base = portable_name(run.loaded.config.base)
        saved = saved_form(run.plan.adapters, factors)
        write_adapter(staged, saved, base, names)
        if run.session.judge is not None:
            head = run.session.judge.head()
            write_head(staged, head)
            check_head(staged, head)
        proof = prove(run.session, run.plan.adapters, staged, saved)
        if not proof.has_effect:
            check_rewards(read_events(folder.metrics), run.loaded.where("training.rewards"))
        check_effect(proof, run.plan, staged)
        if (scaling := asked_scaling(run.loaded.config.training)) is not None:
            note_scaling(staged, scaling)
        if run.session.embedder is not None:
            save_embedding_model(staged, trained_facts(run), run.session, run.tokenizer)
        else:
            run.tokenizer.save(staged)
        settings = read_settings(staged / SETTINGS)
        misread = misreadings(settings, saved.plan.modules, has_tied_head(run.base))
        card = _card(run, read_events(folder.metrics), saved, misread)
        write_text(staged / "README.md", card)
    notices = [*proof.notices(), *_form_notices(saved, misread, run.loaded.config.output)]
    notices += [_OF_A_STRETCHED_BASE] if scaling is not None else []
    notices += [_other_end(run.tokenizer.unnamed_end)] if _has_other_end(run) else []
    return (*map(Notice, notices), *(Notice(problem, warning=True) for problem in proof.warnings()))


def _form_notices(saved: SavedForm, misread: Sequence[Misread], output: str) -> Iterator[Problem]:
    """What the form of the saved adapter means to those who load it elsewhere."""
    if saved.rounded:
        yield scales_rounded(saved)
    if misread:
        other = saved.plan.use_vera or (has_universal_form(saved.plan) and not saved.is_universal)
        help = f"`soupx export {output} --to peft --output NEW` writes the plain LoRA that all of them read."
        text = f"the adapter is not for {'; not for '.join(map(str, misread))}"
        yield Problem("not-for-every-reader", text, help=help if other else "")


def _has_other_end(run: OpenRun) -> bool:
    """Whether the tuned model ends its turns with a token that clients of the base do not stop at."""
    task = TASKS[run.loaded.config.task]
    return bool(run.tokenizer.unnamed_end) and not (task.embeds or task.scores)


def _other_end(token: str) -> Problem:
    return Problem(
        "turn-end-not-eos",
        f"turns end with `{token}`, which the base's own files do not name as an end: generation_config.json beside "
        "the adapter and beside a merged model names both",
        help="transformers and mlx-lm stop at it with a merged model; with the adapter, vLLM takes "
        f"`--generation-config FOLDER`, mlx_lm.generate `--extra-eos-token '{token}'`.",
    )


def answer_prompts(run: OpenRun, prompts: Sequence[str]) -> tuple[Sample, ...]:
    """Each prompt answered by the base and by the tuned model, greedily."""
    trained = LoadedAdapter(run.session, run.tokenizer, run.base, has_adapter=True)
    settings = GenerationSettings(ANSWER_TOKENS, temperature=0.0, end_ids=run.tokenizer.end_ids)

    def answer(prompt: str, adapter: bool) -> str:
        return continue_chat(trained, [Message("user", prompt)], settings, adapter)

    return tuple(Sample(prompt, answer(prompt, False), answer(prompt, True)) for prompt in prompts)


def save_report(run: OpenRun, folder: RunFolder, record: RunRecord, samples: Sequence[Sample]) -> None:
    """Write `report.html` from everything that the run left."""
    facts = ReportFacts(
        record=record,
        events=read_events(folder.metrics),
        modules=_module_rows(run),
        settings=dump_config(run.loaded.config),
        samples=samples,
        coverage=coverage_rows(run.coverage, run.session.backend),
    )
    write_report(folder, facts)


def _card(run: OpenRun, events: Sequence[Event], saved: SavedForm, misread: Sequence[Misread]) -> str:
    steps = [event for event in events if isinstance(event, StepEvent)]
    evals = [event for event in events if isinstance(event, EvalEvent)]
    config = run.loaded.config
    scaling = asked_scaling(config.training)
    facts = CardFacts(
        base=config.base,
        data=", ".join(Path(source).name for source in config.data.train),
        steps=run.plan.total_steps,
        modules=_module_rows(run),
        saved_rank=max(module.rank for module in saved.plan.modules),
        misread=misread,
        rope=scaling.described() if scaling else None,
        new_template=bool(run.tokenizer.new_template),
        other_end=_has_other_end(run),
        kind="VeRA" if run.plan.adapters.use_vera else "LoRA",
        embeds=TASKS[config.task].embeds,
        scores=TASKS[config.task].scores,
        settings=dump_config(config),
        version=__version__,
        train_loss=steps[-1].loss if steps else None,
        eval_loss=evals[-1].loss if evals else None,
    )
    return model_card(facts)


def _module_rows(run: OpenRun) -> list[ModuleRow]:
    return [
        ModuleRow(group.name, group.count, group.rank, group.alpha, group.scale, group.parameters)
        for group in group_adapters(run.plan.adapters.modules)
    ]
