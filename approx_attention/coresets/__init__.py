"""Coresets: a few weighted tokens in place of many, by sampling, halving and clustering, also of streams."""

from approx_attention.coresets.algorithms import (
    ALGORITHMS,
    Algorithm,
    Farthest,
    FarthestMerge,
    Guarded,
    Halving,
    Herding,
    KMeansMerge,
    KMeansNystrom,
    Stratified,
)
from approx_attention.coresets.clustering import merged, nearest, random_places
from approx_attention.coresets.clusters import CertifiedSummary, Clusters, clusters_around, running_clusters
from approx_attention.coresets.coreset import algorithm_of, compress, query_radius, refitted
from approx_attention.coresets.guard import best_of
from approx_attention.coresets.masses import FittedMasses
from approx_attention.coresets.published import BalanceKV, Compress, PivotedNystrom, SubGen
from approx_attention.coresets.sampling import Uniform, ValueNorm, rescaled, sensitivities
from approx_attention.coresets.streaming import Streaming, running_coreset

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "BalanceKV",
    "CertifiedSummary",
    "Clusters",
    "Compress",
    "Farthest",
    "FarthestMerge",
    "FittedMasses",
    "Guarded",
    "Halving",
    "Herding",
    "KMeansMerge",
    "KMeansNystrom",
    "PivotedNystrom",
    "Stratified",
    "Streaming",
    "SubGen",
    "Uniform",
    "ValueNorm",
    "algorithm_of",
    "best_of",
    "clusters_around",
    "compress",
    "merged",
    "nearest",
    "query_radius",
    "random_places",
    "refitted",
    "rescaled",
    "running_clusters",
    "running_coreset",
    "sensitivities",
]
