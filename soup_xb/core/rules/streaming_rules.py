"""What a run needs that streams its rows from the hub, and what it cannot be combined with."""

from __future__ import annotations

from collections.abc import Iterator

from soup_xb.core.config.loaded import LoadedConfig
from soup_xb.core.config.rules import Rule, excluded
from soup_xb.core.config.run_rules import is_local_path
from soup_xb.core.config.schema import MEDIA_TASKS
from soup_xb.core.errors import Problem

_KEY = "data.streaming"
STREAMED_FILE = (
    "is a local file, and there is nothing to stream: local files are read where they are and tokenized into the cache",
    "remove `data.streaming`, or name a dataset on the hub.",
)


def _steps_are_known(loaded: LoadedConfig) -> Iterator[Problem]:
    if loaded.config.data.streaming and loaded.config.training.max_steps is None:
        yield Problem(
            "streaming-without-steps",
            "needs `training.max_steps`: how many rows are read follows from the steps, and epochs count the whole",
            loaded.where(_KEY),
            "write `training.max_steps`, or remove `data.streaming`.",
        )


def _data_is_on_the_hub(loaded: LoadedConfig) -> Iterator[Problem]:
    data = loaded.config.data
    if not data.streaming:
        return
    local = [path for path in data.train if is_local_path(path)]
    if local:
        text, help = STREAMED_FILE
        yield Problem("streaming-local-data", f"`{local[0]}` {text}", loaded.where("data.train"), help)
    elif len(data.train) > 1:
        yield Problem(
            "streaming-several",
            f"names {len(data.train)} datasets, and steps are filled from one: no key says how many rows each gives",
            loaded.where("data.train"),
            "name one of them, or remove `data.streaming`.",
        )


def _held_out_rows_are_at_hand(loaded: LoadedConfig) -> Iterator[Problem]:
    data = loaded.config.data
    remote = [path for path in data.eval if "/" in path and not is_local_path(path)]
    if data.streaming and remote:
        yield Problem(
            "streaming-eval",
            f"`{remote[0]}` would be downloaded whole: an evaluation takes all of its rows",
            loaded.where("data.eval"),
            "name a local file, or hold streamed rows out by `data.val_split`.",
        )


def _rows_are_whole(loaded: LoadedConfig) -> Iterator[Problem]:
    kind = MEDIA_TASKS.get(loaded.config.task)
    if loaded.config.data.streaming and kind is not None:
        reason = f"its rows name {kind} files, which are read from a local folder when their step comes"
        yield excluded(loaded, (_KEY, "`true`"), "task", reason)


RULES = (
    Rule(_steps_are_known, (_KEY, "training.max_steps")),
    Rule(_data_is_on_the_hub, (_KEY, "data.train")),
    Rule(_held_out_rows_are_at_hand, (_KEY, "data.eval")),
    Rule(_rows_are_whole, (_KEY, "task")),
)
