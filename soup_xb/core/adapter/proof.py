"""Proving a saved adapter: what lies in the folder, read as its users read it, does what the live model does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from attrs import frozen

from soup_xb.core.adapter.peft_file import Factors, adapter_modules, read_stored
from soup_xb.core.adapter.plan import AdapterPlan, pattern_values, target_name
from soup_xb.core.adapter.probe import Deviation, deviation
from soup_xb.core.adapter.readers import SavedForm, is_universal
from soup_xb.core.base.modules import AdapterModule, reachable_names
from soup_xb.core.errors import ConfigError, ModelError, Problem
from soup_xb.core.run.plan import Plan
from soup_xb.core.run.session import BaseDescription, Session

# A deviation that rounding explains, and that a user should hear of all the same.
_WORTH_A_WARNING = 0.1

Value = TypeVar("Value")


@frozen
class Proof:
    """The comparison of each adapted module, all of them within what rounding explains.

    `merges`: restarts folded earlier adapters into the base.
    """

    deviations: tuple[Deviation, ...]
    merges: bool

    @property
    def largest(self) -> Deviation:
        """The module that is furthest off; of a module that adds nothing, a share says nothing."""
        moved = [one for one in self.deviations if one.inert < one.pairs]
        return max(moved or self.deviations, key=lambda one: one.relative)

    @property
    def has_effect(self) -> bool:
        """Whether the adapter adds anything anywhere."""
        return any(one.inert < one.pairs for one in self.deviations)

    def notices(self) -> tuple[Problem, ...]:
        """How close live and saved are, and what of the adapter adds nothing."""
        text = (
            f"read back from the disk, the adapter adds what the trained model adds on each of its "
            f"{len(self.deviations)} modules; the largest deviation is {self.largest.relative:.1e}"
        )
        inert = self._inert()
        return (Problem("adapter-proven", text), *([inert] if inert else []))

    def warnings(self) -> tuple[Problem, ...]:
        """Deviations that come from rounding alone, and are large."""
        worst = self.largest
        if not self.merges or worst.relative < _WORTH_A_WARNING:
            return ()
        text = (
            f"the base's format rounded away much of what was merged into it: at `{worst.name}` live and saved adapter "
            f"differ by {worst.relative:.0%} of what the adapter adds; the saved one is the exact sum"
        )
        help = "train with `precision: fp32`, or use `relora_mode: prune`, which leaves the base as it is."
        return (Problem("merges-rounded", text, "training.relora_mode", help),)

    def _inert(self) -> Problem | None:
        whole = [one.name for one in self.deviations if one.inert == one.pairs]
        stacks = [one for one in self.deviations if one.pairs > 1]
        experts = sum(one.inert for one in stacks if one.inert < one.pairs)
        places = []
        if whole:
            places.append(f"in {len(whole)} of {len(self.deviations)} adapted modules (first `{whole[0]}`)")
        if experts:
            places.append(f"for {experts} of {sum(one.pairs for one in stacks)} experts")
        if not places:
            return None
        text = f"the adapter adds nothing {' and '.join(places)}: parts that no trained row passes through end so"
        return Problem("inert-modules", text)


def prove(session: Session, plan: AdapterPlan, folder: Path, written: SavedForm) -> Proof:
    """Read the adapter in `folder` back and compare it with what was written, and with the live layers.

    Names, ranks, scales and targets are those that the folder's own files give a reader: PEFT by its patterns, and in
    the universal form also programs that read one rank and one alpha. Raises ModelError `adapter-not-saved` where the
    bytes are not those that were written, and `adapter-not-proven` naming the module.
    """
    saved = _read(lambda: read_stored(folder), folder)
    _check_written(saved.factors, written.factors, folder)
    plain = _read(lambda: saved.plain(plan.modules, folder), folder)
    modules = _read(lambda: adapter_modules(plain, folder), folder)
    _check_names(modules, plan, folder)
    order = {adapter.name: place for place, adapter in enumerate(plan.modules)}
    _check_ranks(saved.settings, modules, folder)
    _check_targets(saved.settings, modules, session.describe(), folder)
    deviations = []
    for module in sorted(modules, key=lambda module: order[module.name]):
        arrays = plain.factors[module.name]
        deviations.append(deviation(module, arrays, session.addition(module, arrays)))
    failed = [one for one in deviations if not one.is_proven]
    if failed:
        worst = max(failed, key=lambda one: math.inf if math.isnan(one.relative) else one.relative)
        raise _not_proven(
            f"{len(failed)} of {len(deviations)} modules do not add what the live model adds: `{worst.name}` is off by "
            f"{worst.relative:.2g} of it, and rounding explains {_bound(worst):.2g}",
            folder,
        )
    if written.is_universal:
        _check_readers(saved.settings, modules, folder)
    return Proof(tuple(deviations), plan.merges)


def check_effect(proof: Proof, plan: Plan, folder: Path) -> None:
    """Raise ModelError `adapter-inert` where a run ended with an adapter that adds nothing anywhere."""
    if proof.has_effect:
        return
    raise ModelError(
        "adapter-inert",
        f"after {plan.total_steps} steps the adapter adds nothing to the base, in none of its "
        f"{len(proof.deviations)} modules",
        where=str(folder),
        help=f"look at `training.lr` ({plan.learning_rates.peak:g}; a float32 factor of 0.1 does not move by less than "
        "4e-9), and at whether the trained rows reach the adapted modules (`soupx data`, `soupx plan`).",
    )


def _read(reader: Callable[[], Value], folder: Path) -> Value:
    try:
        return reader()
    except ModelError as error:
        raise _not_proven(f"it cannot be read back: {error.problems[0].message}", folder) from error


def _check_written(saved: Factors, factors: Factors, folder: Path) -> None:
    same = saved.keys() == factors.keys() and all(
        saved[name].keys() == arrays.keys()
        and all(np.array_equal(saved[name][factor], array) for factor, array in arrays.items())
        for name, arrays in factors.items()
    )
    if not same:
        raise ModelError(
            "adapter-not-saved",
            "the adapter read back from the disk is not the one that was trained",
            where=str(folder),
            help="check the disk; the last checkpoint can be resumed.",
        )


def _check_names(modules: Sequence[AdapterModule], plan: AdapterPlan, folder: Path) -> None:
    saved = {module.name: (module.out_features, module.in_features, module.experts) for module in modules}
    live = {module.name: (module.out_features, module.in_features, module.experts) for module in plan.modules}
    odd = [name for name in {**live, **saved} if saved.get(name) != live.get(name)]
    if odd:
        name = odd[0]
        raise _not_proven(
            f"{len(odd)} modules are not the trained ones: `{name}` is {saved.get(name, 'missing')}, and was trained "
            f"as {live.get(name, 'none')}",
            folder,
        )


def _check_ranks(settings: Mapping[str, Any], modules: Sequence[AdapterModule], folder: Path) -> None:
    """PEFT makes its layers by the ranks in the settings before it reads the factors."""
    names = [target_name(module) for module in modules]
    try:
        ranks = pattern_values(settings.get("rank_pattern") or {}, names)
    except ConfigError as error:
        raise _not_proven(error.problems[0].message, folder) from error
    for name, module in zip(names, modules, strict=True):
        rank = ranks.get(name, settings.get("r"))
        if rank != module.rank:
            raise _not_proven(
                f"the settings give `{name}` the rank {rank}, and its factors have {module.rank}", folder
            )


def _check_readers(settings: Mapping[str, Any], modules: Sequence[AdapterModule], folder: Path) -> None:
    """Programs that read one rank and one alpha must come to the scales that PEFT comes to."""
    odd = [module.name for module in modules if not is_universal(settings, [module])]
    if odd:
        raise _not_proven(
            f"programs that read one rank and one alpha give {len(odd)} modules another scale than PEFT, first "
            f"`{odd[0]}`",
            folder,
        )


def _check_targets(
    settings: Mapping[str, Any], modules: Sequence[AdapterModule], base: BaseDescription, folder: Path
) -> None:
    """The settings must reach the adapted modules of the base and no other, by PEFT's rule for a list."""
    names = reachable_names([module for module in base.modules if not module.experts])
    reached = set(settings.get("target_parameters") or [])
    for target in settings.get("target_modules") or []:
        own = [name for name in names if name == target or name.endswith(f".{target}")]
        # A target that this backend's base does not have may reach something in another library's.
        reached |= set(own or [target])
    odd = sorted(reached.symmetric_difference(map(target_name, modules)))
    if odd:
        raise _not_proven(
            f"the settings' targets and the factors differ on {len(odd)} modules, first `{odd[0]}`", folder
        )


def _bound(one: Deviation) -> float:
    return one.allowed / one.terms if one.terms > 0 else 0.0


def _not_proven(message: str, folder: Path) -> ModelError:
    return ModelError(
        "adapter-not-proven",
        message,
        where=str(folder),
        help="nothing was published, and the files stay there for a look; go on from a checkpoint where there is one, "
        "and report this with the config.",
    )
