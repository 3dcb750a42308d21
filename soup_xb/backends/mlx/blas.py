"""The matrix library under MLX on Linux: its wheel links a reference BLAS, about thirty times slower than OpenBLAS."""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from functools import lru_cache
from pathlib import Path

from attrs import frozen

# Built by the SciPy project with kernels for every processor; the one that fits is chosen as it loads.
_PACKAGE = "scipy-openblas32"
_PREFIX = "scipy_"
# What MLX's library takes from BLAS and LAPACK.
SYMBOLS = (
    *(f"cblas_{kind}gemm" for kind in "sdc"),
    *(
        f"{kind}{name}_"
        for kind in "sd"
        for name in ("geqrf", "getrf", "getri", "orgqr", "potrf", "syevd", "trtri")
    ),
    *(f"{kind}{name}_" for kind in "sdc" for name in ("geev", "gesdd")),
    "cheevd_",
)
_JUMPS = {"x86_64": "jmp {}@PLT", "aarch64": "b {}"}


@frozen
class Blas:
    """The BLAS in use: `name` in words, `fast` where it is a tuned one, and the reason."""

    name: str
    fast: bool
    reason: str


@lru_cache(maxsize=1)
def load_openblas() -> Blas:
    """Put OpenBLAS in front of the wheel's BLAS, once, before mlx.core is imported; without one nothing changes.

    Its symbols are made global under their plain names, so that they are found first when MLX's library binds
    `cblas_sgemm`.
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
    return _packaged(_PACKAGE, "libscipy_openblas.so")


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
    openblas = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    _load_plain_names()
    config = openblas.scipy_openblas_get_config
    config.restype = ctypes.c_char_p
    text = config().decode()
    threads = openblas.scipy_openblas_get_num_threads()
    return Blas(" ".join(text.split()[:2]), True, f"{text}, {threads} threads")


def _load_plain_names() -> None:
    """Make each of SYMBOLS a global function that jumps to the package's, whose names carry a prefix.

    The library of jumps is made by the C compiler, which MLX asks for its own compiled steps too. Raises OSError.
    """
    compiler, jump = shutil.which("cc") or shutil.which("g++"), _JUMPS.get(platform.machine())
    if compiler is None or jump is None:
        raise OSError(
            f"no C compiler for {platform.machine()} was found, which gives its functions their plain names"
        )
    lines = (
        f".globl {name}\n.type {name}, %function\n{name}: {jump.format(_PREFIX + name)}\n" for name in SYMBOLS
    )
    with tempfile.TemporaryDirectory(prefix="soupx-blas-") as folder:
        source, made = Path(folder, "names.s"), Path(folder, "names.so")
        source.write_text(".text\n" + "".join(lines) + '.section .note.GNU-stack,"",%progbits\n', "ascii")
        command = [compiler, "-shared", "-nostdlib", "-o", str(made), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise OSError(f"the C compiler failed: {done.stderr.strip()[-200:]}")
        ctypes.CDLL(str(made), mode=ctypes.RTLD_GLOBAL)


def _packaged(package: str, prefix: str) -> Path | None:
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = sorted(Path(str(file.locate())) for file in files if file.name.startswith(prefix))
    return next((file for file in found if file.is_file()), None)
