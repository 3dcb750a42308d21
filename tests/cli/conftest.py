"""The command line in this process: arguments in, exit code and both streams out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from attrs import frozen

from soup_xb.cli import run


@frozen
class Answer:
    code: int
    out: str
    err: str


@pytest.fixture
def soupx(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Run `soupx` with these arguments, through the same edge that a shell meets."""

    def call(*arguments: object) -> Answer:
        monkeypatch.setattr("sys.argv", ["soupx", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run()
        out, err = capsys.readouterr()
        return Answer(int(stopped.value.code or 0), out, err)

    return call
