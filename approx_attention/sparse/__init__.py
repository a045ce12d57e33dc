"""Sparse patterns, exact attention over their blocks, and exact attention on a support plus a summary of the rest."""

from approx_attention.sparse.blocks import (
    BlockMap,
    block_lists_state,
    block_sparse_state,
    is_traced,
    pairs_of_blocks,
)
from approx_attention.sparse.gathered import gathered_state, rows_gathered
from approx_attention.sparse.hashing import Buckets, Planes
from approx_attention.sparse.lifted import NO_NUMBER, LiftedKV, first_lifted, uniform_numbers
from approx_attention.sparse.patterns import SparsePattern, check_pattern
from approx_attention.sparse.remainder import blocks_and_rest_state, support_and_moments_state
from approx_attention.sparse.retrieval import is_found, largest_logits

__all__ = [
    "NO_NUMBER",
    "BlockMap",
    "Buckets",
    "LiftedKV",
    "Planes",
    "SparsePattern",
    "block_lists_state",
    "block_sparse_state",
    "blocks_and_rest_state",
    "check_pattern",
    "first_lifted",
    "gathered_state",
    "is_found",
    "is_traced",
    "largest_logits",
    "pairs_of_blocks",
    "rows_gathered",
    "support_and_moments_state",
    "uniform_numbers",
]
