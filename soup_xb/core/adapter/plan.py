"""Which adapters a run attaches to its base, decided before a backend is asked."""

from __future__ import annotations

from attrs import frozen

from soup_xb.core.base.modules import AdapterModule


@frozen
class AdapterPlan:
    """The adapters to attach, decided module by module. `merges`: restarts will fold them into the base.

    `task_type` is PEFT's word for what the adapted model does.
    """

    modules: tuple[AdapterModule, ...]
    dropout: float
    init_strategy: str
    use_rslora: bool
    seed: int
    merges: bool = False
    # What PEFT wraps the base in; None is its plain wrapper, which passes every argument on.
    task_type: str | None = "CAUSAL_LM"

    @property
    def use_dora(self) -> bool:
        """Whether the adapters train the magnitudes of their weights' rows too."""
        return any(module.dora for module in self.modules)

    @property
    def use_vera(self) -> bool:
        """Whether the adapters are VeRA's vectors on shared projections."""
        return any(module.vera for module in self.modules)
