"""Mean squared errors of random features, sketches and sampled rows, and the size of a random projection."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from approx_attention.core import (
    SKETCHES,
    Proposal,
    accumulation_dtype,
    check_choice,
    check_count,
    check_key_value_fit,
    check_proposal,
    fold_scale,
    in_float32,
    squared_norm,
)


@in_float32()
def favor_mse(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    num_features: int,
    *,
    features: Literal["positive", "hyperbolic", "trigonometric"] = "positive",
    proposal: Proposal | None = None,
    scale: float | Array | None = None,
) -> Float[Array, "T S"]:
    r"""Compute the mean squared error of random-feature estimates of :math:`e^{q \cdot k}`, relative to its square.

    For R features of independent directions, with q and k scaled by :math:`\sqrt s` and :math:`z = \|q + k\|^2`,

    .. math:: \text{positive: } \frac{e^z - 1}{R}, \qquad
              \text{hyperbolic: } \frac{(e^z - 1)(1 - e^{-z})}{R}, \qquad
              \text{trigonometric: } \frac{e^z (1 - e^{-\|q - k\|^2})^2}{R\, e^{4 q \cdot k}}.

    Positive features with directions from a proposal :math:`N(\mu, \Sigma)`, whose variances :math:`\sigma_i` along
    the axes :math:`u_i` of :math:`\Sigma` must exceed 1/2, have

    .. math:: \frac1R \Big(\prod_i \frac{\sigma_i}{\sqrt{2 \sigma_i - 1}}\,
              e^{(u_i \cdot (q + k - \mu))^2 / (2 \sigma_i - 1)} - 1\Big).

    Hyperbolic and trigonometric features use R/2 directions. Orthogonal directions reduce the error, which this formula
    does not include. It holds for single entries, whose estimates are unbiased; the output is a ratio of sums of
    entries, and is biased. Above 1 the estimate of an entry is useless.

    Args:
        q: queries ``[T, D]``.
        k: keys ``[S, D]``.
        num_features: the number R of features.
        features: the kind of features.
        proposal: the Gaussian of the directions, N(0, I) by default; with positive features only.
        scale: factor s of the logits, ``1/sqrt(D)`` by default.

    Returns:
        The relative mean squared errors ``[T, S]``; infinite where they overflow.

    Raises:
        ValueError: shapes that do not match, no features, unknown kind, a proposal with another kind.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention import bounds
        >>> float(bounds.favor_mse(jnp.zeros((1, 4)), jnp.zeros((1, 4)), 64)[0, 0])
        0.0

    Reference:
        :cite:p:`choromanski2021rethinking`, lemma 2 and theorem 1.
    """
    num_features = check_count("num_features", num_features)
    check_choice("features", features, ("positive", "hyperbolic", "trigonometric"))
    check_key_value_fit(q, k, k)
    dtype = accumulation_dtype(q, k)
    q, k = fold_scale(q.astype(dtype), k.astype(dtype), scale)
    if proposal is not None:
        if features != "positive":
            raise ValueError(f"a proposal is supported for positive features only, got features={features!r}")
        check_proposal(proposal, q.shape[1])
        proposal = Proposal(*(x.astype(dtype) for x in proposal))
        return jnp.expm1(_log_second_moment(q, k, proposal)) / num_features
    logits, norms = q @ k.T, squared_norm(q) + squared_norm(k).T
    # Squared norms by products, which may be negative after rounding.
    together, apart = (jnp.maximum(norms + sign * 2 * logits, 0) for sign in (1, -1))
    if features == "trigonometric":
        # Exponents are added first: each exponential may overflow although the quotient does not.
        return jnp.exp(together - 4 * logits) * jnp.expm1(-apart) ** 2 / num_features
    positive = jnp.expm1(together) / num_features
    return positive if features == "positive" else positive * -jnp.expm1(-together)


def _log_second_moment(q: Array, k: Array, proposal: Proposal) -> Array:
    """Logarithms of the relative second moments ``[T, S]`` of one positive feature; infinite if no moment exists."""
    variance, axes = jnp.linalg.eigh(proposal.root @ proposal.root.T)
    exists = variance > 0.5
    excess = jnp.where(exists, 2 * variance - 1, 1)
    # Half of the mean is subtracted from queries and half from keys, because it belongs to their sum.
    q, k = ((x - proposal.mean[None, :] / 2) @ axes / jnp.sqrt(excess)[None, :] for x in (q, k))
    squared = jnp.maximum(squared_norm(q) + squared_norm(k).T + 2 * q @ k.T, 0)
    volume = jnp.sum(jnp.where(exists, jnp.log(variance) - jnp.log(excess) / 2, jnp.inf))
    return squared + volume


@in_float32()
def sketch_mse(
    weights: Float[Array, "T S"], v: Float[Array, "S Dv"], sketch_size: int, kind: str = "gaussian"
) -> Float[Array, ""]:
    r"""Compute the exact mean squared error of attention over sketched values.

    With :math:`T = \|P\|_F^2 \|v\|_F^2`, :math:`O = \|P v\|_F^2`, :math:`C = \sum_j \|P_{:j}\|^2 \|v_j\|^2` and M rows,
    :math:`E \|P \Pi^T \Pi v - P v\|_F^2` is

    .. math:: \frac{T + O + (s - 3) C}{M}, \qquad \frac{T + O - 2 C}{M}, \qquad
              \frac{T + O - 2 C}{M} \frac{N - M}{N - 1}, \qquad \frac{S C - O}{M} \frac{S - M}{S - 1}

    for signs of density 1/s (``"rademacher"`` s = 1, ``"achlioptas"`` s = 3; ``"gaussian"`` as s = 3), for ``"count"``
    and ``"sparse_jl"``, for ``"hadamard"`` with N the smallest power of two of at least S, and for ``"uniform_rows"``.
    For centred values, as in `unreduced_jlt`, subtract their mean before.

    Args:
        weights: attention weights P ``[T, S]``.
        v: values ``[S, Dv]``.
        sketch_size: the number M of rows.
        kind: as in `approx_attention.core.draw_sketch`.

    Returns:
        The expected squared error, summed over queries and channels. A sketch is useful if this is below
        :math:`\|P v\|_F^2`; for uniform weights and centred values it is S/M times as large.

    Raises:
        ValueError: an unknown kind, shapes that do not match.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention import bounds
        >>> uniform = jnp.full((4, 8), 1 / 8)
        >>> v = jnp.array([1.0, -1.0] * 4)[:, None]
        >>> float(bounds.sketch_mse(uniform, v, 2)), float(bounds.sketch_mse(uniform, v, 8, "hadamard"))
        (2.0, 0.0)

    Reference:
        Second moments of each family; :cite:p:`wang2020linformer`, theorem 1, bounds a probability instead.
    """
    check_choice("kind", kind, SKETCHES)
    sketch_size = check_count("sketch_size", sketch_size)
    num_keys = v.shape[0]
    if weights.ndim != 2 or weights.shape[1] != num_keys:
        raise ValueError(f"weights must be [T, S] with S = {num_keys}, got shape {weights.shape}")
    dtype = accumulation_dtype(weights, v)
    weights, v = weights.astype(dtype), v.astype(dtype)
    of_column, of_value = jnp.sum(weights**2, axis=0), squared_norm(v)[:, 0]
    total, own, out = jnp.sum(of_column) * jnp.sum(of_value), jnp.sum(of_column * of_value), jnp.sum((weights @ v) ** 2)
    if kind == "uniform_rows":
        return (num_keys * own - out) / sketch_size * _without_replacement(num_keys, sketch_size)
    if kind == "hadamard":
        length = 1 << (num_keys - 1).bit_length()
        return (total + out - 2 * own) / sketch_size * _without_replacement(length, sketch_size)
    # The coefficient of C: the fourth moment of an entry in units of its variance, minus 3 for a Gaussian. It is 1 for
    # signs, and 3 for signs with density 1/3.
    own_times = {"gaussian": 0, "achlioptas": 0, "rademacher": -2, "count": -2, "sparse_jl": -2}[kind]
    return (total + out + own_times * own) / sketch_size


@in_float32()
def row_sample_mse(
    weights: Float[Array, "T S"], v: Float[Array, "S Dv"], sample_size: int, log_odds: Float[Array, " S"]
) -> Float[Array, ""]:
    r"""Compute the mean squared error of attention over M rows sampled with replacement, weighted by inverse odds.

    .. math:: E \|P \Pi^T \Pi v - P v\|_F^2
              = \frac1M \Big(\sum_j \frac{\|P_{:j}\|^2 \|v_j\|^2}{p_j} - \|P v\|_F^2\Big),

    whose minimum, :math:`((\sum_j \|P_{:j}\| \|v_j\|)^2 - \|P v\|_F^2) / M`, is at
    :math:`p_j \propto \|P_{:j}\| \|v_j\|`.

    Args:
        weights: attention weights P ``[T, S]``.
        v: values ``[S, Dv]``.
        sample_size: the number M of rows.
        log_odds: logarithms of p up to a constant ``[S]``; zeros for uniform sampling.

    Returns:
        The expected squared error, summed over queries and channels.

    Raises:
        ValueError: a count below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention import bounds
        >>> float(bounds.row_sample_mse(jnp.full((4, 8), 1 / 8), jnp.ones((8, 1)), 2, jnp.zeros(8)))
        0.0

    Reference:
        :cite:p:`drineas2006fast`.
    """
    sample_size = check_count("sample_size", sample_size)
    dtype = accumulation_dtype(weights, v)
    weights, v = weights.astype(dtype), v.astype(dtype)
    share = jnp.exp(-jax.nn.log_softmax(log_odds.astype(dtype)))
    own = jnp.sum(weights**2, axis=0) * squared_norm(v)[:, 0]
    return (jnp.sum(share * own) - jnp.sum((weights @ v) ** 2)) / sample_size


def _without_replacement(num_rows: int, size: int) -> float:
    """The factor of the variance for sampling without replacement."""
    return max(0, num_rows - size) / max(1, num_rows - 1)


def johnson_lindenstrauss_size(num_points: int, error: float) -> float:
    r"""Compute the number of rows of a random projection that preserves all distances between N points.

    .. math:: M = 4 \ln N \,/\, (\epsilon^2/2 - \epsilon^3/3)

    Args:
        num_points: the number N of points.
        error: :math:`\epsilon`, the relative error of squared distances, between 0 and 1.

    Returns:
        The number of rows. For usual errors it exceeds the length of the sequence.

    Raises:
        ValueError: an error that is not between 0 and 1.

    Example:
        >>> from approx_attention import bounds
        >>> round(bounds.johnson_lindenstrauss_size(512, 0.5)), round(bounds.johnson_lindenstrauss_size(512, 0.1))
        (299, 5347)

    Reference:
        :cite:p:`dasgupta2003elementary`.
    """
    num_points = check_count("num_points", num_points, most=None)
    if not 0 < error < 1:
        raise ValueError(f"error must be between 0 and 1, got {error}")
    return 4 * math.log(num_points) / (error**2 / 2 - error**3 / 3)
