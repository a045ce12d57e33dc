"""The truncated singular value decomposition of the attention matrix, which bounds every method of low rank."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from approx_attention.core import check_count, head_inputs, in_float32, query_mask


@in_float32()  # a yardstick, to which other errors are compared
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
    Its rows need not sum to 1, nor its entries be positive. The matrix is that of real queries; the others get exact
    outputs.

    The derivative is that of the truncation, without bound where :math:`\sigma_r` nears :math:`\sigma_{r+1}`; pairs of
    equal singular values on either side of the cut, where there is none, are left out of it.

    Shared arguments: see `approx_attention.methods`.

    Args:
        rank: r; with r >= min(T, S) the output is exact.

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


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _truncated(p: Array, rank: int) -> Array:
    """The nearest matrix of that rank. Derivatives of the SVD itself are not finite where singular values coincide."""
    u, s, vt = jnp.linalg.svd(p, full_matrices=False)
    return (u[:, :rank] * s[None, :rank]) @ vt[:rank]


@_truncated.defjvp
@in_float32()
def _truncated_jvp(rank, primals, tangents):
    r"""With :math:`M = U^T dP\, V`, kept values i and dropped ones j,

    .. math:: (U^T dP_r V)_{ij} = M_{ij} + \frac{\sigma_j^2 M_{ij} + \sigma_i \sigma_j M_{ji}}{\sigma_i^2 - \sigma_j^2},

    the same with ij and ji exchanged, M among kept values, and 0 among dropped ones.
    """
    (p,), (dp,) = primals, tangents
    u, s, vt = jnp.linalg.svd(p, full_matrices=False)
    (u, u_dropped), (vt, vt_dropped) = (u[:, :rank], u[:, rank:]), (vt[:rank], vt[rank:])
    kept, dropped = s[:rank, None], s[None, rank:]
    # Derivatives between two values that rounding cannot tell apart have no limit: such pairs are left out.
    gap = kept**2 - dropped**2
    apart = gap > jnp.finfo(s.dtype).eps * s[0] ** 2
    gap = jnp.where(apart, gap, 1)
    left, right = u.T @ dp, dp @ vt.T
    m, m_t = left @ vt_dropped.T, (u_dropped.T @ right).T
    upper = jnp.where(apart, (dropped**2 * m + kept * dropped * m_t) / gap, 0)
    lower = jnp.where(apart, (dropped**2 * m_t + kept * dropped * m) / gap, 0)
    tangent = u @ (left + upper @ vt_dropped) + (right - u @ (u.T @ right) + u_dropped @ lower.T) @ vt
    return (u * s[None, :rank]) @ vt, tangent
