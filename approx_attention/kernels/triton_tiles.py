"""Tile sizes of the kernel for GPUs."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

# Matrix units multiply tiles of at least 16 rows and columns.
LEAST_BLOCK = 16


class Tile(NamedTuple):
    """A tile of logits and its schedule.

    Attributes:
        rows: number of queries, a power of two of at least 16.
        columns: number of keys, a power of two of at least 16.
        num_warps: number of groups of 32 threads per tile.
        num_stages: number of blocks in the load pipeline, including the current one.
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


# Default tiles by the largest dimension of a head, rounded up to a power of two, chosen from programs compiled for an
# H200 (sm_90a), not from times. No full, causal or windowed program spills registers, and the tiles with their pipeline
# fit in shared memory (227 KB). Within these limits the number of queries (for the gradient of keys: of keys) is as
# large as possible, up to 128, because each loaded block serves all of them.
_HALF_PRECISION = {
    64: Tiles(Tile(128, 64, 8, 2), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
    128: Tiles(Tile(128, 128, 8, 2), Tile(128, 64, 8, 3), Tile(64, 128, 8, 2)),
    256: Tiles(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(16, 64, 8, 2)),
}
# Float32 products on matrix units, which round the factors to TF32.
_TF32 = {
    64: Tiles(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
    128: Tiles(Tile(128, 32, 8, 2), Tile(128, 16, 8, 2), Tile(32, 32, 8, 2)),
    256: Tiles(Tile(32, 32, 8, 2), Tile(32, 16, 8, 2), Tile(16, 16, 8, 2)),
}
# Float32 products without matrix units, whose tiles are in registers.
_FLOAT32 = {
    64: Tiles(Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 4, 2)),
    128: Tiles(Tile(32, 16, 4, 2), Tile(32, 16, 8, 2), Tile(16, 32, 8, 2)),
    256: Tiles(Tile(16, 16, 8, 2), Tile(16, 16, 8, 2), Tile(16, 16, 8, 2)),
}
# Above 256 programs compile up to dimension 1024 in half precision and 512 in float32 (TF32), and may spill registers.
_WIDE = Tiles(Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1))
_TF32_PRECISIONS = None, "default", "high", "bfloat16", "tensorfloat32", "TF32_TF32_F32"


def default_tiles(head_dim: int, value_dim: int, dtype: Any) -> Tiles:
    """The tiles for heads of these dimensions; in float32 they depend on `jax.default_matmul_precision`."""
    if jnp.dtype(dtype).itemsize == 2:
        table = _HALF_PRECISION
    else:
        # Declared dynamically when JAX is imported.
        precision = getattr(jax.config, "jax_default_matmul_precision")  # noqa: B009
        table = _TF32 if precision in _TF32_PRECISIONS else _FLOAT32
    width = max(padded_width(head_dim), padded_width(value_dim))
    return next((tiles for limit, tiles in table.items() if width <= limit), _WIDE)


def padded_width(length: int) -> int:
    """The width of a block for this number of channels or tokens."""
    return max(LEAST_BLOCK, pl.next_power_of_2(length))
