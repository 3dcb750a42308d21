"""The coverage in words and as plain values: for `soupx plan`, the start of a run, and the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attrs import frozen

from soup_xb.core.base.coverage import EXPERTS, ROUTERS, Coverage, Part, PatternReach, names_layers
from soup_xb.core.base.layers import Reach, layers_text
from soup_xb.core.errors import Problem


@frozen
class CoverageRow:
    """One row of the coverage: what it is about, what it says, and a way out where there is one."""

    label: str
    texts: tuple[str, ...]
    help: str = ""


def coverage_rows(coverage: Coverage, backend: str) -> list[CoverageRow]:
    """What each pattern reached, the parts of a base with experts, and what carries no adapter besides."""
    rows = [CoverageRow(_pattern_name(pattern), _pattern_texts(pattern)) for pattern in coverage.patterns]
    rows += [
        CoverageRow(part.name, (part_text(part, coverage.base_parameters),), part_help(part, backend))
        for part in coverage.parts
    ]
    if coverage.left_out:
        rows.append(CoverageRow("left out", tuple(reach_text(reach) for reach in coverage.left_out)))
    if coverage.without_adapter:
        rows.append(CoverageRow("no adapter", (layers_text(coverage.without_adapter),)))
    return rows


def coverage_notices(coverage: Coverage, backend: str) -> list[Problem]:
    """What the start of a run says; nothing for a base without experts whose layers all carry an adapter."""
    notices = [
        Problem(
            "part",
            f"{part.name}: {part_text(part, coverage.base_parameters)}",
            help=part_help(part, backend),
        )
        for part in coverage.parts
    ]
    meant = any(names_layers(pattern.pattern) for pattern in coverage.patterns)
    if coverage.without_adapter and not meant and not coverage.warnings:
        text = f"{layers_text(coverage.without_adapter)} carry no adapter: they hold none of the targets"
        notices.append(Problem("layers-without-adapter", text))
    return notices


def coverage_json(coverage: Coverage) -> dict[str, Any]:
    """The coverage as JSON-ready values: kinds of modules in full, layers one by one."""
    return {
        "patterns": [
            {
                "key": pattern.key,
                "pattern": pattern.pattern,
                "value": pattern.value,
                "count": pattern.count,
                "reached": _reaches_json(pattern.reached),
            }
            for pattern in coverage.patterns
        ],
        "parts": [
            {
                "name": part.name,
                "count": part.count,
                "adapted_count": part.adapted_count,
                "experts": part.experts,
                "parameters": part.parameters,
                "adapted": _reaches_json(part.adapted),
                "not_adapted": _reaches_json(part.left),
            }
            for part in coverage.parts
        ],
        "left_out": _reaches_json(coverage.left_out),
        "layers_without_adapter": list(coverage.without_adapter),
    }


def reach_text(reach: Reach, known: str = "") -> str:
    """Kinds, layers, count, and why not in all layers; a kind that is called `known` need not be named again.

    >>> reach_text(Reach(("q_proj", "k_proj"), ("self_attn.q_proj", "self_attn.k_proj"), "", (0, 1, 2), 6))
    'q_proj, k_proj in layers 0-2 (6)'
    """
    stack = f"{reach.stack}: " if reach.stack else ""
    where = layers_text(reach.layers) if reach.layers else ""
    named = ", ".join(reach.names)
    text = where if named == known and where else f"{named} in {where}" if where else named
    missed = f", not in {layers_text(reach.missed)}" if reach.missed else ""
    reason = f" [{reach.reason}]" if reach.reason else ""
    return f"{stack}{text} ({reach.count}){missed}{reason}"


def part_text(part: Part, base_parameters: int) -> str:
    """One part of a base with experts: adapted or not, which kinds, which layers."""
    share = ""
    if part.name == EXPERTS and part.parameters:
        share = f", {part.parameters / base_parameters:.0%} of the base's parameters"
    size = f", {part.experts} experts a layer" if part.experts else ""
    if not part.left:
        return f"adapted ({_kinds_text(part.adapted)}{size})"
    if not part.adapted:
        return f"not adapted ({_kinds_text(part.left)}{size}{share})"
    return (
        f"{part.adapted_count} of {part.count} adapted ({_kinds_text(part.adapted)}); "
        f"not adapted: {_kinds_text(part.left)}{size}"
    )


def part_help(part: Part, backend: str) -> str:
    """How to adapt what of the part is not; empty for routers, which stay as they are."""
    if part.name == ROUTERS or not part.left:
        return ""
    # Experts that are linear layers of their own are adapted as any other.
    stacked = part.experts and not any(".*." in kind for reach in part.left for kind in reach.kinds)
    if backend == "mlx" and (stacked or not part.adaptable):
        return "expert weights cannot be adapted on the mlx backend; run with --backend torch."
    if not part.adaptable:
        return "no adapter can sit on them: their weights have a form of their own."
    return f"`target_modules: auto{'+experts' if stacked else ''}` adapts them too."


def _pattern_name(pattern: PatternReach) -> str:
    return pattern.pattern if pattern.value is None else f"{pattern.key} {pattern.pattern} = {pattern.value}"


def _pattern_texts(pattern: PatternReach) -> tuple[str, ...]:
    if not pattern.reached:
        return ("nothing: earlier keys decide all that it matches",)
    return tuple(reach_text(reach, pattern.pattern) for reach in pattern.reached)


def _kinds_text(reaches: Sequence[Reach]) -> str:
    return "; ".join(
        (f"{reach.stack}: " if reach.stack else "")
        + f"{', '.join(reach.names)} in {layers_text(reach.layers)}"
        for reach in reaches
    )


def _reaches_json(reaches: Sequence[Reach]) -> list[dict[str, Any]]:
    return [
        {
            "modules": list(reach.kinds),
            "stack": reach.stack,
            "layers": list(reach.layers),
            "count": reach.count,
            "missed_layers": list(reach.missed),
            "reason": reach.reason,
        }
        for reach in reaches
    ]
