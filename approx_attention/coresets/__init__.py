"""Coresets: few weighted tokens that stand for many, by sampling, halving, clustering and in streams."""

from approx_attention.coresets.algorithms import (
    ALGORITHMS,
    Algorithm,
    Farthest,
    FarthestMerge,
    Halving,
    Herding,
    KMeansMerge,
    KMeansNystrom,
    Stratified,
)
from approx_attention.coresets.clustering import merged, nearest, random_places
from approx_attention.coresets.coreset import algorithm_of, compress, query_radius, refitted
from approx_attention.coresets.masses import FittedMasses
from approx_attention.coresets.published import BalanceKV, Compress, PivotedNystrom, SubGen
from approx_attention.coresets.sampling import Uniform, ValueNorm, sensitivities
from approx_attention.coresets.streaming import running_coreset

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "BalanceKV",
    "Compress",
    "Farthest",
    "FarthestMerge",
    "FittedMasses",
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
    "refitted",
    "running_coreset",
    "sensitivities",
]
