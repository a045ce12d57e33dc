"""Sizes of the tiles of the kernel for GPUs."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

# The matrix units multiply tiles of 16 rows and columns at least.
LEAST_BLOCK = 16


class Tile(NamedTuple):
    """A tile of logits and how a program computes it.

    Attributes:
        rows: queries, a power of two of at least 16.
        columns: keys, a power of two of at least 16.
        num_warps: groups of 32 threads that share a tile.
        num_stages: blocks that are read ahead, the current one included.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int


class Tiles(NamedTuple):
    """The tiles of the three kernels: `forward`, the gradient of the queries, and that of the keys and values."""

    forward: Tile
    d_queries: Tile
    d_keys: Tile


# Default tiles by the greatest dimension of a head, rounded up to a power of two, chosen from programs compiled
# for an H200 (sm_90a), not from times. No full, causal or windowed program spills registers, and the tiles fit shared
# memory (227 KB) with blocks read ahead. Under these limits a program holds as many queries (for the gradient of the
# keys: as many keys) as it can, up to 128, because each block that it reads serves all of them.
_HALF_PRECISION = {
    64: Tiles(Tile(128, 64, 8, 2), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
    128: Tiles(Tile(128, 128, 8, 2), Tile(128, 64, 8, 3), Tile(64, 128, 8, 2)),
    256: Tiles(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(16, 64, 8, 2)),
}
# Products of float32 on matrix units, which round the factors to TF32.
_TF32 = {
    64: Tiles(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
    128: Tiles(Tile(128, 32, 8, 2), Tile(128, 16, 8, 2), Tile(32, 32, 8, 2)),
    256: Tiles(Tile(32, 32, 8, 2), Tile(32, 16, 8, 2), Tile(16, 16, 8, 2)),
}
# Products of float32 without the matrix units: their tiles are held in registers.
_FLOAT32 = {
    64: Tiles(Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 4, 2)),
    128: Tiles(Tile(32, 16, 4, 2), Tile(32, 16, 8, 2), Tile(16, 32, 8, 2)),
    256: Tiles(Tile(16, 16, 8, 2), Tile(16, 16, 8, 2), Tile(16, 16, 8, 2)),
}
# Above 256 programs compile up to dimension 1024 in half precision and 512 in float32 (TF32), and may spill registers.
_WIDE = Tiles(Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1))
_TF32_PRECISIONS = None, "default", "high", "bfloat16", "tensorfloat32", "TF32_TF32_F32"


def default_tiles(head_dim: int, value_dim: int, dtype: Any) -> Tiles:
    """The tiles for heads of these dimensions, at the precision `jax.default_matmul_precision` in float32."""
    if jnp.dtype(dtype).itemsize == 2:
        table = _HALF_PRECISION
    else:
        # JAX declares this option at run time.
        precision = getattr(jax.config, "jax_default_matmul_precision")  # noqa: B009
        table = _TF32 if precision in _TF32_PRECISIONS else _FLOAT32
    width = max(padded_width(head_dim), padded_width(value_dim))
    return next((tiles for limit, tiles in table.items() if width <= limit), _WIDE)


def padded_width(length: int) -> int:
    """The width of a block for this number of channels or tokens."""
    return max(LEAST_BLOCK, pl.next_power_of_2(length))
