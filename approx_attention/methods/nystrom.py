"""Low-rank approximations of the attention matrix: Nystrom, Skyformer, and the truncated SVD that bounds them all."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import jax.scipy.linalg
from jax import Array, lax
from jaxtyping import Bool, Float

from approx_attention.core import (
    HIDDEN,
    blocked_state,
    check_choice,
    check_count,
    check_floating,
    check_key,
    check_number,
    check_positive,
    count_real,
    head_inputs,
    paired_means,
    query_mask,
    ranks,
    real_keys,
    segment_means,
    segments_of,
    squared_norm,
)


def nystrom(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    num_landmarks: int = 64,
    inverse: Literal["iterations", "ridge", "svd"] = "iterations",
    num_iterations: int = 6,
    ridge: float | Array = 1e-4,
    rcond: float | Array = 1e-2,
    kv_mask: Bool[Array, " S"] | None = None,
    q_mask: Bool[Array, " T"] | None = None,
    scale: float | Array | None = None,
) -> Float[Array, "T Dv"]:
    r"""Nystrom attention: three softmax kernels between tokens and the means of M segments of queries and of keys.

    With segment means :math:`\tilde q, \tilde k` ``[M, D]`` over real tokens and logits scaled by s,

    .. math:: \mathrm{out} = \tilde F\, \tilde A^+\, (\tilde B v), \quad
              \tilde F = \mathrm{softmax}(q \tilde k^T), \quad
              \tilde A = \mathrm{softmax}(\tilde q \tilde k^T), \quad
              \tilde B = \mathrm{softmax}(\tilde q k^T).

    The true pseudo-inverse makes it exact with a landmark per token (M = T = S), and makes the weights of a query sum
    to 1 where :math:`\tilde A` is regular; but it amplifies what small singular values carry, and its error with few
    landmarks is often many times that of an inverse that cuts them. Weights may be negative under every inverse.
    There is no causal form: every landmark of queries reads all keys.

    Shared arguments: see `approx_attention.methods`.

    Args:
        num_landmarks: the number M of segments, of sizes that differ by at most 1; no more than real queries and keys.
        inverse: how :math:`\tilde A`, each matrix by itself, is inverted:

            - ``"iterations"``: the published third-order iteration. Stopped early it is a soft cut of small singular
              values: 6 steps invert half of one near :math:`0.025\, \|\tilde A\|_1^{1/2}` and nearly all of one four
              times as large. More steps are not better, and far more diverge where :math:`\tilde A` is singular to
              working precision.
            - ``"ridge"``: :math:`(\tilde A^T \tilde A + \gamma I)^{-1} \tilde A^T`.
            - ``"svd"``: singular values below ``rcond`` times the largest count as 0. Its derivative takes the number
              of the others as fixed, and what was cut as absent: exact where all that is cut is 0.
        num_iterations: steps of the iteration.
        ridge: :math:`\gamma`, in units of squared singular values; the largest of :math:`\tilde A` is from 1 to
            :math:`\sqrt M`.
        rcond: the relative cut of ``"svd"``.
        kv_mask: true where a key is real, ``[S]``; segments are cut over real tokens. A query that sees no key gives 0.
        q_mask: true where a query is real, ``[T]``, and enters the means of queries; where T = S by default `kv_mask`.

    Raises:
        ValueError: shapes that do not fit, counts below 1, another inverse, a ridge or cut that is not positive.
        TypeError: dtypes that are not floating point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import exact, nystrom
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (6, 4)) for i in range(3))
        >>> out = nystrom(q, k, v, inverse="svd", rcond=1e-6)
        >>> bool(jnp.allclose(out, exact(q, k, v), atol=1e-4))
        True

    Reference:
        :cite:p:`xiong2021nystromformer`, section 3; without its convolution of the values, which belongs to a
        layer.
    """
    dtype, num_queries, num_keys = v.dtype, q.shape[0], k.shape[0]
    check_choice("inverse", inverse, ("iterations", "ridge", "svd"))
    num_iterations = check_count("num_iterations", num_iterations)
    for name, number in (("ridge", ridge), ("rcond", rcond)):
        check_number(name, number)
        check_positive(name, number)
    q, k, v = head_inputs(q, k, v, scale=scale, kv_mask=kv_mask)
    num_landmarks = min(check_count("num_landmarks", num_landmarks), num_queries, num_keys)
    q_bar, k_bar, present = paired_means(q, k, num_landmarks, query_mask(q_mask, kv_mask, num_queries), kv_mask)
    key_bias = None if kv_mask is None else _hiding(kv_mask, jnp.zeros(num_keys, q.dtype))
    landmark_bias = None if present is None else _hiding(present, jnp.zeros(num_landmarks, q.dtype))

    with jax.default_matmul_precision("float32"):
        # An absent landmark is a row or column of zeros, of which every inverse makes a column or row of zeros.
        both = None if present is None else present[:, None] & present[None, :]
        a = jax.nn.softmax(q_bar @ k_bar.T, where=both)
        if inverse == "iterations":
            z = _iterated_inverse(a, num_iterations)
        elif inverse == "ridge":
            z = _solve(a.T @ a + ridge * jnp.eye(num_landmarks, dtype=a.dtype), a.T)
        else:
            z = jnp.linalg.pinv(a, rtol=rcond)
        values = z @ blocked_state(q_bar, k, v, key_bias).out
    return blocked_state(q, k_bar, values, landmark_bias).out.astype(dtype)


def skyformer(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    num_landmarks: int = 128,
    ridge: float | Array = 1e-3,
    noise: Float[Array, " N"] | None = None,
    kv_mask: Bool[Array, " S"] | None = None,
    q_mask: Bool[Array, " T"] | None = None,
    scale: float | Array | None = None,
) -> Float[Array, "T Dv"]:
    r"""Skyformer: Nystrom approximation of *kernelised* attention, which is not softmax attention.

    What it approximates has Gaussian weights, without a normaliser:

    .. math:: \mathrm{out}_t = \sum_j \kappa(q_t, k_j)\, v_j, \qquad \kappa(x, y) = e^{-s \|x - y\|^2 / 2}.

    :math:`\kappa(q, k)` is a block of the positive semi-definite kernel of all N = T + S rows of :math:`[q; k]`. With M
    of these rows x, drawn uniformly,

    .. math:: \mathrm{out} = \kappa(q, x)\, \big(\kappa(x, x) + \gamma I\big)^{-1} \big(\kappa(x, k)\, v\big).

    Its weights do not sum to 1, and may be negative. The normalisation and the iteration with which the authors invert
    the middle matrix cancel out of this formula; it is solved directly. There is no causal form.

    Shared arguments: see `approx_attention.methods`.

    Args:
        key: typed PRNG key; not needed if ``noise`` is given.
        num_landmarks: the number M of rows drawn, without replacement; with M >= T + S and a small ridge the answer is
            kernelised attention.
        ridge: :math:`\gamma`; in float32 not much below :math:`10^{-7} M`.
        noise: a priority per row of :math:`[q; k]`, ``[T + S]``; the M largest are drawn.
        kv_mask: true where a key is real, ``[S]``; only rows of real tokens are drawn. A query that sees no key is 0.
        q_mask: true where a query is real, ``[T]``, by default `kv_mask` where T = S.
        scale: factor s of the squared distances, ``1/sqrt(D)`` by default.

    Raises:
        ValueError: shapes that do not fit, counts below 1, a ridge that is not positive, neither key nor noise.
        TypeError: dtypes that are not floating point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import skyformer
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (6, 4)) for i in range(3))
        >>> kernel = jnp.exp(-jnp.sum((q[:, None] - k[None]) ** 2, axis=-1) / (2 * 4**0.5))
        >>> out = skyformer(q, k, v, jax.random.key(3), ridge=1e-6)
        >>> bool(jnp.allclose(out, kernel @ v, atol=1e-4))
        True

    Reference:
        :cite:p:`chen2021skyformer`, section 4.
    """
    dtype, num_queries, num_keys = v.dtype, q.shape[0], k.shape[0]
    check_number("ridge", ridge)
    check_positive("ridge", ridge)
    q, k, v = head_inputs(q, k, v, scale=scale, kv_mask=kv_mask)
    num_landmarks = min(check_count("num_landmarks", num_landmarks), num_queries + num_keys)
    q_mask = query_mask(q_mask, kv_mask, num_queries)
    if noise is None:
        noise = jax.random.uniform(check_key("skyformer", key), (num_queries + num_keys,), jnp.float32)
        if q_mask is not None or kv_mask is not None:  # as drawn without padding
            first_key = num_queries if q_mask is None else count_real(q_mask)
            noise = noise[jnp.concatenate([ranks(q_mask, num_queries), first_key + ranks(kv_mask, num_keys)])]
    else:
        check_floating("noise", noise)
        if noise.shape != (num_queries + num_keys,):
            raise ValueError(f"noise must be [T + S] = [{num_queries + num_keys}], got shape {noise.shape}")
    # The kernel sees differences only, and rounding is least where the rows are small.
    center = lax.stop_gradient(segment_means(k, segments_of(num_keys, 1, kv_mask), kv_mask))
    q, k = q - center, k - center

    real_key = real_keys(kv_mask, num_keys)
    real = jnp.concatenate([real_keys(q_mask, num_queries), real_key])
    priority, chosen = lax.top_k(jnp.where(real, noise.astype(q.dtype), -jnp.inf), num_landmarks)
    present = priority > -jnp.inf
    rows = jnp.where(present[:, None], jnp.concatenate([q, k])[chosen], 0)

    with jax.default_matmul_precision("float32"):
        # From differences, not products: rounding must not make it indefinite.
        gram = jnp.exp(-jnp.sum((rows[:, None, :] - rows[None, :, :]) ** 2, axis=-1) / 2)
        gram = jnp.where(present[:, None] & present[None, :], gram, 0)
        diagonal = jnp.where(present, ridge, 1 + ridge)
        values = _solve(gram + jnp.diag(diagonal.astype(gram.dtype)), _gaussian_sums(rows, k, v, real_key))
    return _gaussian_sums(q, rows, values, present).astype(dtype)


def svd(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    rank: int = 64,
    kv_mask: Bool[Array, " S"] | None = None,
    q_mask: Bool[Array, " T"] | None = None,
    scale: float | Array | None = None,
) -> Float[Array, "T Dv"]:
    r"""The best approximation of the attention matrix by one of rank r, at cubic cost: a yardstick, not a method.

    .. math:: P = \mathrm{softmax}(s\, q k^T) = U \Sigma V^T, \qquad \mathrm{out} = U_r \Sigma_r V_r^T v.

    No matrix :math:`\hat P` of rank r is nearer to P in the Frobenius or the spectral norm. That bounds the error of
    weights and not that of outputs: a matrix of rank ``Dv`` can give the outputs of exact attention for these values.
    Its rows need not sum to 1, nor its entries be positive.

    The derivative is that of the truncation, without bound where :math:`\sigma_r` nears :math:`\sigma_{r+1}`; pairs of
    equal singular values on either side of the cut, where there is none, are left out of it.

    Shared arguments: see `approx_attention.methods`.

    Args:
        rank: r; with r >= min(T, S) the answer is exact.
        q_mask: true where a query is real, ``[T]``, by default `kv_mask` where T = S. The matrix is that of real
            queries; the others get exact outputs.

    Raises:
        ValueError: shapes that do not fit, a rank below 1.
        TypeError: dtypes that are not floating point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import exact, svd
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (6, 4)) for i in range(3))
        >>> bool(jnp.allclose(svd(q, k, v, rank=6), exact(q, k, v), atol=1e-6))
        True
        >>> weights = svd(q, k, jnp.eye(6), rank=2)
        >>> int(jnp.linalg.matrix_rank(weights))
        2

    Reference:
        :cite:p:`eckart1936approximation`.
    """
    dtype = v.dtype
    rank = check_count("rank", rank)
    q, k, v = head_inputs(q, k, v, scale=scale, kv_mask=kv_mask)
    weights = jax.nn.softmax(q @ k.T, where=None if kv_mask is None else kv_mask[None, :])
    q_mask = query_mask(q_mask, kv_mask, q.shape[0])
    if rank < min(weights.shape):
        if q_mask is None:
            weights = _truncated(weights, rank)
        else:
            truncated = _truncated(jnp.where(q_mask[:, None], weights, 0), rank)
            weights = jnp.where(q_mask[:, None], truncated, weights)
    return (weights @ v).astype(dtype)


def _iterated_inverse(a: Array, num_iterations: int) -> Array:
    """The pseudo-inverse of one matrix by a third-order iteration, from a start with which it converges."""
    norms = jnp.max(jnp.sum(jnp.abs(a), axis=0)) * jnp.max(jnp.sum(jnp.abs(a), axis=1))
    z = a.T / jnp.where(norms == 0, 1, norms)
    identity = jnp.eye(a.shape[0], dtype=a.dtype)
    for _ in range(num_iterations):
        az = a @ z
        z = z @ (13 * identity - az @ (15 * identity - az @ (7 * identity - az))) / 4
    return z


def _solve(matrix: Array, rhs: Array) -> Array:
    """Solves with a positive definite matrix."""
    return jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(matrix), True), rhs)


def _gaussian_sums(x: Array, y: Array, w: Array, present: Array) -> Array:
    r"""The sums :math:`\sum_j e^{-\|x_i - y_j\|^2 / 2} w_j` over the rows y that are present, as softmax attention."""
    state = blocked_state(x, y, w, _hiding(present, -squared_norm(y)[:, 0] / 2))
    return state.out * jnp.exp(state.lse[:, None] - squared_norm(x) / 2)


def _hiding(present: Array, bias: Array) -> Array:
    return jnp.where(present, bias, HIDDEN)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _truncated(p: Array, rank: int) -> Array:
    """The nearest matrix of that rank. Derivatives of the SVD itself are not finite where singular values coincide."""
    u, s, vt = jnp.linalg.svd(p, full_matrices=False)
    return (u[:, :rank] * s[None, :rank]) @ vt[:rank]


@_truncated.defjvp
def _truncated_jvp(rank, primals, tangents):
    r"""With :math:`M = U^T dP\, V`, kept values i and dropped ones j,

    .. math:: (U^T dP_r V)_{ij} = M_{ij} + \frac{\sigma_j^2 M_{ij} + \sigma_i \sigma_j M_{ji}}{\sigma_i^2 - \sigma_j^2},

    the same with ij and ji exchanged, M among kept values, and 0 among dropped ones.
    """
    (p,), (dp,) = primals, tangents
    u, s, vt = jnp.linalg.svd(p, full_matrices=False)
    (u, u_dropped), (vt, vt_dropped) = (u[:, :rank], u[:, rank:]), (vt[:rank], vt[rank:])
    kept, dropped = s[:rank, None], s[None, rank:]
    gap = kept**2 - dropped**2
    apart = gap > jnp.finfo(s.dtype).eps * s[0] ** 2
    gap = jnp.where(apart, gap, 1)
    left, right = u.T @ dp, dp @ vt.T
    m, m_t = left @ vt_dropped.T, (u_dropped.T @ right).T
    upper = jnp.where(apart, (dropped**2 * m + kept * dropped * m_t) / gap, 0)
    lower = jnp.where(apart, (dropped**2 * m_t + kept * dropped * m) / gap, 0)
    tangent = u @ (left + upper @ vt_dropped) + (right - u @ (u.T @ right) + u_dropped @ lower.T) @ vt
    return (u * s[None, :rank]) @ vt, tangent
