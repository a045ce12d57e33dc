"""Bounds for tensor attention: bounds of its logits, and the certificate of a polynomial approximation."""

import functools
import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from approx_attention.core import in_float32, squared_norm
from approx_attention.tensor import (
    Coefficients,
    check_taken,
    exp_coefficients,
    num_coefficients,
    ratio_range,
    taken_by,
    tensor_inputs,
    weight_bound,
)


def logit_bound(q: Float[Array, "T D"], k: Any, *, scale: float | Array | None = None, kv_mask: Any = None) -> Array:
    r"""Bound the magnitude of every logit of tensor attention, in time linear in the number of tokens.

    .. math:: \max |x| \le \min\Big(
              |s| \sum_t \prod_a \max_j |y^a_{jt}|,\
              |s| \prod_a \max_j \|y^a_j\|_m,\
              |s| \min_{a \ne b} \max \|y^a\|_2 \max \|y^b\|_2 \prod_{c \ne a, b} \max \|y^c\|_\infty \Big)

    over the m factors y, the queries and m - 1 sets of keys. The second form is computed twice: for the given channels,
    and for channels rescaled so that the largest entries of all factors agree, which does not change logits.

    Args:
        q: queries ``[T, D]``.
        k: keys ``[m-1, S, D]``, or a tuple of arrays ``[S_a, D]``; one array ``[S, D]`` is ordinary attention.
        scale: factor of the logits, ``1/sqrt(D)`` by default.
        kv_mask: true where a key is real, as in `tensor_attention`.

    Returns:
        The bound, one number.

    Raises:
        ValueError: shapes that do not match.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention import bounds
        >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0]])
        >>> float(bounds.logit_bound(x, (x, x), scale=1.0))  # attained by a logit
        8.0

    Reference:
        Derivations of this library, by the inequalities of Hoelder and Cauchy-Schwarz.
    """
    inputs = tensor_inputs(q, k, k, scale=scale, kv_mask=kv_mask)
    tokens = (inputs.q, *inputs.keys)
    # In units of the largest entry of each factor: powers of entries up to 1 do not overflow, and their sums are at
    # least 1.
    peaks = [jnp.max(jnp.abs(y)) for y in tokens]
    factors = tuple(y / jnp.where(peak > 0, peak, 1) for y, peak in zip(tokens, peaks, strict=True))
    order = len(factors)
    largest = jnp.stack([jnp.max(jnp.abs(y), axis=0) for y in factors])
    by_channel = jnp.prod(largest, axis=0)

    def hoelder(factors: Sequence[Array]) -> Array:
        norms = [jnp.max(jnp.sum(jnp.abs(y) ** order, axis=1)) ** (1 / order) for y in factors]
        return functools.reduce(operator.mul, norms)

    # The gauge: scaling a channel of one factor by c and of another by 1/c does not change any logit.
    common = by_channel[None] ** (1 / order) / jnp.where(largest > 0, largest, 1)
    balanced = [y * gauge[None, :] for y, gauge in zip(factors, common, strict=True)]
    euclidean = [jnp.sqrt(jnp.max(squared_norm(y))) for y in factors]
    mixed = [x * y for x, y in itertools.combinations(euclidean, 2)]
    least = functools.reduce(jnp.minimum, [jnp.sum(by_channel), hoelder(factors), hoelder(balanced), *mixed])
    return functools.reduce(operator.mul, peaks, least)


@in_float32()
def logit_rms(q: Float[Array, "T D"], k: Any, *, scale: float | Array | None = None, kv_mask: Any = None) -> Array:
    r"""Compute the root mean square of all logits of tensor attention, exactly and in linear time.

    .. math:: \frac{1}{T \prod_a S_a} \sum_{i, j, l} x_{ijl}^2
              = \frac{s^2}{T \prod_a S_a} \sum_{t, u} (Q^T Q)_{tu} \prod_a (K_a^T K_a)_{tu}

    Use it as ``rms`` for ``coefficients="hermite"``.

    Args:
        q: queries ``[T, D]``.
        k: keys, as in `logit_bound`.
        scale: factor of the logits, ``1/sqrt(D)`` by default.
        kv_mask: true where a key is real, as in `tensor_attention`; other keys are ignored.

    Returns:
        The root mean square; 0 if a set has no real key.

    Raises:
        ValueError: shapes that do not match.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention import bounds
        >>> float(bounds.logit_rms(jnp.full((3, 1), 2.0), jnp.ones((5, 1))))
        2.0
    """
    inputs = tensor_inputs(q, k, k, scale=scale, kv_mask=kv_mask)
    counts = [x.shape[0] if mask is None else jnp.maximum(jnp.sum(mask, dtype=x.dtype), 1)
              for x, mask in zip(inputs.keys, inputs.masks, strict=True)]  # fmt: skip
    factors = zip((inputs.q, *inputs.keys), (inputs.q.shape[0], *counts), strict=True)
    means = [y.T @ y / count for y, count in factors]
    # Rounding may leave a sum of squares of 0 slightly negative.
    return jnp.sqrt(jnp.maximum(jnp.sum(functools.reduce(operator.mul, means)), 0))


class TensorCertificate(NamedTuple):
    """Certificate of the polynomial method on given tensors, in exact arithmetic.

    Attributes:
        logit_bound: bound of the magnitude of all logits.
        total_variation: bound of the error of the weights of all queries; infinite if the polynomial may be negative.
        output: bound of the error of outputs in each channel, ``[Dv]``, in the units of the values.
        met: whether ``total_variation`` is within the requested tolerance; None without one.
        rank: the number of features.
        flops: operations of the polynomial method.
        exact_flops: operations of exact attention.
    """

    logit_bound: float
    total_variation: float
    output: np.ndarray
    met: bool | None
    rank: int
    flops: float
    exact_flops: float


def tensor_certificate(
    q: Float[Array, "T D"],
    k: Any,
    v: Any,
    *,
    degree: int | None = None,
    coefficients: Coefficients | Sequence[float] | np.ndarray = "taylor",
    bound: float | None = None,
    rms: float | None = None,
    tolerance: float | None = None,
    scale: float | Array | None = None,
    kv_mask: Any = None,
) -> TensorCertificate:
    r"""Certify the polynomial method on given tensors: bound its distance from tensor attention of any order.

    With :math:`\beta` the `logit_bound`, and lo and hi the smallest and the largest :math:`P(x) e^{-x}` for
    :math:`|x| \le \beta` (`ratio_range`),

    .. math:: \tfrac12 \|\tilde w_i - w_i\|_1 \le C = \tanh\big(\tfrac14 \ln \tfrac{hi}{lo}\big), \qquad
              |\tilde o_{ic} - o_{ic}| \le C\, \Big(\max_{j, l} v^1_{jc} v^2_{lc} - \min_{j, l} v^1_{jc} v^2_{lc}\Big).

    The bound holds with and without a causal mask or a window. It assumes the worst logits within `logit_bound`, and is
    often a hundred times larger than the error. Measure the error too (`approx_attention.evaluation.output_error`), and
    its *skill* against the mean of the values (`approx_attention.evaluation.skill`), because all methods are accurate
    for tiny logits. The bound does not include rounding.

    It needs concrete q, k and v, so it does not run under `jax.jit`. q, k, v, scale and kv_mask are as in
    `tensor_attention`; degree and coefficients are as in `tensor_polynomial`.

    Args:
        bound: as in `tensor_polynomial`; by default the `logit_bound` of the tensors.
        rms: as in `tensor_polynomial`; by default the `logit_rms` of the tensors.
        tolerance: largest allowed total variation.

    Returns:
        The `TensorCertificate`.

    Raises:
        ValueError: shapes that do not match, logits that are not finite, a degree other than that of the coefficients,
            a bound or root mean square that they do not take.

    Example:
        >>> import jax
        >>> from approx_attention import bounds
        >>> q, k, l, v, w = (0.3 * jax.random.normal(jax.random.key(i), (64, 8)) for i in range(5))
        >>> certificate = bounds.tensor_certificate(q, (k, l), (v, w), degree=4, tolerance=1e-3)
        >>> certificate.met, certificate.rank, certificate.flops < certificate.exact_flops
        (True, 495, True)

    Reference:
        :cite:p:`alman2024capture`, upper bound; the constants are derivations of this library (`weight_bound`).
    """
    inputs = tensor_inputs(q, k, v, scale=scale, kv_mask=kv_mask)
    beta = float(logit_bound(q, k, scale=scale, kv_mask=kv_mask))
    check_taken(coefficients, bound=bound, rms=rms)
    if isinstance(coefficients, str):
        if coefficients == "hermite" and rms is None:
            rms = float(logit_rms(q, k, scale=scale, kv_mask=kv_mask))
        degree = 2 if degree is None else degree
        numbers = taken_by(coefficients, bound=beta if bound is None else bound, rms=rms)
        coefficients = exp_coefficients(coefficients, degree, **numbers)
    elif degree not in (None, num_coefficients(coefficients) - 1):
        told = len(coefficients)
        raise ValueError(f"degree must be {told - 1}, that of the {told} coefficients, got {degree}")
    total_variation = weight_bound(*ratio_range(coefficients, beta))
    value_dim = inputs.values[0].shape[1]
    low, high = np.ones(value_dim), np.ones(value_dim)
    # The extremes of a product of values are products of extremes of each set.
    for values, mask in zip(inputs.values, inputs.masks, strict=True):
        real = np.asarray(values, np.float64)[slice(None) if mask is None else np.asarray(mask)]
        if not len(real):
            real = np.zeros((1, value_dim))
        ends = [a * b for a in (low, high) for b in (real.min(axis=0), real.max(axis=0))]
        low, high = np.min(ends, axis=0), np.max(ends, axis=0)
    num_queries, dim = inputs.q.shape
    lengths = [keys.shape[0] for keys in inputs.keys]
    rank = math.comb(dim + len(coefficients) - 1, dim)
    # Per token R products with Dv values and the normaliser, each one multiplication and one addition.
    return TensorCertificate(
        logit_bound=beta,
        total_variation=total_variation,
        output=total_variation * (high - low) if math.isfinite(total_variation) else np.full(value_dim, np.inf),
        met=None if tolerance is None else total_variation <= tolerance,
        rank=rank,
        flops=2.0 * (num_queries + sum(lengths)) * rank * (value_dim + 1),
        exact_flops=2.0 * num_queries * math.prod(lengths) * (dim + value_dim),
    )
