"""Few weighted tokens that stand for many: the algorithms, k-means, and halving."""

from approx_attention.coresets.algorithms import (
    ALGORITHMS,
    Algorithm,
    BalanceKV,
    Halving,
    KMeansMerge,
    KMeansNystrom,
    PivotedNystrom,
    Stratified,
    SubGen,
    sensitivities,
)
from approx_attention.coresets.clustering import (
    cholesky_places,
    farthest_places,
    k_means,
    merged,
    nearest,
    nystrom,
    random_places,
    spread_places,
)
from approx_attention.coresets.halving import SIGN_RULES, group_length, halve, kernel_points, spread_over, tree_order

__all__ = [
    "ALGORITHMS",
    "SIGN_RULES",
    "Algorithm",
    "BalanceKV",
    "Halving",
    "KMeansMerge",
    "KMeansNystrom",
    "PivotedNystrom",
    "Stratified",
    "SubGen",
    "cholesky_places",
    "farthest_places",
    "group_length",
    "halve",
    "k_means",
    "kernel_points",
    "merged",
    "nearest",
    "nystrom",
    "random_places",
    "sensitivities",
    "spread_over",
    "spread_places",
    "tree_order",
]
