r"""Constructions in closed form: factors of logits that separate the nonzeros of a pattern from its zeros.

Logits are :math:`\tau L^{(1)} + L^{(2)}`: the first part separates the keys of a row from the others, and the second
sets their weights.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from approx_attention.realization.bottleneck import nearest_factors, row_centred
from approx_attention.realization.certification import ROW_BLOCK, off_rows
from approx_attention.sparse import SparsePattern


class Factors(NamedTuple):
    r"""Factors of the logits :math:`(\tau\, \mathrm{separating} + \mathrm{weighting})\, \mathrm{keys}^T`.

    Attributes:
        separating: queries ``[T, d]`` that separate the keys of a row from the others.
        weighting: queries ``[T, d]`` that set the weights of these keys.
        keys: ``[T, d]``.
    """

    separating: Array
    weighting: Array
    keys: Array


class Sampling(NamedTuple):
    """Randomness, size and options of a construction.

    Attributes:
        key: typed PRNG key of this sample.
        used: mask of the used channels of the arrays ``[width]``, a prefix.
        is_causal: key j is visible to query i only if j <= i.
        num_steps: gradient steps.
        lift: the logit of nonzeros for which ``"balanced"`` splits the spectrum.
        dtype: float32 or float64.
    """

    key: Array
    used: Array
    is_causal: bool
    num_steps: int
    lift: Array
    dtype: Any


def random_keys(sampling: Sampling, num_tokens: int, *, orthogonal: bool) -> Array:
    """Random keys with mean square norm 1.

    Args:
        sampling: the PRNG key and the used channels; the sample of fewer channels is a prefix.
        num_tokens: the number T of keys.
        orthogonal: whether columns are orthogonal in blocks of T, else Gaussian.

    Returns:
        Keys ``[T, d]``, 0 in channels that are not used.
    """
    width = sampling.used.shape[0]

    # One PRNG key per channel: the sample of fewer channels is a prefix, so that a search compares equal samples.
    @jax.vmap
    def column(number: Array) -> Array:
        return jax.random.normal(jax.random.fold_in(sampling.key, number), (num_tokens,), sampling.dtype)

    keys = column(jnp.arange(width, dtype=jnp.int32)).T
    if orthogonal:
        # At most T columns with T entries are orthogonal; further channels start a new block.
        blocks = [keys[:, start : start + num_tokens] for start in range(0, width, num_tokens)]
        keys = jnp.concatenate([_signed_orthonormal(block) for block in blocks], axis=1) * math.sqrt(num_tokens)
    return jnp.where(sampling.used[None, :], keys, 0) / jnp.sqrt(jnp.sum(sampling.used).astype(sampling.dtype))


def _signed_orthonormal(columns: Array) -> Array:
    """Orthonormal columns that span each prefix of the given ones."""
    # The signs of the triangle's diagonal make the columns uniformly distributed, and fewer columns a prefix.
    rotation, triangle = jnp.linalg.qr(columns)
    return rotation * jnp.sign(jnp.diagonal(triangle))[None, :]


def project(pattern: SparsePattern, log_weights: Array, sampling: Sampling, *, orthogonal: bool) -> Factors:
    r"""Random projection: queries are sums of a row's keys, :math:`B_{is} = \tau + \log A_{is} - \min_S \log A_i`."""
    # B is 0 on zeros instead of minus infinity: softmax is invariant to a constant, and the error grows with the norm
    # of B.
    keys = random_keys(sampling, pattern.num_queries, orthogonal=orthogonal)

    def row(args: tuple[Array, Array, Array]) -> Array:
        indices, valid, log_weights = args
        return _on_support(valid, log_weights) @ keys[indices]

    both = lax.map(row, (pattern.indices, pattern.valid, log_weights), batch_size=ROW_BLOCK)
    return Factors(both[:, 0], both[:, 1], keys)


def _on_support(valid: Array, log_weights: Array) -> Array:
    """The two parts of a row of B on its support ``[2, K]``: ones, and logarithms minus the smallest of them."""
    least = jnp.min(jnp.where(valid, log_weights, jnp.inf))
    return jnp.stack([valid.astype(log_weights.dtype), jnp.where(valid, log_weights - least, 0)])


def project_balanced(pattern: SparsePattern, log_weights: Array, sampling: Sampling) -> Factors:
    r"""Random projection with the spectrum of B split between queries and keys, which reduces their norms.

    .. math:: B = U \Sigma V^T, \qquad X_1 = U \Sigma^{1/2} G^T / \sqrt d, \qquad X_2 = V \Sigma^{1/2} G^T / \sqrt d.
    """
    # The singular values need B as a T x T matrix, for one tau.
    parts = jax.vmap(_on_support)(pattern.valid, log_weights)
    entries = sampling.lift * parts[:, 0] + parts[:, 1]
    rows = jnp.arange(pattern.num_queries, dtype=jnp.int32)[:, None]
    lifted = jnp.zeros((pattern.num_queries,) * 2, entries.dtype).at[rows, pattern.indices].add(entries)
    left, right = nearest_factors(lifted, pattern.num_queries)
    keys = random_keys(sampling, pattern.num_queries, orthogonal=False)
    # Divided by tau, because the caller multiplies by it: for equal weights B is proportional to it.
    queries = left @ keys / sampling.lift
    return Factors(queries, jnp.zeros_like(queries), right @ keys)


def interpolate(pattern: SparsePattern, log_weights: Array, sampling: Sampling, *, orthogonal: bool) -> Factors:
    r"""Least squares: the shortest queries with given logits on the support, :math:`x_i = K_S^T (K_S K_S^T)^{-1} b_i`.

    If keys have orthogonal columns, :math:`\|x\|^2` is proportional to the energy of all logits, so the shortest query
    has the least energy off the support. This equals weighted least squares (``"wls"``) with Gaussian keys and the
    metric :math:`K^T K`, without the solve.
    """
    keys = random_keys(sampling, pattern.num_queries, orthogonal=orthogonal)
    return Factors(*interpolating_queries(keys, pattern, log_weights), keys)


def interpolating_queries(keys: Array, pattern: SparsePattern, log_weights: Array) -> tuple[Array, Array]:
    """The shortest queries with given logits on the support of each row.

    Args:
        keys: ``[T, d]``.
        pattern: the pattern of the supports.
        log_weights: logarithms of the weights ``[T, K]``.

    Returns:
        Queries ``[T, d]`` with logits 1 on the support, and queries ``[T, d]`` whose logits there are the log-weights
        minus their mean.
    """

    def row(args: tuple[Array, Array, Array]) -> Array:
        indices, valid, log_weights = args
        count = jnp.sum(valid, dtype=log_weights.dtype)
        # Centred: softmax is invariant to the mean, and the shortest target gives the shortest query.
        mean = jnp.sum(jnp.where(valid, log_weights, 0)) / count
        wanted = jnp.stack([valid.astype(log_weights.dtype), jnp.where(valid, log_weights - mean, 0)])
        return wanted @ support_inverse(keys, indices, valid).T

    both = lax.map(row, (pattern.indices, pattern.valid, log_weights), batch_size=ROW_BLOCK)
    return both[:, 0], both[:, 1]


def support_inverse(keys: Array, indices: Array, valid: Array, ridge: float = 0.0) -> Array:
    """The pseudoinverse of the keys of one row.

    Args:
        keys: ``[T, d]``.
        indices: the keys of the row ``[K]``.
        valid: false on padding ``[K]``.
        ridge: added to the diagonal of the Gram matrix; only for training.

    Returns:
        The matrix ``[d, K]``, with zeros on padding.
    """
    # Padding has rows of 0 with 1 on the diagonal, so that the matrix stays regular; a ridge is only for training.
    on = jnp.where(valid[:, None], keys[indices], 0)
    gram = on @ on.T + jnp.diag(jnp.where(valid, jnp.asarray(ridge, keys.dtype), 1))
    return jnp.linalg.solve(gram, on).T


def off_support(pattern: SparsePattern, is_causal: bool) -> Array:
    """The mask of visible keys outside the support of each query ``[T, S]``."""
    rows = jnp.arange(pattern.num_queries, dtype=jnp.int32)
    return off_rows(rows, pattern.indices, pattern.valid, pattern.num_keys, is_causal)


def on_moment_curve(pattern: SparsePattern, log_weights: Array, sampling: Sampling) -> Factors:
    r"""Trigonometric moment curve: keys :math:`(\cos m t_j, \sin m t_j)_{m \le K}` at :math:`t_j = 2 \pi j / T`.

    Queries are the coefficients of trigonometric polynomials of degree K.
    The logits :math:`-\prod_{s \in S} (1 - \cos(t - t_s))`, minus their mean over t, are largest exactly on S.
    """
    num_tokens, degree = pattern.num_queries, pattern.keys_per_row
    harmonics = np.arange(1, degree + 1)

    def curve(angles: np.ndarray) -> np.ndarray:
        turns = angles[:, None] * harmonics[None, :]
        return np.concatenate([np.cos(turns), np.sin(turns)], axis=1)

    angles = 2 * np.pi * np.arange(num_tokens) / num_tokens
    # A trigonometric polynomial of degree K is determined by 2 K + 1 equidistant values; its coefficients are sums of
    # them.
    nodes = 2 * np.pi * np.arange(2 * degree + 1) / (2 * degree + 1)
    at_nodes, unused = curve(nodes), ((0, 0), (0, sampling.used.shape[0] - 2 * degree))
    keys = jnp.asarray(np.pad(curve(angles), unused), sampling.dtype)
    # 1 - cos x as 2 sin^2(x/2): the difference would lose the smallest gaps, of order 1 / T^2.
    falls = jnp.asarray(2 * np.sin((nodes[None, :] - angles[:, None]) / 2) ** 2, sampling.dtype)

    def row(indices: Array, valid: Array) -> Array:
        return jnp.prod(jnp.where(valid[:, None], falls[indices], 1), axis=0)

    products = jax.vmap(row)(pattern.indices, pattern.valid)
    coefficients = products @ jnp.asarray(-2 / len(nodes) * at_nodes, sampling.dtype)
    _, weighting = interpolating_queries(keys, pattern, log_weights)
    return Factors(jnp.pad(coefficients, unused), weighting, keys)


def factor_dense(pattern: SparsePattern, log_weights: Array, sampling: Sampling) -> Factors:
    """The logits of rank d nearest to the centred logarithms; without zeros there is nothing to separate."""
    queries, keys = nearest_factors(row_centred(log_weights), sampling.used.shape[0])
    return Factors(jnp.zeros_like(queries), queries, keys)
