"""Attention states, and the primitive that computes them: fused kernels on accelerators, tiles elsewhere."""

from approx_attention.kernels.fused import OUTPUT, Implementation, default_tiles, export_checks, state
from approx_attention.kernels.platforms import by_platform
from approx_attention.kernels.rows import (
    along_with,
    block_windows,
    even_split,
    in_blocks,
    map_rows,
    out_of_blocks,
    pad_rows,
    sums_of_seen,
    sums_so_far,
)
from approx_attention.kernels.states import AttentionState, finite_peak, merge, normalise, require_same_kind, subtract
from approx_attention.kernels.tiles import (
    GREATEST_TILE,
    HIDDEN,
    KEY_BLOCK,
    LEAST_TILE,
    accumulation_dtype,
    dense_state,
    mask_bias,
    soft_capped,
)

__all__ = [
    "GREATEST_TILE",
    "HIDDEN",
    "KEY_BLOCK",
    "LEAST_TILE",
    "OUTPUT",
    "AttentionState",
    "Implementation",
    "accumulation_dtype",
    "along_with",
    "block_windows",
    "by_platform",
    "default_tiles",
    "dense_state",
    "even_split",
    "export_checks",
    "finite_peak",
    "in_blocks",
    "map_rows",
    "mask_bias",
    "merge",
    "normalise",
    "out_of_blocks",
    "pad_rows",
    "require_same_kind",
    "soft_capped",
    "state",
    "subtract",
    "sums_of_seen",
    "sums_so_far",
]
