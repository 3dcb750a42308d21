from __future__ import annotations

from pathlib import Path

import pytest

from soup_xb.core.errors import ModelError
from soup_xb.data.hub import resolve_base


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert resolve_base(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "just-a-name", "../x", ""])
def test_what_is_neither_folder_nor_hub_id_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ModelError, match="not a hub id") as caught:
        resolve_base(name or "\0x")
    assert caught.value.problems[0].code == "base-not-found"


def test_a_file_is_no_base(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="is not a folder"):
        resolve_base(str(file))


def test_a_hub_id_that_is_not_cached_says_how_to_fetch_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError) as caught:
        resolve_base("nobody/nothing")
    (problem,) = caught.value.problems
    assert problem.code == "base-not-cached"
    assert "hf download nobody/nothing" in problem.help
