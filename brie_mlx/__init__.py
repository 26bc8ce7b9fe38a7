"""brie: a domain voice for a small Qwen2.5, trained with LoRA in MLX on one machine.

Importing the package comes before importing mlx, so that a fast BLAS can take its place first.
"""

from brie_mlx import device

__version__ = "0.1.0"

device.put_blas_under_mlx()
