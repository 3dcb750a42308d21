"""Starts of the adapter against PEFT's own: time, captured energy, and the output's error at step 0.

    python bench/init.py --rounds 3
    python bench/init.py --rounds 3 --backend torch mlx

Both libraries take turns on freshly loaded copies of the base (float32, all linear layers of the decoder, rank
16), and only putting the adapters on is timed; the table shows each one's median. Energy is the share of the
exact top-16 energy (float64 SVD) that the factors' directions hold, mean and worst over the modules. The error is
the largest change of a logit before any training, as a share of the largest logit.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig as PeftConfig
from peft import get_peft_model

from soup_xb.backends import open_session
from soup_xb.core.adapter.plan import AdapterPlan
from soup_xb.core.base.modules import resolve_adapters
from soup_xb.core.config.schema import LoraConfig
from soup_xb.core.config.support_rows import BACKENDS
from soup_xb.core.run.session import OptimizerSettings, SessionSettings
from soup_xb.demo.base import prepare_base

RANK, ALPHA = 16, 32
STRATEGIES = ("random", "pissa", "olora")
RIVALS = {"random": (True,), "pissa": ("pissa", "pissa_niter_4"), "olora": ("olora",)}


@dataclass
class Measured:
    """One way to start: seconds of each round, and of the last one the errors and B factors by module."""

    name: str
    strategy: str
    seconds: list[float] = field(default_factory=list)
    error: float = 0.0
    directions: dict[str, torch.Tensor] = field(default_factory=dict)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, help="a model folder; default: the demo's base")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--backend", nargs="+", choices=BACKENDS, default=["torch"], help="ours; default: torch"
    )
    options = parser.parse_args()
    base = options.base or prepare_base()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    ways: list[tuple[Measured, Callable[[Measured], None]]] = []
    for strategy in STRATEGIES:
        for backend in options.backend:
            name = f"soup-xb ({backend})"
            ways.append((Measured(name, strategy), lambda way, backend=backend: ours(base, way, backend)))
        for rival in RIVALS[strategy]:
            name = f"PEFT ({rival})" if isinstance(rival, str) else "PEFT"
            ways.append((Measured(name, strategy), lambda way, rival=rival: peft(base, way, rival)))
    for turn in range(options.rounds):
        for measured, run in ways:
            run(measured)
            print(
                f"round {turn + 1}: {measured.strategy} by {measured.name}: {measured.seconds[-1]:.2f} s",
                file=sys.stderr,
            )
    print_table([measured for measured, _ in ways], exact_energy(base))


def ours(base: Path, way: Measured, backend: str) -> None:
    """One start by soup-xb."""
    optimizer = OptimizerSettings("adamw", 0.9, 0.999, 1e-8, 0.0, 1.0)
    session: Any = open_session(backend, SessionSettings(base, "fp32", "none", False, optimizer, 0))
    before = session.logits(PROMPT)
    lora = LoraConfig(r=RANK, alpha=ALPHA, init_strategy=way.strategy)
    modules = resolve_adapters(session.describe().modules, lora, {}).adapters
    started = time.perf_counter()
    session.attach(AdapterPlan(modules, 0.0, way.strategy, False, 0))
    way.seconds.append(time.perf_counter() - started)
    way.error = relative_error(before, session.logits(PROMPT))
    way.directions = {name: torch.from_numpy(start.b) for name, start in session._adapters.starts.items()}
    session.close()


def peft(base: Path, way: Measured, init: bool | str) -> None:
    """One start by PEFT."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.requires_grad_(False)
    before = logits(model)
    config = PeftConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", init_lora_weights=init)
    started = time.perf_counter()
    adapted = get_peft_model(model, config)
    way.seconds.append(time.perf_counter() - started)
    way.error = relative_error(before, logits(adapted))
    way.directions = {
        name.removeprefix("base_model.model."): module.lora_B["default"].weight.detach().clone()
        for name, module in adapted.named_modules()
        if hasattr(module, "lora_B")
    }


PROMPT = np.random.default_rng(0).integers(5, 40_000, (2, 64))


def logits(model: Any) -> np.ndarray[Any, Any]:
    """Float32 logits of the prompt."""
    with torch.no_grad():
        result: np.ndarray[Any, Any] = model(
            input_ids=torch.from_numpy(PROMPT), use_cache=False
        ).logits.numpy()
    return result


def relative_error(before: np.ndarray[Any, Any], after: np.ndarray[Any, Any]) -> float:
    """The largest change over the largest value."""
    return float(np.abs(after - before).max() / np.abs(before).max())


def exact_energy(base: Path) -> dict[str, tuple[torch.Tensor, float]]:
    """Each module's weight, float64, with the sum of its 16 largest squared singular values."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            weight = module.weight.detach().double()
            found[name] = (weight, torch.linalg.svdvals(weight)[:RANK].square().sum().item())
    return found


def captured(way: Measured, exact: dict[str, tuple[torch.Tensor, float]]) -> str:
    """Share of the exact energy in the directions of B, mean and worst."""
    if way.strategy != "pissa":
        return "-"
    shares = []
    for name, factor in way.directions.items():
        weight, energy = exact[name]
        shares.append((torch.linalg.qr(factor.double())[0].T @ weight).square().sum().item() / energy)
    return f"{statistics.mean(shares):.4%} / {min(shares):.4%}"


def print_table(ways: list[Measured], exact: dict[str, tuple[torch.Tensor, float]]) -> None:
    """The table, with how many times faster than PEFT's exact way each of ours is."""
    print(f"{len(exact)} modules, rank {RANK}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(
        f"{'start':<8}{'by':<20}{'seconds':>9}{'faster':>8}  {'energy, mean / worst':<24}{'error at step 0':>16}"
    )
    for way in ways:
        rival = next(
            other for other in ways if other.strategy == way.strategy and other.name.startswith("PEFT")
        )
        seconds = statistics.median(way.seconds)
        faster = (
            f"{statistics.median(rival.seconds) / seconds:.1f}x" if way.name.startswith("soup-xb") else ""
        )
        print(
            f"{way.strategy:<8}{way.name:<20}{seconds:>9.2f}{faster:>8}  {captured(way, exact):<24}{way.error:>16.1e}"
        )


if __name__ == "__main__":
    main()
