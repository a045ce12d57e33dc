"""Error bounds for merged keys, for every query of a ball and for single queries."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from approx_attention.core import (
    LEAST_TILE,
    WeightedKV,
    check_not_negative,
    check_number,
    check_rows,
    in_float32,
    map_rows,
    require_scaled_space,
    root,
    squared_norm,
)
from approx_attention.coresets import Clusters, clusters_around

# Above this an exponential times a value might overflow; a bound is useless long before.
LARGEST_LOGIT = 80.0


class MergeBound(NamedTuple):
    """Merged tokens, and a bound of their error.

    Attributes:
        summary: every key merged into the nearest of the given tokens.
        bound: bound of its error for all queries of the ball, in the units of the values.
    """

    summary: WeightedKV
    bound: Array


@in_float32()
def merge_bound(
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    summary: WeightedKV,
    radius: float | Array,
    *,
    kv_mask: Bool[Array, " S"] | None = None,
) -> MergeBound:
    r"""Merge every key into the nearest token, and bound the error for all queries of bounded norm.

    With the radii of the clusters (`coresets.Clusters`), :math:`a_c = \rho\, \delta_c`, and :math:`\nu` the largest
    distance of the clusters' mean values from their own mean,

    .. math:: \sup_{\|q\| \le \rho} \|\mathrm{attend}(q) - \mathrm{attention}(q)\|_2 \le
              \max_c \min\bigl(2 \tanh(a_c/2)\, \nu_c,\ 2 \sinh(a_c/2)\, \sigma_c,\ \nu_c\bigr)
              + 2 \tanh\bigl(\max_c \ln\cosh(a_c) / 4\bigr)\, \nu,

    and never more than :math:`2 \max_j \|v_j\|_2`. If the log-ratio of two distributions has range w, their total
    variation is at most :math:`\tanh(w/4)`, and means of values differ by at most that times the diameter of the
    values, which is at most twice a radius. Within a cluster the logits relative to the mean key,
    :math:`x_i = q \cdot (k_i - k_c)`, are within :math:`\pm a_c`, so the log-ratio of :math:`m_i e^{x_i}` to
    :math:`m_i` has range :math:`2 a_c`. The second form follows from the Cauchy-Schwarz inequality: the standard
    deviation of :math:`e^{x}` is at most :math:`2 \sinh(a_c/2)` times its mean. Between clusters the weights differ by
    the factors :math:`\mathrm{mean}_c\, e^{x}`, which are at least 1 by Jensen's inequality, since x has mean 0, and at
    most :math:`\cosh(a_c)`.

    The bound applies to the returned merge, not to the given summary, which does not contain the members of its
    clusters. It includes rounding errors in the precision of the tokens (`merge_bound_at`). No such bound is known for
    Nystrom weights or for chosen tokens; for these, `approx_attention.evaluation.sup_error` searches for a lower bound
    of the supremum.

    Args:
        k: keys ``[S, D]`` in scaled space (`fold_scale`).
        v: values ``[S, Dv]``.
        summary: tokens to merge into, such as a coreset, in scaled space; tokens without mass are ignored.
        radius: :math:`\rho`, the largest norm of a query in scaled space.
        kv_mask: true where a key is real ``[S]``.

    Returns:
        The `MergeBound`.

    Raises:
        ValueError: different numbers of keys and values, a summary that carries a scale, a radius below 0.
        TypeError: keys or values that are not floating point.

    Example:
        >>> import jax
        >>> from approx_attention import bounds, summarize_coreset
        >>> k, v = (jax.random.normal(jax.random.key(i), (64, 2)) for i in range(2))
        >>> coreset = summarize_coreset(k, v, jax.random.key(2), coreset_size=32, algorithm="farthest_merge")
        >>> merged, bound = bounds.merge_bound(k, v, coreset, 0.5)
        >>> float(merged.mass.sum()), bool(0 < bound < 1)
        (64.0, True)

    Reference:
        A derivation of this library; the range of the log-normaliser is as in :cite:p:`hoeffding1963probability`.
    """
    check_number("radius", radius)
    check_not_negative("radius", radius)
    clusters = clusters_around(k, v, require_scaled_space("merge_bound", summary), kv_mask=kv_mask)
    tokens = clusters.tokens
    radius = jnp.asarray(radius, tokens.k.dtype)
    middle = jnp.sum(tokens.value_sum, axis=0) / jnp.maximum(jnp.sum(tokens.mass), 1)
    around = jnp.where(tokens.mass > 0, root(squared_norm(tokens.values - middle[None, :]))[:, 0], 0)
    logits = radius * clusters.key_radius
    total = _of_ratios(clusters, logits, _largest(around)) + _rounding(clusters, radius)
    return MergeBound(tokens, jnp.minimum(total, 2 * clusters.largest_value))


@in_float32()
def merge_bound_at(q: Float[Array, "T D"], clusters: Clusters) -> Float[Array, " T"]:
    r"""Bound the error of given queries from the clusters only.

    With the weights :math:`w_c` and the output of attention over the means, :math:`d_c = \|v_c - \mathrm{out}\|` and
    :math:`a_c = \|q\|\, \delta_c`, the bound is the minimum of

    .. math:: \sum_c w_c \bigl(\sinh(a_c)\, \sigma_c + (\cosh(a_c) - 1)\, d_c\bigr), \qquad
              \max_c\, (d_c + \nu_c), \qquad 2 \max_j \|v_j\|,

    and of the bound of `merge_bound` with :math:`\max_c d_c` in place of :math:`\nu`. Proof of the first form: with
    :math:`x_i = q \cdot (k_i - k_c)` and :math:`y_c = \mathrm{mean}_c\, e^x`, and since
    :math:`\sum_c w_c (v_c - \mathrm{out}) = 0`,

    .. math:: \mathrm{attention}(q) - \mathrm{out} = \sum_c w_c \bigl(\mathrm{mean}_c\, (e^x - y_c) (v - v_c)
              + (y_c - 1) (v_c - \mathrm{out})\bigr) \Big/ \sum_c w_c\, y_c .

    Since x has mean 0 and is within :math:`\pm a_c`, we have :math:`1 \le y_c \le \cosh(a_c)`. The variance of
    :math:`e^x` is at most :math:`(e^{a_c} - y_c)(y_c - e^{-a_c}) \le \sinh^2(a_c)`, and the Cauchy-Schwarz inequality
    gives the factor :math:`\sigma_c`. The second form holds because both outputs are averages of values.

    A radius ignores directions: the logits of a typical query vary by about :math:`a_c / \sqrt D`, so the bound exceeds
    the error by a factor of :math:`\sqrt D` or more. It is useful if :math:`a_c` is below 1 for the clusters with
    weight.

    The bound holds for `attend` as computed, also in float32, because it includes

    .. math:: 2 \epsilon \bigl(\max \|v\|\, ((D + 8)\, \|q\| \max \|k\| + 4 \|q\| \max_c m_c \delta_c + 2 M + D + 32)
              + 4 \max_c m_c \nu_c\bigr),

    with :math:`\epsilon` the machine epsilon: the worst case of the rounding of logits, of means, and of sums over
    clusters. It does not cover products that an accelerator computes in less than float32: use ``core.in_float32``.

    Args:
        q: queries ``[T, D]`` in scaled space.
        clusters: for example from `coresets.clusters_around` or `coresets.running_clusters`; merge them with
            ``Clusters.of_tokens`` for tokens that are kept exactly.

    Returns:
        Bounds ``[T]`` of the error of ``attend(q, clusters.tokens)``, in the units of the values.

    Raises:
        ValueError: queries do not have the channels of the keys, or the tokens of the clusters carry a scale.
        TypeError: queries that are not floating point.

    Example:
        >>> import jax
        >>> from approx_attention import bounds, summarize_coreset
        >>> from approx_attention.coresets import clusters_around
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (64, 2)) for i in range(3))
        >>> coreset = summarize_coreset(k, v, jax.random.key(3), coreset_size=32, algorithm="farthest_merge")
        >>> promised = bounds.merge_bound_at(0.2 * q, clusters_around(k, v, coreset))
        >>> promised.shape, bool(promised.max() < 0.5)
        ((64,), True)

    Reference:
        A derivation of this library.
    """
    check_rows("q", q, "[T, D]")
    tokens = require_scaled_space("merge_bound_at", clusters.tokens)
    if q.shape[1] != tokens.k.shape[1]:
        raise ValueError(f"q must have the channels of the keys, D = {tokens.k.shape[1]}, got shape {q.shape}")
    values, present = tokens.values, (tokens.mass > 0)[None, :]

    def of_rows(q: Array) -> Array:
        norm = root(squared_norm(q))[:, 0]
        logits = q @ tokens.k.T + tokens.log_mass[None, :]
        peak = jnp.max(logits, axis=1, keepdims=True)
        log_weight = logits - peak - jnp.log(jnp.sum(jnp.exp(logits - peak), axis=1, keepdims=True))
        out = jnp.exp(log_weight) @ values
        away = jnp.where(present, root(squared_norm(values[None] - out[:, None]))[..., 0], 0)
        a = norm[:, None] * clusters.key_radius[None, :]
        # sinh(a) and cosh(a) - 1 as multiples of e^a, which is combined with the weight to avoid overflow.
        weight = jnp.exp(jnp.minimum(log_weight + a, LARGEST_LOGIT)) / 2
        within = -jnp.expm1(-2 * a) * clusters.value_spread[None, :]
        of_weights = jnp.sum(weight * (within + jnp.expm1(-a) ** 2 * away), axis=1)
        of_hull = _largest(jnp.where(present, away + clusters.value_radius[None, :], 0))
        of_ratios = _of_ratios(clusters, a, _largest(away))
        least = jnp.minimum(jnp.minimum(of_weights, of_hull), of_ratios)
        return jnp.minimum(least + _rounding(clusters, norm), 2 * clusters.largest_value)

    return map_rows(of_rows, q.astype(tokens.k.dtype), max(1, LEAST_TILE // values.size))


def _of_ratios(clusters: Clusters, a: Array, around: Array) -> Array:
    """The bound from log-ratios of at most ``2 a [..., M]`` and mean values within a radius ``around [...]``."""
    value_radius, spread = clusters.value_radius, clusters.value_spread
    # Rows of queries have an axis in front.
    if a.ndim == 2:
        value_radius, spread = value_radius[None, :], spread[None, :]
    half = jnp.minimum(a, LARGEST_LOGIT) / 2
    within = jnp.minimum(2 * jnp.tanh(half) * value_radius, 2 * jnp.sinh(half) * spread)
    log_cosh = a + jnp.log1p(jnp.exp(-2 * a)) - math.log(2)
    between = 2 * jnp.tanh(_largest(log_cosh) / 4) * around
    return _largest(jnp.minimum(within, value_radius)) + between


def _largest(x: Array) -> Array:
    """The maximum over the last axis."""
    # The derivative of `jnp.max` compares the maximum with operands that a compiler may recompute with other rounding.
    # Then none is equal, and the derivative is NaN. `lax.top_k` returns the index instead.
    return lax.top_k(x, 1)[0][..., 0]


def _rounding(clusters: Clusters, norm: Array) -> Array:
    """Bound the rounding error of an output over the means, for queries with these norms."""
    tokens, largest = clusters.tokens, clusters.largest_value
    (num_clusters, head_dim), dtype = tokens.k.shape, tokens.k.dtype
    largest_key = jnp.max(root(squared_norm(tokens.k))[:, 0] + clusters.key_radius)
    keys, values = (jnp.max(tokens.mass * x) for x in (clusters.key_radius, clusters.value_radius))
    units = (head_dim + 8) * norm * largest_key + 4 * norm * keys + 2 * num_clusters + head_dim + 32
    return 2 * jnp.finfo(dtype).eps * (units * largest + 4 * values)
