"""What adapters cannot sit on, or have no use of, once their modules are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from soup_xb.core.config.schema import LoraConfig
from soup_xb.core.errors import ConfigError, Problem

if TYPE_CHECKING:
    from soup_xb.core.base.modules import AdapterModule, Module


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
