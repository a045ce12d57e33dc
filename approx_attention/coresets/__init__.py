"""Few weighted tokens that stand for many: the algorithms, k-means, halving, and streams."""

from approx_attention.coresets.algorithms import (
    ALGORITHMS,
    Algorithm,
    BalanceKV,
    Compress,
    FarthestMerge,
    Halving,
    Herding,
    KMeansMerge,
    KMeansNystrom,
    PivotedNystrom,
    Stratified,
    SubGen,
    Uniform,
    ValueNorm,
    sensitivities,
)
from approx_attention.coresets.clustering import merged, nearest, random_places
from approx_attention.coresets.coreset import algorithm_of, compress, query_radius
from approx_attention.coresets.streaming import running_coreset

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "BalanceKV",
    "Compress",
    "FarthestMerge",
    "Halving",
    "Herding",
    "KMeansMerge",
    "KMeansNystrom",
    "PivotedNystrom",
    "Stratified",
    "SubGen",
    "Uniform",
    "ValueNorm",
    "algorithm_of",
    "compress",
    "merged",
    "nearest",
    "query_radius",
    "random_places",
    "running_coreset",
    "sensitivities",
]
