"""Skyformer: a Nystrom approximation of attention with a Gaussian kernel."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from approx_attention import kernels
from approx_attention.core import (
    HIDDEN,
    check_count,
    check_floating,
    check_key,
    check_number,
    check_positive,
    count_real,
    head_inputs,
    query_mask,
    ranks,
    real_keys,
    segment_means,
    segments_of,
    squared_norm,
)
from approx_attention.methods.nystrom import solve_positive


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
    r"""Skyformer: a Nystrom approximation of *kernelised* attention, which is not softmax attention.

    Kernelised attention has Gaussian weights and no normaliser:

    .. math:: \mathrm{out}_t = \sum_j \kappa(q_t, k_j)\, v_j, \qquad \kappa(x, y) = e^{-s \|x - y\|^2 / 2}.

    :math:`\kappa(q, k)` is a block of the positive semi-definite kernel matrix of all N = T + S rows of :math:`[q; k]`.
    With a uniform sample x of M real rows,

    .. math:: \mathrm{out} = \kappa(q, x)\, \big(\kappa(x, x) + \gamma I\big)^{-1} \big(\kappa(x, k)\, v\big).

    The weights do not sum to 1 and may be negative. The normalisation that the authors apply to the middle matrix
    cancels from this formula, which is solved directly instead of by their iteration. There is no causal form.

    Shared arguments: see `approx_attention.methods`.

    Args:
        key: typed PRNG key; not needed if ``noise`` is given.
        num_landmarks: the number M of rows, sampled without replacement; with M >= T + S and a small ridge the output
            is kernelised attention.
        ridge: :math:`\gamma`; in float32 not much below :math:`10^{-7} M`.
        noise: a priority per row of :math:`[q; k]`, ``[T + S]``; the M rows of largest priority are the sample.
        scale: factor s of the squared distances, ``1/sqrt(D)`` by default.

    Raises:
        ValueError: shapes that do not match, counts below 1, a ridge that is not positive, neither key nor noise.
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
        if q_mask is not None or kv_mask is not None:  # by rank among real rows, so that padding changes nothing
            first_key = num_queries if q_mask is None else count_real(q_mask)
            noise = noise[jnp.concatenate([ranks(q_mask, num_queries), first_key + ranks(kv_mask, num_keys)])]
    else:
        check_floating("noise", noise)
        if noise.shape != (num_queries + num_keys,):
            raise ValueError(f"noise must be [T + S] = [{num_queries + num_keys}], got shape {noise.shape}")
    # The kernel depends on differences only, so rows may be shifted; rounding is smallest if they are small.
    center = lax.stop_gradient(segment_means(k, segments_of(num_keys, 1, kv_mask), kv_mask))
    q, k = q - center, k - center

    real_key = real_keys(kv_mask, num_keys)
    real = jnp.concatenate([real_keys(q_mask, num_queries), real_key])
    priority, chosen = lax.top_k(jnp.where(real, noise.astype(q.dtype), -jnp.inf), num_landmarks)
    present = priority > -jnp.inf
    rows = jnp.where(present[:, None], jnp.concatenate([q, k])[chosen], 0)

    # From differences: the rounding of products could make the matrix indefinite. The solve is in float32.
    gram = jnp.exp(-jnp.sum((rows[:, None, :] - rows[None, :, :]) ** 2, axis=-1) / 2)
    gram = jnp.where(present[:, None] & present[None, :], gram, 0)
    # The row and column of an absent landmark are those of the identity, so it gets no weight.
    diagonal = jnp.where(present, ridge, 1 + ridge)
    values = solve_positive(gram + jnp.diag(diagonal.astype(gram.dtype)), _gaussian_sums(rows, k, v, real_key))
    return _gaussian_sums(q, rows, values, present).astype(dtype)


def _gaussian_sums(x: Array, y: Array, w: Array, present: Array) -> Array:
    r"""The sums :math:`\sum_j e^{-\|x_i - y_j\|^2 / 2} w_j` over the present rows y, computed as softmax attention."""
    state = kernels.state(x, y, w, jnp.where(present, -squared_norm(y)[:, 0] / 2, HIDDEN))
    return state.out * jnp.exp(state.lse[:, None] - squared_norm(x) / 2)
