"""A plan as plain text and numbers: what `soupx plan` shows."""

from __future__ import annotations

from typing import Any

from soup_xb.core.base.coverage import Coverage
from soup_xb.core.base.coverage_text import coverage_json
from soup_xb.core.base.modules import group_adapters
from soup_xb.core.run.memory import MemoryEstimate
from soup_xb.core.run.plan import Plan

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
