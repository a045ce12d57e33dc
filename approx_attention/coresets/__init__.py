r"""Coresets: a few weighted tokens in place of many, by sampling, halving and clustering, also of streams.

An algorithm is a hashable function ``(tokens, size, ratio, key) ->`` `WeightedKV`. `compress`, `coreset` and
`compress_tokens` take one by its name in `ALGORITHMS`, or as an object with other settings.

Args:
    tokens: S tokens, a `WeightedKV` in scaled space with centred keys and without negative masses.
    size: the number M of tokens of the coreset, smaller than S.
    ratio: the radius of the queries over that of the keys, :math:`\rho_q / \rho_k`.
    key: typed PRNG key.

Example:
    >>> import jax
    >>> from approx_attention import WeightedKV
    >>> from approx_attention.coresets import KMeansMerge, compress
    >>> k = jax.random.normal(jax.random.key(0), (32, 2))
    >>> tokens = WeightedKV.of_tokens(k, k)
    >>> small = compress(tokens, jax.random.key(1), coreset_size=4, algorithm=KMeansMerge(steps=2))
    >>> small.k.shape, float(small.mass.sum())
    ((4, 2), 32.0)
"""

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
