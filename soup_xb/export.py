"""A saved adapter in another library's form, and the full model with the adapter folded in."""

from __future__ import annotations

from pathlib import Path

from soup_xb.core import staging
from soup_xb.core.adapter_file import adapter_folder, read_adapter, write_adapter
from soup_xb.core.durable import disk_errors
from soup_xb.core.errors import ModelError, ResourceError
from soup_xb.core.mlx_lm_file import is_mlx_lm_adapter, read_mlx_lm, to_mlx_lm, write_mlx_lm
from soup_xb.trained import TrainedOptions, open_trained


def export_adapter(source: Path, target: Path, form: str, base: str | None = None) -> None:
    """Write an adapter (a run's output folder, a PEFT folder or an mlx-lm folder) as `peft` or `mlx-lm`.

    Raises ModelError for an adapter that is damaged or already in that form, ResourceError where `target` exists.
    """
    folder = adapter_folder(source)
    from_mlx_lm = is_mlx_lm_adapter(folder)
    if from_mlx_lm == (form == "mlx-lm"):
        raise ModelError(
            "same-form",
            f"the adapter already is in {form}'s form",
            where=str(folder),
            help=f"use the folder as it is, or `--to {'peft' if from_mlx_lm else 'mlx-lm'}`.",
        )
    refuse_existing(target)
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = staging.start(target)
        if from_mlx_lm:
            plan, factors = read_mlx_lm(folder)
            write_adapter(staged, plan, factors, base or "", [module.name for module in plan.modules])
        else:
            write_mlx_lm(staged, to_mlx_lm(read_adapter(folder), folder))
        staging.publish(staged, target)


def merge_adapter(options: TrainedOptions, target: Path) -> None:
    """Write the full model, base and adapter in one, with its tokenizer.

    Raises ModelError for a quantized base, ResourceError where `target` exists or the disk is full.
    """
    refuse_existing(target)
    with open_trained(options) as trained, disk_errors(target, trained.base.weight_bytes):
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = staging.start(target)
        trained.session.save_merged(staged)
        trained.tokenizer.save(staged)
        staging.publish(staged, target)


def refuse_existing(target: Path) -> None:
    """Raise ResourceError where something stands at `target`."""
    if target.exists():
        raise ResourceError(
            "output-exists",
            "already exists",
            where=str(target),
            help="choose another `--output`, or move it away.",
        )
