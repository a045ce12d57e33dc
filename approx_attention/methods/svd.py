"""The truncated singular value decomposition of the attention matrix, a lower bound for every low-rank method."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from approx_attention.core import check_count, head_inputs, in_float32, query_mask


@in_float32()  # a reference for other errors
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
    r"""The best rank-r approximation of the attention matrix, at cubic cost: a reference for low-rank methods.

    .. math:: P = \mathrm{softmax}(s\, q k^T) = U \Sigma V^T, \qquad \mathrm{out} = U_r \Sigma_r V_r^T v.

    No matrix of rank r is closer to P in the Frobenius or the spectral norm. This bounds the error of the weights, not
    of the outputs: a matrix of rank ``Dv`` can give the exact outputs for given values. Its rows need not sum to 1, and
    its entries need not be positive. P has the rows of real queries; the others get exact outputs.

    The derivative of the truncation grows without bound as :math:`\sigma_r` approaches :math:`\sigma_{r+1}`. Pairs of
    equal singular values on both sides of the cut, for which there is no derivative, are left out.

    Shared arguments: see `approx_attention.methods`.

    Args:
        rank: r; with r >= min(T, S) the output is exact.

    Raises:
        ValueError: shapes that do not match, a rank below 1.
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


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _truncated(p: Array, rank: int) -> Array:
    """The nearest matrix of this rank. Derivatives of the SVD itself are not finite where singular values coincide."""
    u, s, vt = jnp.linalg.svd(p, full_matrices=False)
    return (u[:, :rank] * s[None, :rank]) @ vt[:rank]


@_truncated.defjvp
@in_float32()
def _truncated_jvp(rank, primals, tangents):
    r"""With :math:`M = U^T dP\, V`, kept singular values i and dropped ones j,

    .. math:: (U^T dP_r V)_{ij} = M_{ij} + \frac{\sigma_j^2 M_{ij} + \sigma_i \sigma_j M_{ji}}{\sigma_i^2 - \sigma_j^2},

    the same with ij and ji exchanged, M among kept values, and 0 among dropped ones.
    """
    (p,), (dp,) = primals, tangents
    u, s, vt = jnp.linalg.svd(p, full_matrices=False)
    (u, u_dropped), (vt, vt_dropped) = (u[:, :rank], u[:, rank:]), (vt[:rank], vt[rank:])
    kept, dropped = s[:rank, None], s[None, rank:]
    # Derivatives diverge between two values that are equal up to rounding: such pairs are left out.
    gap = kept**2 - dropped**2
    apart = gap > jnp.finfo(s.dtype).eps * s[0] ** 2
    gap = jnp.where(apart, gap, 1)
    left, right = u.T @ dp, dp @ vt.T
    m, m_t = left @ vt_dropped.T, (u_dropped.T @ right).T
    upper = jnp.where(apart, (dropped**2 * m + kept * dropped * m_t) / gap, 0)
    lower = jnp.where(apart, (dropped**2 * m_t + kept * dropped * m) / gap, 0)
    tangent = u @ (left + upper @ vt_dropped) + (right - u @ (u.T @ right) + u_dropped @ lower.T) @ vt
    return (u * s[None, :rank]) @ vt, tangent
