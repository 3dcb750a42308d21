"""The matrix library under MLX on Linux: its wheel links a reference BLAS, about thirty times slower than OpenBLAS."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import sys
import time
from functools import lru_cache
from pathlib import Path

from attrs import frozen

_PACKAGE = "cmeel-openblas"
_FORTRAN = "libgfortran.so.5"


@frozen
class Blas:
    """The BLAS in use: `name` in words, `fast` where it is a tuned one, and the reason."""

    name: str
    fast: bool
    reason: str


@lru_cache(maxsize=1)
def load_openblas() -> Blas:
    """Put OpenBLAS in front of the wheel's BLAS, once, before mlx.core is imported; without one nothing changes.

    Its symbols are made global, so that they are found first when MLX's library binds `cblas_sgemm`.
    """
    if sys.platform != "linux":
        return Blas("Accelerate", True, "macOS brings its own")
    if "mlx.core" in sys.modules:
        return Blas("the wheel's reference BLAS", False, "mlx was imported before soup_xb.backends.mlx")
    library = find_openblas()
    if library is None:
        return Blas("the wheel's reference BLAS", False, f'no OpenBLAS found: pip install "{_PACKAGE}"')
    try:
        return _load(library)
    except OSError as error:
        return Blas("the wheel's reference BLAS", False, f"{library.name} does not load: {error}")


def blas_in_use() -> Blas:
    """Which BLAS MLX multiplies with on a CPU."""
    return load_openblas()


def find_openblas() -> Path | None:
    """The library of the installed OpenBLAS package."""
    return _packaged(_PACKAGE, "libopenblas.so")


def measure_gflops(size: int = 1024, repeats: int = 5) -> float:
    """The best of some float32 products of `size`-square matrices on the CPU, in 10^9 operations a second."""
    import mlx.core as mx

    with mx.stream(mx.cpu):
        left, right = mx.random.normal((size, size)), mx.random.normal((size, size))
        mx.eval(left, right)
        best = float("inf")
        for _ in range(repeats):
            started = time.perf_counter()
            mx.eval(left @ right.T)
            best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best / 1e9


def _load(library: Path) -> Blas:
    try:
        openblas = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        if _FORTRAN not in str(error):
            raise
        _load_fortran_runtime()
        openblas = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    openblas.openblas_get_config.restype = ctypes.c_char_p
    config = openblas.openblas_get_config().decode()
    threads = openblas.openblas_get_num_threads()
    return Blas(" ".join(config.split()[:2]), True, f"{config}, {threads} threads")


def _load_fortran_runtime() -> None:
    """Load the Fortran runtime that MLX's wheel carries, under the name by which OpenBLAS asks for it.

    Wheels rename the libraries they carry; the copy in memory gets the plain name back. Raises OSError.
    """
    renamed = _packaged("mlx-cpu", "libgfortran-")
    if renamed is None:
        raise OSError(f"{_FORTRAN} is not installed")
    for companion in sorted(renamed.parent.glob("libquadmath*")):
        ctypes.CDLL(str(companion))
    own = renamed.name.encode() + b"\0"
    image = renamed.read_bytes().replace(own, _FORTRAN.encode().ljust(len(own), b"\0"))
    descriptor = os.memfd_create(_FORTRAN)
    try:
        with os.fdopen(descriptor, "wb", closefd=False) as memory:
            memory.write(image)
        ctypes.CDLL(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def _packaged(package: str, prefix: str) -> Path | None:
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = sorted(Path(str(file.locate())) for file in files if file.name.startswith(prefix))
    return next((file for file in found if file.is_file()), None)
