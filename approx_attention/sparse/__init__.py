"""Sparse patterns, exact attention over their blocks, and exact attention on a support with a summary of the rest."""

from approx_attention.sparse.blocks import (
    GATHERED,
    BlockMap,
    block_lists_state,
    block_sparse_state,
    gathered_state,
    is_traced,
)
from approx_attention.sparse.patterns import SparsePattern, check_pattern
from approx_attention.sparse.remainder import blocks_and_rest_state, support_and_moments_state

__all__ = [
    "GATHERED",
    "BlockMap",
    "SparsePattern",
    "block_lists_state",
    "block_sparse_state",
    "blocks_and_rest_state",
    "check_pattern",
    "gathered_state",
    "is_traced",
    "support_and_moments_state",
]
