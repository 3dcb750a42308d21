"""All that is decided about a run in plain numbers before a tensor is touched, and the summary for `soupx plan`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from attrs import field, frozen

from soup_xb.core.adapter.plan import AdapterPlan
from soup_xb.core.base.coverage import Coverage
from soup_xb.core.base.coverage_text import coverage_json
from soup_xb.core.base.modules import Resolution, group_adapters
from soup_xb.core.config.schema import Config, TrainingConfig
from soup_xb.core.errors import ConfigError, Problem
from soup_xb.core.objectives.objective import OBJECTIVES, Objective, TokenObjective
from soup_xb.core.rows.batches import MicroBatch, epoch_batches, eval_batches, micro_batches
from soup_xb.core.rows.row import Row
from soup_xb.core.rows.table import Rows, as_rows
from soup_xb.core.run.memory import MemoryEstimate
from soup_xb.core.run.reference import Reference
from soup_xb.core.run.schedule import LearningRates, restart_steps, steps_every, warmup_steps
from soup_xb.core.run.session import OptimizerSettings, RestartSettings
from soup_xb.core.tasks import TASKS


@frozen(eq=False)
class Plan:
    """A run, decided: adapters, the rows of every step, learning rates, and when to evaluate, save and restart.

    `reference` comes from the opened base, for tasks that measure how far the model went from it.
    """

    config: Config
    adapters: AdapterPlan
    rows: Rows
    evaluation: Rows
    pad_id: int
    steps_per_epoch: int
    total_steps: int
    learning_rates: LearningRates
    eval_steps: tuple[int, ...]
    save_steps: tuple[int, ...]
    restart_steps: tuple[int, ...]
    warnings: tuple[Problem, ...]
    reference: Reference | None = None
    _epochs: dict[int, Sequence[np.ndarray[Any, Any]]] = field(factory=dict, init=False)

    @property
    def epochs(self) -> float:
        """How often every row is seen."""
        return self.total_steps / self.steps_per_epoch

    def step_rows(self, step: int) -> tuple[np.ndarray[Any, Any], ...]:
        """Row indices of each micro-batch of `step`, over all processes."""
        epoch, index = divmod(step - 1, self.steps_per_epoch)
        size = self.config.training.gradient_accumulation_steps
        return tuple(self._epoch(epoch)[index * size : (index + 1) * size])

    def target_tokens(self, step: int) -> int:
        """Targets of `step`, over all micro-batches and processes."""
        return sum(int(self.rows.facts.targets[rows].sum()) for rows in self.step_rows(step))

    def target_weight(self, step: int) -> float:
        """The sum of the weights of the targets of `step`, over all micro-batches and processes."""
        return sum(float(self.rows.facts.weights[rows].sum()) for rows in self.step_rows(step))

    def real_tokens(self, step: int) -> int:
        """Tokens of `step` without padding, over all micro-batches and processes.

        A prompt counts once for each of its answers, whose own tokens are known when they are sampled.
        """
        times = self.config.training.group_size if TASKS[self.config.task].samples else 1
        return times * sum(int(self.rows.facts.tokens[rows].sum()) for rows in self.step_rows(step))

    def examples(self, step: int) -> int:
        """Rows of `step` (pairs, for tasks that compare two answers), over all micro-batches and processes."""
        return sum(len(rows) for rows in self.step_rows(step))

    def micro_batches(self, step: int, process: int = 0, processes: int = 1) -> list[MicroBatch]:
        """One process's padded micro-batches of `step`."""
        known = None if self.reference is None else self.reference.train
        return list(micro_batches(self.rows, known, self.step_rows(step), (process, processes), self.pad_id))

    def eval_micro_batches(self, process: int = 0, processes: int = 1) -> Sequence[MicroBatch]:
        """One process's padded micro-batches of the held-out rows, each made when it is asked for."""
        known = None if self.reference is None else self.reference.evaluation
        batches = eval_batches(self.evaluation.facts.lengths, self.config.training.batch_size)
        return micro_batches(self.evaluation, known, batches, (process, processes), self.pad_id)

    def restart(self, step: int) -> RestartSettings:
        """The restart at the end of `step`."""
        training = self.config.training
        return RestartSettings(
            step, training.relora_mode, training.relora_prune_ratio, training.relora_reset_optimizer
        )

    def _epoch(self, epoch: int) -> Sequence[np.ndarray[Any, Any]]:
        # The order of an epoch is made once: a step asks for it several times, the next epoch makes its own.
        if epoch not in self._epochs:
            training, lengths = self.config.training, self.rows.facts.lengths
            if self.rows[0].kind == "judged":
                # Good and bad answers often differ in length: sorted by it, a step would see one kind alone.
                lengths = np.zeros_like(lengths)
            self._epochs.clear()
            self._epochs[epoch] = epoch_batches(lengths, training.batch_size, training.seed, epoch)
        return self._epochs[epoch]


def held_out_batches(
    rows: Sequence[Row], batch_size: int, pad_id: int, references: np.ndarray[Any, Any] | None = None
) -> Sequence[MicroBatch]:
    """Padded micro-batches of rows to evaluate outside a run; `references` is as in `collate_rows`."""
    known = as_rows(rows)
    return micro_batches(known, references, eval_batches(known.facts.lengths, batch_size), (0, 1), pad_id)


def optimizer_settings(training: TrainingConfig) -> OptimizerSettings:
    """The optimizer's settings out of the config."""
    return OptimizerSettings(
        name=training.optimizer,
        beta1=training.adam_beta1,
        beta2=training.adam_beta2,
        epsilon=training.adam_epsilon,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
    )


def objective_of(config: Config) -> Objective:
    """A new objective of the config's task; a key that the file leaves open has the default of the task's loss."""
    task, training = TASKS[config.task], config.training
    if not task.objective:
        return TokenObjective()
    names = [key.removeprefix("training.") for key in task.all_keys if key.startswith("training.")]
    settings = {
        name: task.setting(training, name) if name in task.settings else getattr(training, name)
        for name in names
    }
    return OBJECTIVES[task.objective](task.loss, settings, task.measures)


def make_plan(
    config: Config,
    resolution: Resolution,
    rows: Sequence[Row],
    evaluation: Sequence[Row],
    pad_id: int,
) -> Plan:
    """Decide a run. Raises ConfigError where a restart is asked for that would never happen."""
    training = config.training
    rows, evaluation = as_rows(rows), as_rows(evaluation)
    micro_batches = -(-len(rows) // training.batch_size)
    steps_per_epoch = -(-micro_batches // training.gradient_accumulation_steps)
    total_steps = training.max_steps or training.epochs * steps_per_epoch
    restarts = restart_steps(total_steps, training.relora_steps, training.relora_warmup_ratio)
    if training.relora_steps is not None and not restarts:
        raise ConfigError(
            "no-restart",
            f"no restart would happen: relora_steps is {training.relora_steps} and the run has {total_steps} steps",
            where="training.relora_steps",
            help="lower it, train for more steps, or remove it.",
        )
    _check_negatives(config, rows)
    return Plan(
        config=config,
        adapters=AdapterPlan(
            modules=resolution.adapters,
            dropout=training.lora.dropout,
            init_strategy=training.lora.start,
            use_rslora=training.lora.use_rslora,
            seed=training.seed,
            merges=training.relora_steps is not None and training.relora_mode == "merge",
            task_type=TASKS[config.task].peft_type,
        ),
        rows=rows,
        evaluation=evaluation,
        pad_id=pad_id,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        learning_rates=_learning_rates(training, total_steps, restarts),
        eval_steps=_eval_steps(training, total_steps) if evaluation else (),
        save_steps=steps_every(training.save_steps, total_steps),
        restart_steps=restarts,
        warnings=resolution.warnings,
    )


def _check_negatives(config: Config, rows: Rows) -> None:
    """Raise ConfigError where no anchor of a micro-batch would have a wrong answer to tell from the right one."""
    alone = config.training.batch_size == 1 or len(rows) == 1
    if not alone or rows[0].kind != "embedding" or rows.facts.sequence_lengths.shape[1] > 2:
        return
    raise ConfigError(
        "no-negatives",
        "one row at a time and no `negative` in the rows: there is nothing to tell the positive from",
        where="training.batch_size",
        help="write 2 or more, better 32: the other rows of a micro-batch are the wrong answers.",
    )


def _learning_rates(training: TrainingConfig, total_steps: int, restarts: tuple[int, ...]) -> LearningRates:
    if training.warmup_steps is not None:
        warmup = min(training.warmup_steps, total_steps)
    else:
        warmup = warmup_steps(total_steps, training.warmup_ratio)
    rewarm = _rewarm_steps(training)
    return LearningRates(
        training.lr, training.scheduler, warmup, total_steps, restarts if rewarm else (), rewarm
    )


def _rewarm_steps(training: TrainingConfig) -> int:
    if training.relora_steps is None or training.relora_mode != "merge":
        return 0
    asked = training.relora_rewarm_steps
    return training.relora_steps // 10 if asked is None else asked


def _eval_steps(training: TrainingConfig, total_steps: int) -> tuple[int, ...]:
    return steps_every(training.eval_steps or total_steps, total_steps)


CURVE_POINTS = 9


def plan_summary(plan: Plan, coverage: Coverage, memory: MemoryEstimate, processes: int) -> dict[str, Any]:
    """The plan as JSON-ready values; steps count from 1, sizes are bytes for one process."""
    training = plan.config.training
    rates = plan.learning_rates
    return {
        "rows": {"train": len(plan.rows), "eval": len(plan.evaluation)},
        "steps": plan.total_steps,
        "steps_per_epoch": plan.steps_per_epoch,
        "epochs": plan.epochs,
        "batch": {
            "rows_per_micro_batch": training.batch_size,
            "rows_per_process": training.batch_size // processes,
            "micro_batches_per_step": training.gradient_accumulation_steps,
            "processes": processes,
            "sharding": training.sharding,
        },
        "learning_rate": {
            "scheduler": rates.scheduler,
            "peak": rates.peak,
            "warmup_steps": rates.warmup,
            "curve": [[step, rates.at(step)] for step in curve_steps(plan.total_steps, rates.warmup)],
        },
        "eval_steps": list(plan.eval_steps),
        "save_steps": list(plan.save_steps),
        "restart_steps": list(plan.restart_steps),
        "modules": [
            {
                "name": group.name,
                "count": group.count,
                "rank": group.rank,
                "alpha": group.alpha,
                "scale": group.scale,
                "parameters": group.parameters,
            }
            for group in group_adapters(plan.adapters.modules)
        ],
        "coverage": coverage_json(coverage),
        "trained_parameters": sum(adapter.parameters for adapter in plan.adapters.modules),
        "memory_bytes": {
            "base": memory.base,
            "adapter_and_optimizer": memory.adapter,
            "activations": memory.activations,
            "total": memory.total,
        },
    }


def curve_steps(total_steps: int, warmup: int) -> list[int]:
    """A few steps that show the shape of the learning-rate curve: the ends, the peak, and points between.

    >>> curve_steps(100, 10)
    [1, 10, 13, 26, 38, 51, 63, 75, 88, 100]
    """
    between = {1 + round((total_steps - 1) * point / (CURVE_POINTS - 1)) for point in range(CURVE_POINTS)}
    return sorted(between | {max(1, warmup)})


def step_list(steps: list[int], shown: int = 6) -> str:
    """A list of steps, shortened in the middle.

    >>> step_list([10, 20, 30, 40, 50, 60, 70, 80])
    '10, 20, 30, 40, 50 … 80 (8)'
    >>> step_list([])
    'none'
    """
    if not steps:
        return "none"
    if len(steps) <= shown:
        return ", ".join(map(str, steps))
    return f"{', '.join(map(str, steps[: shown - 1]))} … {steps[-1]} ({len(steps)})"
