"""What every migration must hold: no key is dropped in silence, and the result passes the check."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from soup_xb.core.config.load import parse_config
from soup_xb.migrate import Migration, migrate
from soup_xb.migrate.account import entries, read_source


@pytest.fixture
def accounted() -> Callable[..., Migration]:
    """Migrate a text; each of its keys is carried over or left, once, and the text reads back."""

    def check(text: str, tool: str = "auto", ok: bool = True) -> Migration:
        done = migrate(text, "theirs.yaml", tool)
        whole = ("training.lora.rank_pattern", "training.lora.alpha_pattern") if done.tool == "soup" else ()
        keys = sorted(entries(read_source(text, "theirs.yaml"), whole))
        told = sorted([*(carried.key for carried in done.carried), *(left.key for left in done.left)])
        assert told == keys
        assert all(left.reason for left in done.left)
        assert not ok or done.problems == (), [problem.render() for problem in done.problems]
        return done

    return check


@pytest.fixture
def values() -> Callable[[Migration], dict[str, Any]]:
    """The keys that the result writes, with their values."""

    def read(done: Migration) -> dict[str, Any]:
        from soup_xb.core.config.schema import value_of

        loaded = parse_config(done.text, "soup.yaml")
        return {key: value_of(loaded.config, key) for key in loaded.written if "pattern." not in key}

    return read
