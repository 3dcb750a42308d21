"""Which modules of a base get an adapter, with which rank, alpha and scale, and which cannot have one."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from attrs import frozen

from soup_xb.core.base.patterns import matching_names
from soup_xb.core.base.towers import is_in_tower, without_gradient
from soup_xb.core.config.schema import AUTOMATIC, LoraConfig
from soup_xb.core.errors import ConfigError, Problem
from soup_xb.core.text import close_names

_BLOCK = re.compile(r"(^|\.)(layers|h|blocks|block|layer)\.\d+\.")
_ENCODER = re.compile(r"(^|\.)encoder\.(layers|blocks)\.")
_DECODER = re.compile(r"(^|\.)decoder\.(layers|blocks)\.")
# An indexer chooses the tokens that are attended to; like a router's, its choice passes no gradient on.
_ROUTER = re.compile(r"(^|\.)(gate|router|indexer|[a-z_]*_gate|gate_\d+)(\.|$)")


@frozen
class Module:
    """A linear module of the base that an adapter can sit on; its weight is (out_features, in_features).

    With `experts` above 0 it is a 3-D parameter that holds that many such matrices, one for each expert.
    `reached_as` is a second name by which patterns reach it, that of a wrapper around it; empty where there is none.
    `by_weight`: PEFT takes the module's name for that of experts, so that a saved adapter names its weight instead.
    """

    name: str
    out_features: int
    in_features: int
    experts: int = 0
    reached_as: str = ""
    by_weight: bool = False


@frozen
class AdapterModule:
    """One adapted module: A is (rank, in_features), B is (out_features, rank), output += scale * B A x.

    With `experts` above 0 every expert has its own pair: A is (experts, rank, in_features), B (experts,
    out_features, rank). With `vera` A and B are shared by all modules and frozen; two vectors, (rank,) and
    (out_features,), are trained in their place. With `dora` magnitudes (out_features,) are trained beside A and B.
    """

    name: str
    out_features: int
    in_features: int
    rank: int
    alpha: float
    scale: float
    experts: int = 0
    vera: bool = False
    by_weight: bool = False
    dora: bool = False

    @property
    def parameters(self) -> int:
        """Trained entries: A and B together, with DoRA's magnitudes, or VeRA's vectors."""
        if self.vera:
            return self.rank + self.out_features
        magnitudes = self.out_features if self.dora else 0
        return max(1, self.experts) * self.rank * (self.in_features + self.out_features) + magnitudes

    @property
    def a_shape(self) -> tuple[int, ...]:
        """The shape of A."""
        return (*self._stack, self.rank, self.in_features)

    @property
    def b_shape(self) -> tuple[int, ...]:
        """The shape of B."""
        return (*self._stack, self.out_features, self.rank)

    @property
    def _stack(self) -> tuple[int, ...]:
        return (self.experts,) if self.experts else ()


@frozen
class Resolution:
    """The adapted modules in the base's order, and what the user should know about them."""

    adapters: tuple[AdapterModule, ...]
    warnings: tuple[Problem, ...]


@frozen
class ModuleGroup:
    """Adapted modules alike in the end of their name, rank and alpha."""

    name: str
    count: int
    rank: int
    alpha: float
    scale: float
    parameters: int


def is_decoder_linear(name: str) -> bool:
    """Whether `auto` adapts the module: inside a text decoder block, and neither a router nor in a tower.

    >>> is_decoder_linear("model.layers.0.mlp.gate_proj"), is_decoder_linear("model.layers.0.mlp.gate")
    (True, False)
    >>> is_decoder_linear("lm_head"), is_decoder_linear("model.vision_tower.layers.0.q_proj")
    (False, False)
    """
    return bool(_BLOCK.search(name)) and not is_in_tower(name) and not _ROUTER.search(name)


def adapter_scale(alpha: float, rank: int, rslora: bool) -> float:
    """The factor on B A: alpha / rank (LoRA, arXiv:2106.09685), alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732).

    >>> adapter_scale(32, 16, rslora=False), adapter_scale(32, 16, rslora=True)
    (2.0, 8.0)
    """
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def resolve_adapters(
    modules: Sequence[Module], lora: LoraConfig, written: Mapping[str, str], media: str = ""
) -> Resolution:
    """Decide the adapted modules and their ranks.

    `written` maps a dotted key to the place to name in an error, `media` is the kind of files that rows hold. Raises
    ConfigError with every pattern that matches nothing, and for pissa and olora with every rank above the smaller side
    of its module.
    """
    chosen, problems = _targets(modules, lora, written.get("training.lora.target_modules", ""))
    if problems:
        raise ConfigError.of(problems)
    check_expert_targets(chosen, lora, written)
    ranks, rank_notes = _values(lora.rank_pattern, chosen, modules, "training.lora.rank_pattern", written)
    alphas, alpha_notes = _values(lora.alpha_pattern, chosen, modules, "training.lora.alpha_pattern", written)
    notes = [*rank_notes, *alpha_notes]
    errors = [problem for problem in notes if problem.code != "patterns-disagree"]
    adapters = []
    for module in chosen:
        rank = ranks.get(module.name, lora.r)
        # VeRA has no alpha: its vectors are the scale.
        alpha = rank if lora.use_vera else alphas.get(module.name, lora.alpha)
        scale = adapter_scale(alpha, rank, lora.use_rslora)
        adapters.append(
            AdapterModule(
                name=module.name,
                out_features=module.out_features,
                in_features=module.in_features,
                rank=rank,
                alpha=alpha,
                scale=scale,
                experts=module.experts,
                vera=lora.use_vera,
                by_weight=module.by_weight,
                dora=lora.use_dora,
            )
        )
    large = [] if lora.use_vera else ranks_above_side(adapters, lora, written)
    if lora.start != "random":
        errors += large
    targets = written.get("training.lora.target_modules", "")
    towers = without_gradient([adapter.name for adapter in adapters], targets, media)
    errors += [problem for problem in towers if problem.code == "towers-alone"]
    if errors:
        raise ConfigError.of(errors)
    return Resolution(tuple(adapters), tuple(notes + large + towers))


def automatic_targets(modules: Sequence[Module], word: str) -> tuple[Module, ...]:
    """What `auto` (and `all-linear`) means: the decoder's linear layers; `auto+experts` adds its 3-D expert weights.

    An encoder beside a decoder (Whisper's) hears, and is left out as towers are.
    """
    with_experts = word == "auto+experts"
    hears = any(_DECODER.search(module.name) for module in modules)
    return tuple(
        module
        for module in modules
        if is_decoder_linear(module.name)
        and (with_experts or not module.experts)
        and not (hears and _ENCODER.search(module.name))
    )


def reachable_names(modules: Sequence[Module]) -> list[str]:
    """Every name by which a pattern reaches one of the modules."""
    return [name for module in modules for name in (module.name, module.reached_as) if name]


def group_adapters(adapters: Sequence[AdapterModule]) -> list[ModuleGroup]:
    """The adapters as a short table, in order of first appearance."""
    groups: dict[tuple[str, int, float, float], list[AdapterModule]] = {}
    for adapter in adapters:
        parts = adapter.name.split(".")
        # A wrapper's inner layer is called `linear` whatever it is for, and experts have the names of dense layers.
        last = ".".join(parts[-2:] if parts[-1] == "linear" or adapter.experts else parts[-1:])
        groups.setdefault((last, adapter.rank, adapter.alpha, adapter.scale), []).append(adapter)
    return [
        ModuleGroup(name, len(members), rank, alpha, scale, sum(member.parameters for member in members))
        for (name, rank, alpha, scale), members in groups.items()
    ]


def _targets(
    modules: Sequence[Module], lora: LoraConfig, where: str
) -> tuple[tuple[Module, ...], list[Problem]]:
    targets = lora.target_modules
    if targets in AUTOMATIC:
        chosen = automatic_targets(modules, str(targets))
        if targets == "auto+experts" and not any(module.experts for module in chosen):
            return (), [no_experts(modules, where)]
        if chosen:
            return chosen, []
        problem = Problem(
            "no-decoder-linear",
            f"`auto` found no linear layer in a decoder block among {len(modules)} modules",
            where,
            f"name the modules, for example: {', '.join(_last_components(modules)[:6])}.",
        )
        return (), [problem]
    wanted: set[str] = set()
    problems = []
    for pattern in (targets,) if isinstance(targets, str) else targets:
        reached = _reached(pattern, modules, where)
        wanted.update(reached)
        if not reached:
            problems.append(_matches_nothing(pattern, modules, where))
    return tuple(module for module in modules if module.name in wanted), problems


def _reached(pattern: str, modules: Sequence[Module], where: str) -> list[str]:
    """The names of the modules that a pattern reaches, by their own name or by the one they are reached as."""
    reached = set(matching_names(pattern, reachable_names(modules), where))
    return [module.name for module in modules if module.name in reached or module.reached_as in reached]


def _values(
    patterns: Mapping[str, int],
    chosen: Sequence[Module],
    modules: Sequence[Module],
    key: str,
    written: Mapping[str, str],
) -> tuple[dict[str, int], list[Problem]]:
    """Module name -> value of the first pattern that matches, with a problem for each odd pattern."""
    values: dict[str, int] = {}
    deciding: dict[str, str] = {}
    problems = []
    disagreements: dict[tuple[str, str], int] = {}
    for pattern, value in patterns.items():
        where = written.get(f"{key}.{pattern}") or written.get(key, "")
        reached = _reached(pattern, chosen, where)
        if not reached:
            problems.append(_reaches_no_target(pattern, modules, where))
        for name in reached:
            if name not in values:
                values[name], deciding[name] = value, pattern
            elif values[name] != value:
                pair = (deciding[name], pattern)
                disagreements[pair] = disagreements.get(pair, 0) + 1
    for (first, second), count in disagreements.items():
        message = f"`{first}` and `{second}` both match {count} modules with different values; `{first}` wins"
        cure = "the first key that matches decides; make the keys narrower or reorder them."
        problems.append(Problem("patterns-disagree", message, written.get(key, key), cure))
    return values, problems


def _reaches_no_target(pattern: str, modules: Sequence[Module], where: str) -> Problem:
    if _reached(pattern, modules, where):
        return Problem(
            "pattern-outside-targets",
            f"`{pattern}` matches modules of the base, but none that `target_modules` adapts",
            where,
            "add the modules to `training.lora.target_modules`, or remove the pattern.",
        )
    return _matches_nothing(pattern, modules, where)


def _matches_nothing(pattern: str, modules: Sequence[Module], where: str) -> Problem:
    lasts = _last_components(modules)
    close = close_names(pattern.rpartition(".")[2], lasts) or lasts[:6]
    return Problem(
        "pattern-without-module",
        f"`{pattern}` matches none of the {len(modules)} adaptable modules",
        where,
        f"close names: {', '.join(close)}.",
    )


def _last_components(modules: Sequence[Module]) -> list[str]:
    return list(Counter((module.reached_as or module.name).rpartition(".")[2] for module in modules))


def check_expert_targets(chosen: Sequence[Module], lora: LoraConfig, written: Mapping[str, str]) -> None:
    """Raise ConfigError for a kind of adapter that PEFT cannot put on expert weights."""
    experts = [module.name for module in chosen if module.experts]
    by_weight = [module.name for module in chosen if module.by_weight]
    for kind, names, reason in (
        ("vera", experts if lora.use_vera else [], "its shared factors are matrices, and experts are 3-D"),
        ("dora", experts if lora.use_dora else [], "PEFT has no DoRA for 3-D experts"),
        (
            "dora",
            by_weight if lora.use_dora else [],
            "on this model type PEFT reaches it by its weight alone, and has no DoRA there",
        ),
    ):
        if names:
            raise ConfigError(
                f"{kind}-on-experts",
                f"`use_{kind}` cannot adapt `{names[0]}`: {reason}",
                where=written.get("training.lora.target_modules", "training.lora.target_modules"),
                help=f"name modules that leave it out, or remove `use_{kind}`.",
            )


def ranks_above_side(
    adapters: Sequence[AdapterModule], lora: LoraConfig, written: Mapping[str, str]
) -> list[Problem]:
    """One problem for all ranks above the smaller side of their module: a warning, and an error for pissa and olora."""
    large = [adapter for adapter in adapters if adapter.rank > min(adapter.out_features, adapter.in_features)]
    if not large:
        return []
    first = large[0]
    side = min(first.out_features, first.in_features)
    others = f" (and {len(large) - 1} more modules)" if len(large) > 1 else ""
    return [
        Problem(
            "rank-above-side",
            f"rank {first.rank} is above {side}, the smaller side of `{first.name}`{others}",
            written.get("training.lora.r", "training.lora.r"),
            f"a rank above {side} adds parameters and no freedom there"
            + ("." if lora.start == "random" else f"; {lora.start} has no such directions."),
        )
    ]


def no_experts(modules: Sequence[Module], where: str) -> Problem:
    """What to say where `auto+experts` reaches no experts."""
    return Problem(
        "no-experts",
        f"`auto+experts` found no expert weights in a decoder block among {len(modules)} modules",
        where,
        "use `target_modules: auto`, every linear layer of the decoder blocks; experts in a quantized format take no "
        "adapter.",
    )
