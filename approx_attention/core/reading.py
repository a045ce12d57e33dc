"""Attention of queries over summaries: tokens with masses of any sign, and feature moments."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from approx_attention import kernels
from approx_attention.core.checks import accumulation_dtype, check_rows, checked_soft_cap
from approx_attention.core.features import PositiveFeatures, squared_norm
from approx_attention.core.quantized import QuantizedKV, Summary, rotated, rotated_back
from approx_attention.core.summaries import (
    FEATURE_BLOCK,
    ChosenTokens,
    FeatureMoments,
    WeightedKV,
    feature_block,
    scaled_queries,
)
from approx_attention.kernels import HIDDEN, AttentionState, by_platform, finite_peak, map_rows, normalise, soft_capped


def attend(q: Float[Array, "T D"], summary: Summary, *, logits_soft_cap: float | None = None) -> AttentionState:
    r"""Compute attention over a summary.

    .. math:: \mathrm{out}(q) = \frac{\sum_r \phi_r(q)\, \mathrm{value\_sum}_r}{\sum_r \phi_r(q)\, \mathrm{mass}_r},
              \qquad \mathrm{lse}(q) = \log \sum_r \phi_r(q)\, \mathrm{mass}_r.

    Args:
        q: queries ``[T, D]`` in the space of the summary: scaled by `fold_scale` for functions ``summarize_*``, which
            take scaled keys; unscaled if the summary carries its scale, like that of `compress_tokens`.
        summary: a `WeightedKV`, `QuantizedKV` or `FeatureMoments`, or tokens from which each query chooses
            (`sparse.LiftedKV`).
        logits_soft_cap: cap of the logits as in `kernels.state`; only for tokens without signed masses.

    Returns:
        The `AttentionState` of the queries. Signed masses and features can give normalisers that are not positive.
        There the state is empty, ``out = 0`` and ``lse = -inf``, and has no effect on a merge.

    Raises:
        TypeError: ``summary`` is none of these types, or queries are not floating point.
        ValueError: queries do not have the channels of the keys, or the summary does not support capped logits.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import WeightedKV, attend
        >>> k, v = jnp.zeros((3, 2)), jnp.array([[1.0], [2.0], [6.0]])
        >>> state = attend(jnp.ones((1, 2)), WeightedKV.of_tokens(k, v))
        >>> float(state.out[0, 0]), round(float(jnp.exp(state.lse[0])), 5)
        (3.0, 3.0)
    """
    if not isinstance(summary, WeightedKV | QuantizedKV | FeatureMoments | ChosenTokens):
        raise TypeError(
            f"attend needs a WeightedKV, QuantizedKV, LiftedKV or FeatureMoments, got {type(summary).__name__}"
        )
    check_rows("q", q, "[T, D]")
    head_dim = _head_dim(summary)
    if head_dim is not None and q.shape[1] != head_dim:
        raise ValueError(f"q must have the channels of the keys of the summary, D = {head_dim}, got shape {q.shape}")
    logits_soft_cap = checked_soft_cap(logits_soft_cap)
    if logits_soft_cap is not None and (
        isinstance(summary, FeatureMoments | ChosenTokens) or summary.value_range is not None
    ):
        raise ValueError("logits_soft_cap is only supported for tokens without signed masses")
    q = scaled_queries(q.astype(accumulation_dtype(q)), summary)
    if isinstance(summary, ChosenTokens):
        return summary.state(q)
    if isinstance(summary, FeatureMoments):
        if isinstance(summary.features, PositiveFeatures):
            return by_platform(q, summary, cpu=_attend_moments, default=_attend_positive_moments)
        return _attend_moments(q, summary)
    signed = summary.value_range is not None
    if isinstance(summary, QuantizedKV):
        # Rotate queries and outputs, which are few, instead of tokens.
        seed = summary.k.seed
        state = _attend_tokens(rotated(q, seed), summary.in_rotated_space(), logits_soft_cap, signed=signed)
        state = AttentionState(rotated_back(state.out, seed), state.lse)
    else:
        state = _attend_tokens(q, summary, logits_soft_cap, signed=signed)
    return state if summary.value_range is None else _clipped(state, summary.value_range)


def _head_dim(summary: Summary) -> int | None:
    """The number of channels of queries, if the tokens or the projection of a feature map determine it."""
    if isinstance(summary, FeatureMoments):
        rows = getattr(summary.features, "projection", None)
    else:
        rows = summary.k.centre if isinstance(summary, QuantizedKV) else summary.k
    return None if rows is None else rows.shape[-1]


def _attend_tokens(q: Array, tokens: WeightedKV, logits_soft_cap: float | None, *, signed: bool) -> AttentionState:
    """Attention over tokens with masses, without the clipping for signed masses."""
    if signed:
        return map_rows(jax.checkpoint(lambda q: _attend_signed_tokens(q, tokens)), q, FEATURE_BLOCK)
    # Weights have T M entries and keys M D: with fewer queries than channels, change the weights only.
    if q.shape[0] < tokens.k.shape[1]:
        return _attend_few(q, tokens, logits_soft_cap)
    return kernels.state(q, tokens.k, tokens.values, tokens.log_mass, logits_soft_cap=logits_soft_cap)


def _attend_few(q: Array, tokens: WeightedKV, logits_soft_cap: float | None) -> AttentionState:
    """Attention for fewer queries than channels, as in decoding, without a copy of keys and values.

    Weights are smaller than keys and values, so hiding absent keys and dividing by masses is done in the weights.
    """
    absent = tokens.mass == 0
    logits = _products(q, tokens.k, ~absent)
    if logits_soft_cap is not None:
        logits = jnp.where(absent[None, :], -jnp.inf, soft_capped(logits, logits_soft_cap))
    logits = logits + tokens.log_mass[None, :]
    peak = finite_peak(jnp.max(logits, axis=-1))
    weights = jnp.exp(logits - peak[:, None])
    shares = weights / jnp.where(absent, 1, tokens.mass)[None, :]
    return normalise(shares @ tokens.value_sum, jnp.sum(weights, axis=-1), peak)


@jax.custom_jvp
def _products(q: Array, k: Array, present: Array) -> Array:
    """Logits ``q k^T``, minus infinity for absent keys, which may be NaN."""
    return jnp.where(present[None, :], q @ k.T, -jnp.inf)


@_products.defjvp
def _products_jvp(primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Any]) -> tuple[Array, Array]:
    # Derivatives with respect to queries are products with keys, where an absent key of NaN would give 0 times NaN.
    # Only here are absent keys set to 0, which copies all keys; without derivatives, as in decoding, nothing is copied.
    (q, k, present), (q_tangent, k_tangent, _) = primals, tangents
    cleared = jnp.where(present[:, None], k, jnp.zeros_like(k))
    tangent = q_tangent @ cleared.T + q @ k_tangent.T
    return _products(q, k, present), jnp.where(present[None, :], tangent, jnp.zeros_like(tangent))


def _attend_moments(q: Array, moments: FeatureMoments) -> AttentionState:
    """Attention over moments of any features, relative to each query's largest log-scale, by blocks of queries."""

    def of_block(q: Array) -> AttentionState:
        values, log_scale = moments.features(q)
        log_scale = log_scale + moments.log_scale[None, :]
        peak = finite_peak(jnp.max(log_scale, axis=-1))
        weights = values * jnp.exp(log_scale - peak[:, None])
        return normalise(weights @ moments.value_sum, weights @ moments.mass, peak)

    block = feature_block(moments.features)
    return of_block(q) if q.shape[0] <= block else map_rows(jax.checkpoint(of_block), q, block)


def _attend_positive_moments(q: Array, moments: FeatureMoments) -> AttentionState:
    r"""Attention over moments of positive features as softmax attention with the directions w as keys.

    .. math:: \phi_r(q)\, e^{c_r}\, \mathrm{mass}_r
              = e^{w_r \cdot q + b_r + c_r + \log \mathrm{mass}_r - \|q\|^2 / 2} R^{-1/2}
    """
    assert isinstance(moments.features, PositiveFeatures)
    absent = (moments.mass == 0) | (moments.log_scale == -jnp.inf)
    mass = jnp.where(absent, 1, moments.mass)
    of_direction = 0 if moments.features.log_weight is None else moments.features.log_weight.astype(q.dtype)
    bias = jnp.where(absent, HIDDEN, jnp.where(absent, 0, moments.log_scale) + jnp.log(mass) + of_direction)
    state = kernels.state(q, moments.features.projection.astype(q.dtype), moments.value_sum / mass[:, None], bias)
    of_query = squared_norm(q)[:, 0] / 2 + 0.5 * math.log(moments.features.num_features)
    return AttentionState(state.out, state.lse - of_query)


def _attend_signed_tokens(q: Array, summary: WeightedKV) -> AttentionState:
    """Attention over tokens with signed masses, by sums instead of logarithms."""
    logits = _products(q, summary.k, summary.present)
    peak = finite_peak(jnp.max(logits, axis=-1))
    weights = jnp.exp(logits - peak[:, None])
    return normalise(weights @ summary.value_sum, weights @ summary.mass, peak)


def _clipped(state: AttentionState, value_range: Array) -> AttentionState:
    """Clip outputs to the range of the values, which a quotient of signed sums can leave by far."""
    low, high = value_range[:, None, :]
    has_answer = jnp.isfinite(state.lse)[:, None]
    return AttentionState(jnp.where(has_answer, jnp.clip(state.out, low, high), state.out), state.lse)
