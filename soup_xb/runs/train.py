"""The story of a run: check -> open -> plan -> loop -> what is left behind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from attrs import evolve

from soup_xb.backends import choose_backend
from soup_xb.core.adapter.extras import is_reward_model
from soup_xb.core.adapter.peft_file import adapter_folder, fit_factors, read_adapter
from soup_xb.core.base.coverage_text import coverage_notices
from soup_xb.core.config.load import LoadedConfig
from soup_xb.core.errors import ConfigError, ModelError, Problem, StoppedError
from soup_xb.core.run.events import Listener, Notice, StartEvent
from soup_xb.core.run.folder import REFERENCE, RunFolder
from soup_xb.core.run.loop import Hooks, LoopResult, run_loop
from soup_xb.core.run.plan import Plan
from soup_xb.core.run.reference import read_reference, reference_key, write_reference
from soup_xb.core.run.session import Session
from soup_xb.core.run.stop import heard_early, launched_processes, stop_on_signals
from soup_xb.core.tasks import TASKS
from soup_xb.runs.finish import Outcome, answer_prompts, save_adapter, save_report
from soup_xb.runs.open import OpenRun, check_apart, check_processes, open_run
from soup_xb.runs.resume import TrainOptions
from soup_xb.runs.rewards import open_rewards, session_for
from soup_xb.runs.writer import RunWriter, failure_noted, first_day, output_folder


def train(loaded: LoadedConfig, options: TrainOptions, listeners: Sequence[Listener]) -> Outcome:
    """Run a config from file to saved adapter.

    Listeners hear every event, on the first process only. Raises a SoupError for everything that a user can
    cause, among them StoppedError after a signal, with a checkpoint written.
    """
    output = Path(loaded.config.output)
    _check_prompts(loaded, options.prompts)
    backend = choose_backend(loaded)
    check_processes(loaded, launched_processes())
    day = first_day(output, options)
    with (
        heard_early() as stop,
        output_folder(output, options) as folder,
        open_rewards(loaded, backend[0], day) as rewards,
        open_run(loaded, backend, day=day) as run,
    ):
        writer = RunWriter(run, options, folder, listeners)
        if writer.is_complete():
            return Outcome(writer.record, output, already_complete=True)
        check_apart(run.session, run.plan.rows, run.plan.pad_id)
        session = session_for(run, rewards)
        _attach(run)
        done = writer.start()
        with failure_noted(writer), stop_on_signals(stop):
            _announce(run, writer, done)
            hooks = Hooks(writer.emit, writer.save, stop)
            plan = _with_reference(run, writer)
            result = run_loop(plan, session, hooks, done, writer.losses_until(done))
            _stop_if_asked(run, writer, result)
            return _finish(run, writer, result, options.prompts)


def _check_prompts(loaded: LoadedConfig, prompts: Sequence[str]) -> None:
    """Raise ConfigError where a model without words is to answer."""
    if prompts and TASKS[loaded.config.task].embeds:
        raise ConfigError(
            "no-answers",
            "an embedding model has no answers to give",
            where=loaded.where("task"),
            help="leave `--prompt` out.",
        )


def _announce(run: OpenRun, writer: RunWriter, done: int) -> None:
    writer.tell(StartEvent(done, run.plan.total_steps))
    since_opened = (notice for notice in run.session.notices() if notice not in run.notices)
    for problem in (*run.notices, *since_opened):
        writer.emit(Notice(problem))
    for problem in (*run.loaded.warnings, *run.plan.warnings):
        writer.emit(Notice(problem, warning=True))
    adapters = run.plan.adapters.modules
    parameters = sum(adapter.parameters for adapter in adapters)
    text = (
        f"{len(run.plan.rows):,} rows, {run.plan.total_steps:,} steps, {len(adapters)} adapted modules, "
        f"{parameters:,} trained parameters"
    )
    writer.emit(Notice(Problem("plan", text)))
    for problem in coverage_notices(run.coverage, run.session.backend):
        writer.emit(Notice(problem))


def _attach(run: OpenRun) -> None:
    """Put the adapters on, and give them the values of a saved adapter where the config names one."""
    run.session.attach(run.plan.adapters)
    if run.loaded.config.adapter is not None:
        folder = adapter_folder(Path(run.loaded.config.adapter))
        saved = read_adapter(folder)
        if saved.head is not None:
            if run.session.judge is None:
                raise is_reward_model(folder)
            run.session.judge.load_head(saved.head)
        run.session.load_factors(fit_factors(saved, run.plan.adapters, folder))


def _with_reference(run: OpenRun, writer: RunWriter) -> Plan:
    """The plan with the base's log-probabilities, where the task measures against them; else the plan itself.

    A resumed run reads what its first start wrote, in its own folder or in that of the checkpoint, so that it goes on
    with the same bytes. The values are computed anew on every process where one of them finds no file, or one that
    is torn or belongs to other data or another base.
    """
    plan, config = run.plan, run.loaded.config
    if not TASKS[config.task].needs_reference:
        return plan
    path = Path(config.output) / REFERENCE
    facts = {
        "data": writer.facts.data,
        "base": config.base,
        "precision": run.session.precision,
        "quantization": config.training.quantization,
    }
    key = reference_key(facts, run.base.path)
    sequences = len(plan.rows[0].sequences)
    shapes = {"train": (len(plan.rows), sequences), "evaluation": (len(plan.evaluation), sequences)}
    places = [path] if writer.resumed_from is None else [path, writer.resumed_from.parents[1] / REFERENCE]
    kept = (read_reference(place, key, shapes) for place in places)
    found = next((reference for reference in kept if reference is not None), None)
    if run.session.agree(int(found is None)) or found is None:
        found = run.reference()
        if writer.folder is not None:
            answers = sum(rows * sequences for rows, sequences in shapes.values())
            text = f"the base's log-probabilities of {answers:,} answers are in `{REFERENCE}`"
            writer.emit(Notice(Problem("reference", text)))
    if writer.folder is not None:
        write_reference(path, key, found)
    return evolve(plan, reference=found)


def _stop_if_asked(run: OpenRun, writer: RunWriter, result: LoopResult) -> None:
    if result.step >= run.plan.total_steps:
        return
    writer.ended(result, "interrupted")
    raise StoppedError(
        "stopped",
        f"stopped by signal {result.stopped_by} after step {result.step} of {run.plan.total_steps}; "
        "a checkpoint was written",
        where=run.loaded.config.output,
        help="go on with the same command and `--resume`.",
    )


def _finish(run: OpenRun, writer: RunWriter, result: LoopResult, prompts: Sequence[str]) -> Outcome:
    folder: RunFolder | None = writer.folder
    with _first_awaited(run.session):
        # Where the base is cut over the processes, it answers with all of them.
        together = run.loaded.config.training.sharding != "none"
        samples = answer_prompts(run, prompts) if folder or together else ()
        if folder:
            for notice in save_adapter(run, folder):
                writer.emit(notice)
        record = writer.ended(result, "finished")
        if folder:
            save_report(run, folder, record, samples)
    return Outcome(record, Path(run.loaded.config.output), samples)


@contextmanager
def _first_awaited(session: Session) -> Iterator[None]:
    """Inside, the first process works and the others wait for it; where it fails, they end too."""
    try:
        yield
    except Exception:
        session.agree(1)
        raise
    if session.agree(0):
        raise ModelError("first-process-failed", "the first process could not finish the run, and says why")
