r"""Certificates of the precision with which self-attention has a sparse pattern, computed from its logits."""

import functools
import math
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jaxtyping import Float

from approx_attention.core import accumulation_dtype, check_choice, check_floating, in_blocks, in_float32, known_number
from approx_attention.sparse import SparsePattern, check_pattern

RatioError = Literal["relative", "absolute"]
# Rows of logits computed at once: 256 T numbers instead of T^2, and still efficient matrix products.
ROW_BLOCK = 256


class Certificate(NamedTuple):
    r"""Precision with which attention M of logits L has a pattern A with supports :math:`S_i`.

    Attributes:
        log_eps1: :math:`\log \varepsilon_1`, the logarithm of the largest ratio of a zero to a nonzero of its row,
            :math:`\max_i (\max_{j \notin S_i} L_{ij} - \min_{s \in S_i} L_{is})`; ``-inf`` without zeros.
        log1p_eps2: :math:`\log(1 + \varepsilon_2)` for the largest error of the ratio of two nonzeros:
            :math:`\max_i (\max_{S_i} - \min_{S_i})(L_{is} - \log A_{is})` for relative errors, and
            :math:`\log(1 + \max |M_{is} / M_{is'} - A_{is} / A_{is'}|)` for absolute errors.
        logit_absmax: the largest :math:`|L_{ij}|` of all pairs, including those hidden from a causal head: the
            ``max_logit`` of `approx_attention.dimension_bound`.
        rho: the gap :math:`-\log \varepsilon_1` in units of the largest visible logit, independent of the scale.
        max_row_tv: the largest total variation distance between a row of M and that of A.
        ok: whether the requested precisions are met.
        draws: the number of samples.
        visible_logit_absmax: the largest :math:`|L_{ij}|` of visible pairs; equal to ``logit_absmax`` without
            causality.
    """

    log_eps1: Array
    log1p_eps2: Array
    logit_absmax: Array
    rho: Array
    max_row_tv: Array
    ok: Array
    draws: Array
    visible_logit_absmax: Array

    def logits_needed(self, eps1: float) -> Array:
        r"""Compute the largest visible logit after scaling the logits so that zeros reach the precision ``eps1``.

        .. math:: \log(1 / \epsilon_1) / \rho

        Args:
            eps1: largest ratio of a zero to a nonzero of its row, in (0, 1).

        Returns:
            One number. It is infinite if a zero is at least as large as a nonzero of its row, at any scale.

        Raises:
            TypeError: an ``eps1`` that is not one number, or is traced.
            ValueError: an ``eps1`` outside (0, 1).

        Example:
            >>> import math
            >>> import jax.numpy as jnp
            >>> from approx_attention import SparsePattern, certify
            >>> certificate = certify(jnp.eye(4), 8 * jnp.eye(4), jnp.eye(4), SparsePattern.banded(4, [0]))
            >>> float(certificate.logits_needed(math.exp(-6)))  # rho = 1
            6.0
        """
        precision = known_number("eps1", eps1)
        if not 0 < precision < 1:
            raise ValueError(f"eps1 must lie in (0, 1), got {eps1}")
        return jnp.where(self.rho > 0, math.log(1 / precision) / self.rho, jnp.inf)


def certify(
    inputs: Float[Array, "T C"],
    w_q: Float[Array, "C d"],
    w_k: Float[Array, "C d"],
    pattern: SparsePattern,
    *,
    is_causal: bool = False,
    eps1: Any = 1.0,
    eps2: Any = math.inf,
    ratio: RatioError = "relative",
) -> Certificate:
    r"""Measure the precision with which self-attention of given inputs has a sparse pattern.

    This is about sparse patterns only; bounds of errors of approximate attention are in `approx_attention.bounds`. All
    numbers are computed from the logits :math:`L = X W_Q W_K^T X^T / \sqrt d`, because their exponentials may
    underflow. By blocks of rows this takes O(T^2 d) time, O(T K^2) more for absolute errors of ratios, and O(T) memory.
    Products of arrays of low precision are computed in float32.

    Args:
        inputs: tokens X ``[T, C]``.
        w_q: projection of queries ``[C, d]``.
        w_k: projection of keys ``[C, d]``.
        pattern: the target pattern.
        is_causal: key j is visible to query i only if j <= i.
        eps1: largest ratio of a zero to a nonzero of its row for which ``ok`` is true.
        eps2: largest error of a ratio of nonzeros for which ``ok`` is true.
        ratio: whether errors of ratios are ``"relative"`` or ``"absolute"``.

    Returns:
        The `Certificate`, with ``draws = 0``.

    Raises:
        ValueError: shapes that do not match, a pattern with keys in the future of a causal head.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention import SparsePattern, certify
        >>> identity = SparsePattern.banded(4, [0])
        >>> certificate = certify(jnp.eye(4), 8 * jnp.eye(4), jnp.eye(4), identity)
        >>> float(certificate.log_eps1), float(certificate.rho)
        (-4.0, 1.0)

    Reference:
        :cite:p:`likhosherstov2021expressive`, for the two precisions; the computation is this library's.
    """
    for name, x in (("inputs", inputs), ("w_q", w_q), ("w_k", w_k)):
        check_floating(name, x)
    check_choice("ratio", ratio, get_args(RatioError))
    check_square(pattern)
    if inputs.ndim != 2 or inputs.shape[0] != pattern.num_queries:
        raise ValueError(f"inputs must be [T, C] with T = {pattern.num_queries}, got shape {inputs.shape}")
    if w_q.shape != w_k.shape or w_q.ndim != 2 or w_q.shape[0] != inputs.shape[1]:
        raise ValueError(f"w_q and w_k must be [C, d] with C = {inputs.shape[1]}, got {w_q.shape} and {w_k.shape}")
    if is_causal and not isinstance(pattern.indices, Tracer):
        check_no_future(pattern)
    return _measure(inputs, w_q, w_k, pattern, (eps1, eps2), is_causal=is_causal, ratio=ratio)


@functools.partial(jax.jit, static_argnames=("is_causal", "ratio"))
@in_float32()  # TF32 would lose the digits that are certified
def _measure(
    inputs: Array,
    w_q: Array,
    w_k: Array,
    pattern: SparsePattern,
    limits: tuple[Any, Any],
    *,
    is_causal: bool,
    ratio: RatioError,
) -> Certificate:
    dtype = accumulation_dtype(inputs, w_q, w_k)
    inputs, w_q, w_k = (x.astype(dtype) for x in (inputs, w_q, w_k))
    q, k = inputs @ w_q / math.sqrt(w_q.shape[1]), inputs @ w_k

    def block(args: tuple[Array, ...]) -> tuple[Array, ...]:
        rows, q, indices, valid, log_weights = args
        logits = q @ k.T
        off = off_rows(rows, indices, valid, pattern.num_keys, is_causal)
        on = jnp.take_along_axis(logits, indices, axis=1)
        greatest_off = jnp.max(jnp.where(off, logits, -jnp.inf), axis=1)
        least_on = jnp.min(jnp.where(valid, on, jnp.inf), axis=1)
        error = on - log_weights
        # The error of the ratio of two nonzeros is the difference of their errors, at most the spread.
        spread = jnp.max(jnp.where(valid, error, -jnp.inf), axis=1) - jnp.min(jnp.where(valid, error, jnp.inf), axis=1)
        if ratio == "absolute":
            spread = jnp.log1p(_absolute_ratio_error(error, log_weights, valid))
        visible = jnp.where(off, jnp.abs(logits), 0), jnp.where(valid, jnp.abs(on), 0)
        visible_size = jnp.maximum(*(jnp.max(x, axis=1) for x in visible))
        size = jnp.max(jnp.abs(logits), axis=1)
        # Rows are normalised by their maximum, so that the total variation does not overflow.
        peak = jnp.maximum(greatest_off, jnp.max(jnp.where(valid, on, -jnp.inf), axis=1))[:, None]
        mass = jnp.sum(jnp.where(off, jnp.exp(logits - peak), 0), axis=1)
        weights = jnp.where(valid, jnp.exp(on - peak), 0)
        realized = weights / (mass + jnp.sum(weights, axis=1))[:, None]
        # Both rows sum to 1, so the total variation is the summed excess of A on its support, without a sum over zeros.
        missing = jnp.where(valid, jnp.maximum(jnp.exp(log_weights) - realized, 0), 0)
        worst = greatest_off - least_on, spread, size, visible_size, jnp.sum(missing, axis=1)
        return tuple(jnp.max(x) for x in worst)

    log_weights = pattern.normalized_log_weights(dtype)
    rows = jnp.arange(pattern.num_queries, dtype=jnp.int32)
    arrays = rows, q, pattern.indices, pattern.valid, log_weights
    blocks = lax.map(block, tuple(in_blocks(x, min(ROW_BLOCK, pattern.num_queries)) for x in arrays))
    log_eps1, log1p_eps2, size, visible, distance = (jnp.max(x) for x in blocks)
    # A double where: if all logits are 0, the gap is infinite without zeros in the pattern, and else 0.
    in_units = -log_eps1 / jnp.where(visible > 0, visible, 1)
    rho = jnp.where(visible > 0, in_units, jnp.where(log_eps1 == -jnp.inf, jnp.inf, 0))
    eps1, eps2 = (jnp.asarray(limit, dtype) for limit in limits)
    ok = (log_eps1 <= jnp.log(eps1)) & (log1p_eps2 <= jnp.log1p(eps2))
    return Certificate(log_eps1, log1p_eps2, size, rho, distance, ok, jnp.zeros((), jnp.int32), visible)


def _absolute_ratio_error(error: Array, log_weights: Array, valid: Array) -> Array:
    r"""The largest :math:`e^{a_s - a_{s'}} |e^{x_s - x_{s'}} - 1|` of each row, for log-weights a and errors x."""
    error, log_weights = (jnp.where(valid, x, 0) for x in (error, log_weights))

    def over(entry: tuple[Array, ...]) -> Array:
        other, log_weight, present = (x[:, None] for x in entry)
        difference = jnp.exp(log_weights - log_weight) * jnp.abs(jnp.expm1(error - other))
        return jnp.max(jnp.where(valid & present, difference, 0), axis=1)

    return jnp.max(lax.map(over, (error.T, log_weights.T, valid.T)), axis=0)


def check_square(pattern: SparsePattern) -> None:
    """Raise unless a pattern has as many queries as keys."""
    check_pattern(pattern)
    if pattern.num_queries != pattern.num_keys:
        raise ValueError(f"self-attention needs a square pattern, got [{pattern.num_queries}, {pattern.num_keys}]")


def check_no_future(pattern: SparsePattern) -> None:
    """Raise if a row of a pattern has a key after its query."""
    future = np.asarray(pattern.valid) & (np.asarray(pattern.indices) > np.arange(pattern.num_queries)[:, None])
    if future.any():
        rows = future.any(axis=1).sum()
        raise ValueError(f"a causal head sees no key after its query, but {rows} rows have one; use pattern.causal()")


def off_rows(rows: Array, indices: Array, valid: Array, num_keys: int, is_causal: bool) -> Array:
    """The zeros of a pattern that are visible to given queries.

    Args:
        rows: the numbers of the queries ``[R]``.
        indices: the keys of their rows ``[R, K]``.
        valid: false on padding ``[R, K]``.
        num_keys: the number S of keys.
        is_causal: whether keys after the query are invisible.

    Returns:
        The mask ``[R, S]``.
    """
    local = jnp.arange(rows.shape[0], dtype=jnp.int32)[:, None]
    # Padding has index 0: ``min`` keeps that key, which setting would clear.
    off = jnp.ones((rows.shape[0], num_keys), bool).at[local, indices].min(~valid)
    return off & (jnp.arange(num_keys, dtype=jnp.int32)[None, :] <= rows[:, None]) if is_causal else off
