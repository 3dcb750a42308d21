from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from soup_xb.backends.mlx import blas

LINUX = sys.platform == "linux"


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(not LINUX, reason="macOS brings its own BLAS")
def test_products_are_openblas_s_once_the_backend_is_imported() -> None:
    code = """
from soup_xb.backends.mlx.blas import blas_in_use
import mlx.core as mx
used = blas_in_use()
print(used.fast, used.name)
"""
    fast, name, *_ = run_python(code).split()
    assert (fast, name) == ("True", "OpenBLAS")


@pytest.mark.skipif(not LINUX, reason="macOS brings its own BLAS")
def test_too_late_is_told() -> None:
    code = """
import mlx.core
from soup_xb.backends.mlx.blas import blas_in_use
print(blas_in_use())
"""
    assert "mlx was imported before" in run_python(code)


@pytest.mark.skipif(not LINUX, reason="macOS brings its own BLAS")
def test_without_openblas_nothing_breaks() -> None:
    code = """
import importlib.metadata, sys
files = importlib.metadata.files
importlib.metadata.files = lambda name: None if name == "scipy-openblas32" else files(name)
from soup_xb.backends.mlx.blas import blas_in_use
import mlx.core as mx
assert (mx.ones((2, 2)) @ mx.ones((2, 2))).tolist() == [[2, 2], [2, 2]]
print(blas_in_use())
"""
    assert "no OpenBLAS found" in run_python(code)


def test_a_library_that_does_not_load_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "libopenblas.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(blas, "find_openblas", lambda: broken)
    monkeypatch.setattr(blas.sys, "platform", "linux")
    monkeypatch.delitem(sys.modules, "mlx.core", raising=False)
    used = blas.load_openblas.__wrapped__()
    assert not used.fast
    assert "libopenblas.so does not load" in used.reason


@pytest.mark.skipif(not LINUX, reason="macOS brings its own BLAS")
def test_every_name_that_mlx_takes_from_blas_and_lapack_is_openblas_s() -> None:
    """MLX's own list, so that a new release cannot go back to the slow library for one of them in silence."""
    library = next(
        Path(str(file.locate())) for file in metadata.files("mlx-cpu") or [] if file.name == "libmlx.so"
    )
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    names = set(re.findall(r" U (cblas_\w+|[sdcz][a-z0-9]{3,5}_)$", listed, re.MULTILINE))
    assert len(names) > 20
    assert names == set(blas.SYMBOLS)
