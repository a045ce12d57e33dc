"""Singular values of attention weights, and the rank that they need."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from approx_attention.core import HIDDEN, head_inputs, in_float32, query_mask


class Spectrum(NamedTuple):
    """Cumulative shares of the singular values of attention weights, from the largest, each ``[min(T, S)]``.

    Attributes:
        weights: those of P.
        centred: those of P minus the uniform weights, which make diffuse attention look like rank 1.
    """

    weights: Array
    centred: Array


@in_float32()
def spectrum(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    *,
    kv_mask: Bool[Array, " S"] | None = None,
    scale: float | Array | None = None,
) -> Spectrum:
    r"""Compute the decay of the singular values of softmax attention, which limits every low-rank approximation.

    .. math:: c_r = \sum_{i \le r} \sigma_i \Big/ \sum_i \sigma_i

    Args:
        q: queries ``[T, D]``.
        k: keys ``[S, D]``.
        kv_mask: true where a key is real, ``[S]``.
        scale: factor of the logits, ``1/sqrt(D)`` by default.

    Returns:
        The `Spectrum` of one head; `jax.vmap` adds heads and layers.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention.evaluation import spectrum
        >>> q = k = 9.0 * jnp.eye(4)
        >>> [round(float(x), 2) for x in spectrum(q, k).weights]
        [0.25, 0.5, 0.75, 1.0]

    Reference:
        :cite:p:`wang2020linformer`, figure 1, which is without centring.
    """
    q, k, _ = head_inputs(q, k, k, scale=scale, kv_mask=kv_mask)
    real = jnp.ones(k.shape[0], bool) if kv_mask is None else kv_mask
    # A hidden logit is finite, so that a head without a real key gives zeros instead of NaN.
    weights = jnp.where(real[None, :], jax.nn.softmax(jnp.where(real[None, :], q @ k.T, HIDDEN), axis=-1), 0)
    asked = query_mask(None, kv_mask, q.shape[0])
    uniform = real.astype(weights.dtype) / jnp.maximum(jnp.sum(real), 1).astype(weights.dtype)

    def shares(x: Array) -> Array:
        x = x if asked is None else jnp.where(asked[:, None], x, 0)  # padding has no row
        cumulative = jnp.cumsum(jnp.linalg.svd(x, compute_uv=False))
        return cumulative / jnp.where(cumulative[-1] > 0, cumulative[-1], 1)

    return Spectrum(shares(weights), shares(weights - uniform[None, :]))


def left_spectrum(x: Float[Array, "T S"]) -> tuple[Array, Array]:
    """The left singular vectors ``[T, T]`` of a matrix and its squared singular values ``[T]``, the largest first.

    Computed from the Gram matrix, whose size does not depend on the number of keys. Its rounding error is about 1e-6 of
    the sum of squares, so the remainder beyond a rank is accurate if its norm exceeds a thousandth of that of the
    matrix.
    """
    squares, left = jnp.linalg.eigh(x @ x.T)
    return left[:, ::-1], jnp.maximum(squares[::-1], 0)


def rank_within(squares: Float[Array, " R"], error: float) -> Array:
    r"""The smallest rank with a relative Frobenius error of at most ``error``.

    .. math:: \sum_{i > r} \sigma_i^2 \le \epsilon^2 \sum_i \sigma_i^2

    Args:
        squares: squared singular values ``[R]``, the largest first.
        error: :math:`\epsilon`.

    Returns:
        The rank, int32.

    Example:
        >>> import jax.numpy as jnp
        >>> int(rank_within(jnp.array([16.0, 8.0, 1.0]), 0.2))
        2
    """
    # Summed from the smallest, so that rounding does not dominate.
    rest = jnp.cumsum(squares[::-1])[::-1]
    return jnp.sum(rest > error**2 * rest[0], dtype=jnp.int32)
