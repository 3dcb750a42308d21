"""The MLX backend: mlx-lm's models and LoRA layers, core's decisions; on Apple silicon, and on Linux CPUs."""

from soup_xb.backends.mlx.blas import load_openblas

# Symbols are bound when mlx.core is first imported, so this comes before any module that imports it.
load_openblas()
