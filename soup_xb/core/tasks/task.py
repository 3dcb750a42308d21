"""What a task is: everything that tells it from the others, in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

from attrs import field, frozen

from soup_xb.core.objectives import losses

# Conversations and texts, in the order in which detection asks: datasets often carry the flat text beside the turns.
ANSWERS = ("messages", "sharegpt", "prompt-completion", "alpaca", "text")
PAIRS = ("preference",)
JUDGED = (*PAIRS, "unpaired-preference")
# What the tasks that sample answers read, the keys of their loss aside.
ROLLOUT_KEYS = tuple(
    f"training.{name}"
    for name in ("rewards", "answer_pattern", "group_size", "max_new_tokens", "temperature", "scale_rewards")
)
# The columns that rows of each format may have, by our names.
COLUMNS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "messages": ("messages", "system", "tools"),
        "sharegpt": ("conversations", "system", "tools"),
        "prompt-completion": ("prompt", "completion", "tools"),
        "alpaca": ("instruction", "input", "output", "system", "history"),
        "text": ("text",),
        "preference": (
            *("chosen", "rejected", "prompt", "conversations", "messages", "instruction", "input"),
            *("system", "history", "tools"),
        ),
        "unpaired-preference": (
            *("label", "prompt", "completion", "messages", "conversations", "instruction", "input"),
            *("output", "system", "history", "tools"),
        ),
        "anchor-positive": ("anchor", "positive", "negative"),
        "transcript": ("audio", "text", "language"),
    }
)
WHOLE_TEXTS = "what is compared are whole texts, each in a sequence of its own"
FILES_OF_ROWS = "pictures and sounds are matched to the tokens of a row, one row a sequence"
EQUALLY_OFTEN = "the processes of a sharded base must run it equally often, which this task does not keep"


@frozen
class No:
    """Why a backend refuses a feature, and what to do instead."""

    because: str
    instead: str


WORDS_ALONE = "train on the words alone: `task: sft` on text rows."


@frozen
class Required:
    """A config key that a task cannot do without: what the error says of it, and the way out."""

    key: str
    because: str
    help: str


@frozen(kw_only=True)
class Task:
    """One task; `about` says in a sentence what it trains.

    Rows: `formats` are the formats that it reads, in the order in which detection asks, `kind` is the kind of its rows
    (see core.rows.row), `media` the kind of files that they hold.

    Loss: `loss` is a function of core.objectives.losses, `objective` the name in core.objectives.objective of what
    computes its statistics (empty for tokens), `measures` are further metrics computed from the same statistics.
    `keys` are config keys that mean something for this task, those of its loss aside; `required` are keys that it
    needs.

    `peft_type` is PEFT's word for what the adapted model does, None for its plain wrapper, which passes every argument
    on. `packing` says whether rows are put together into one sequence, `no_packing` why not. `no_sharding` is the
    reason why the base cannot be cut over processes, `balances_router` whether a router's loss can stand beside the
    task's. `feature` is its word in error codes, `mlx` the reason why the mlx backend refuses it.
    """

    name: str
    about: str
    formats: tuple[str, ...]
    kind: Literal["tokens", "pair", "judged", "prompt", "embedding"] = "tokens"
    media: Literal["", "image", "audio"] = ""
    loss: Callable[..., Any] = losses.cross_entropy
    objective: Literal["", "pairs", "judged", "scores", "groups", "embeddings"] = ""
    measures: Mapping[str, Callable[..., Any]] = field(factory=dict)
    keys: tuple[str, ...] = ()
    required: tuple[Required, ...] = ()
    peft_type: str | None = "CAUSAL_LM"
    packing: Literal["never", "optional", "always"] = "never"
    no_packing: str = WHOLE_TEXTS
    no_sharding: str = ""
    balances_router: bool = False
    feature: str = ""
    mlx: No | None = None

    @property
    def settings(self) -> Mapping[str, float | None]:
        """The `training` keys that its loss takes, with the loss's own default for a key that a file leaves open."""
        return losses.settings(self.loss)

    @property
    def all_keys(self) -> tuple[str, ...]:
        """The dotted config keys that mean something for this task."""
        router = ("training.router_aux_loss_coef",) if self.balances_router else ()
        return (*(f"training.{name}" for name in self.settings), *self.keys, *router)

    def columns(self, format: str) -> tuple[str, ...]:
        """The columns that its rows of a format may have, for `auto` of all its formats; none where all are read."""
        if self.samples:
            return ()
        named = [name for one in self.formats if format in ("auto", one) for name in COLUMNS[one]]
        if self.media:
            named = [*(name for name in named if name != "tools"), self.media, f"{self.media}s"]
        return tuple(dict.fromkeys(named))

    @property
    def needs_reference(self) -> bool:
        """Whether its rows are compared with the base's log-probabilities, which are computed before the first step."""
        asked = losses.statistics(self.loss)
        return self.kind in ("pair", "judged") and any(name.startswith("ref") for name in asked)

    @property
    def needs_mismatched(self) -> bool:
        """Whether it measures the drift from the base on answers to other prompts."""
        return "drift" in losses.statistics(self.loss)

    @property
    def samples(self) -> bool:
        """Whether the model answers the rows itself."""
        return self.kind == "prompt"

    @property
    def embeds(self) -> bool:
        """Whether it trains vectors of texts: such a model writes nothing."""
        return self.objective == "embeddings"

    @property
    def scores(self) -> bool:
        """Whether it trains a scalar head beside the adapter."""
        return self.objective == "scores"

    def setting(self, training: Any, name: str) -> Any:
        """The value of one of its loss's keys in the `training` section of a config."""
        value = getattr(training, name)
        return self.settings[name] if value is None else value
