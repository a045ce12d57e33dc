"""Bounds for merged keys: the error for every query of a ball, and that of one query."""

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

# Above this an exponential times a value might not be finite; a bound is useless long before.
LARGEST_LOGIT = 80.0


class MergeBound(NamedTuple):
    """Merged tokens, and a bound on their error.

    Attributes:
        summary: every key merged into the nearest of the given tokens.
        bound: bound on its error for all queries of the ball, in the units of the values.
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
    r"""Merges every key into the nearest of some tokens, with a bound on the error for all queries of bounded norm.

    With the radii of the clusters (`coresets.Clusters`), :math:`a_c = \rho\, \delta_c`, and the means of the values of
    the clusters within :math:`\nu` of their own mean,

    .. math:: \sup_{\|q\| \le \rho} \|\mathrm{attend}(q) - \mathrm{attention}(q)\|_2 \le
              \max_c \min\bigl(2 \tanh(a_c/2)\, \nu_c,\ 2 \sinh(a_c/2)\, \sigma_c,\ \nu_c\bigr)
              + 2 \tanh\bigl(\max_c \ln\cosh(a_c) / 4\bigr)\, \nu,

    and never above :math:`2 \max_j \|v_j\|_2`. Two distributions whose log-ratio has a range of w differ by
    :math:`\tanh(w/4)` in total variation, so that means of values under them differ by that times the diameter of the
    values, which is at most twice a radius. Within a cluster the logits less that of the mean key,
    :math:`x_i = q \cdot (k_i - k_c)`, are within :math:`\pm a_c`: the log-ratio of :math:`m_i e^{x_i}` to :math:`m_i`
    has a range of :math:`2 a_c`. (The second form is that of Cauchy and Schwarz: :math:`e^{x}` has a standard deviation
    of at most :math:`2 \sinh(a_c/2)` times its mean.) Between clusters the weights differ by the factors
    :math:`\mathrm{mean}_c\, e^{x}`, which are at least 1 by Jensen, as x has mean 0, and at most :math:`\cosh(a_c)`.

    The bound is that of the returned merge, not of the given summary: a summary has the means of its clusters, but not
    their members. It includes what rounding in the precision of the tokens can cost (`merge_bound_at`). No bound of
    this kind is known for Nystrom weights or for chosen tokens: measure those with
    `approx_attention.evaluation.sup_error`, whose search gives a lower bound of the supremum.

    Args:
        k: keys ``[S, D]`` in scaled space (`fold_scale`).
        v: values ``[S, Dv]``.
        summary: tokens to merge into, such as a coreset, in scaled space; tokens without mass are ignored.
        radius: :math:`\rho`, the largest norm of a query in scaled space.
        kv_mask: true where a key is real ``[S]``.

    Returns:
        The `MergeBound`.

    Raises:
        ValueError: keys and values that are not of the same tokens, a summary that carries a scale, a radius below 0.
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
    r"""Bounds the error of these very queries, from the clusters alone.

    With the weights :math:`w_c` and the output of attention over the means, :math:`d_c = \|v_c - \mathrm{out}\|` and
    :math:`a_c = \|q\|\, \delta_c`, it is the least of

    .. math:: \sum_c w_c \bigl(\sinh(a_c)\, \sigma_c + (\cosh(a_c) - 1)\, d_c\bigr), \qquad
              \max_c\, (d_c + \nu_c), \qquad 2 \max_j \|v_j\|,

    and of the form of `merge_bound` with :math:`\max_c d_c` in place of :math:`\nu`. Proof of the first: with
    :math:`x_i = q \cdot (k_i - k_c)` and :math:`y_c = \mathrm{mean}_c\, e^x`, and because
    :math:`\sum_c w_c (v_c - \mathrm{out}) = 0`,

    .. math:: \mathrm{attention}(q) - \mathrm{out} = \sum_c w_c \bigl(\mathrm{mean}_c\, (e^x - y_c) (v - v_c)
              + (y_c - 1) (v_c - \mathrm{out})\bigr) \Big/ \sum_c w_c\, y_c .

    As x has mean 0 and is within :math:`\pm a_c`, :math:`1 \le y_c \le \cosh(a_c)`, and the variance of
    :math:`e^x`, at most :math:`(e^{a_c} - y_c)(y_c - e^{-a_c})`, is at most :math:`\sinh^2(a_c)`; Cauchy and Schwarz
    give the factor :math:`\sigma_c`. The second form holds because both outputs are averages of values.

    A radius says nothing of directions: a query that is no member's direction has logits that vary by about
    :math:`a_c / \sqrt D`, and the bound is larger than the error by such a factor and more. It is of use where
    :math:`a_c` is below 1 for the clusters that have weight.

    The bound holds for `attend` as computed, in float32 too: it includes

    .. math:: 2 \epsilon \bigl(\max \|v\|\, ((D + 8)\, \|q\| \max \|k\| + 4 \|q\| \max_c m_c \delta_c + 2 M + D + 32)
              + 4 \max_c m_c \nu_c\bigr),

    with :math:`\epsilon` the distance from 1 to the next number: the worst case of the rounding of logits, of means,
    and of sums over clusters. Products that an accelerator rounds to less than float32 are not covered: ask within
    ``core.in_float32``.

    Args:
        q: queries ``[T, D]`` in scaled space.
        clusters: such as `coresets.clusters_around` or `coresets.running_clusters` gives; merged with
            ``Clusters.of_tokens`` of those that are kept as they are.

    Returns:
        Bounds ``[T]`` in the units of the values, of the error of ``attend(q, clusters.tokens)``.

    Raises:
        ValueError: queries that are not rows of as many channels as the keys, clusters whose tokens carry a scale.
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
        # sinh(a) and cosh(a) - 1 as multiples of e^a, which joins the weight: neither overflows by itself.
        weight = jnp.exp(jnp.minimum(log_weight + a, LARGEST_LOGIT)) / 2
        within = -jnp.expm1(-2 * a) * clusters.value_spread[None, :]
        of_weights = jnp.sum(weight * (within + jnp.expm1(-a) ** 2 * away), axis=1)
        of_hull = _largest(jnp.where(present, away + clusters.value_radius[None, :], 0))
        of_ratios = _of_ratios(clusters, a, _largest(away))
        least = jnp.minimum(jnp.minimum(of_weights, of_hull), of_ratios)
        return jnp.minimum(least + _rounding(clusters, norm), 2 * clusters.largest_value)

    return map_rows(of_rows, q.astype(tokens.k.dtype), max(1, LEAST_TILE // values.size))


def _of_ratios(clusters: Clusters, a: Array, around: Array) -> Array:
    """The bound from log-ratios of at most ``2 a [..., M]``, where the means of values are within ``around [...]``."""
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
    # The derivative of `jnp.max` compares the maximum with operands that a compiler may compute again, rounded
    # otherwise: none is equal then, and it is NaN. `lax.top_k` has the place.
    return lax.top_k(x, 1)[0][..., 0]


def _rounding(clusters: Clusters, norm: Array) -> Array:
    """What rounding can change of an output over the means, for queries of these norms."""
    tokens, largest = clusters.tokens, clusters.largest_value
    (num_clusters, head_dim), dtype = tokens.k.shape, tokens.k.dtype
    largest_key = jnp.max(root(squared_norm(tokens.k))[:, 0] + clusters.key_radius)
    keys, values = (jnp.max(tokens.mass * x) for x in (clusters.key_radius, clusters.value_radius))
    units = (head_dim + 8) * norm * largest_key + 4 * norm * keys + 2 * num_clusters + head_dim + 32
    return 2 * jnp.finfo(dtype).eps * (units * largest + 4 * values)
