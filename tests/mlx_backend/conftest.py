"""OpenBLAS goes in front of MLX's own before a test imports mlx."""

import soup_xb.backends.mlx  # noqa: F401
