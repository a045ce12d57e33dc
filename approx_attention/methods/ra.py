"""Randomised attention: an unbiased estimate of softmax attention, at quadratic cost."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from approx_attention.core import (
    HIDDEN,
    AttentionState,
    RealFirst,
    check_array,
    check_bias_and_mask,
    check_count,
    check_floating,
    check_key,
    dense_state,
    head_inputs,
    in_blocks,
    noise_deviation,
    out_of_blocks,
    output_or_state,
    query_mask,
    squared_norm,
)

# Number of logits computed at once: an array of 16 MiB in float32.
TILE = 2**22


@output_or_state
def ra(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    num_samples: int = 1,
    noise: Float[Array, "T R D"] | None = None,
    indices: Int[Array, "T R"] | None = None,
    noise_scale: Literal["exact", "official"] = "exact",
    is_causal: bool = False,
    kv_mask: Bool[Array, " S"] | None = None,
    mask: Bool[Array, "T S"] | None = None,
    bias: Float[Array, "T S"] | None = None,
    scale: float | Array | None = None,
) -> AttentionState:
    r"""Randomised attention: an unbiased estimate of softmax attention with one random feature per query and sample.

    With :math:`q, k` scaled by :math:`\sqrt s`, weights :math:`\pi_{tm}` of softmax attention, and R samples per query,

    .. math:: m \sim \pi_t, \qquad \epsilon \sim N(0, I), \qquad w = q_t + k_m + \epsilon, \qquad
              \mathrm{out}_t = \sum_j \frac{e^{w \cdot k_j - \|k_j\|^2/2}}{\sum_i e^{w \cdot k_i - \|k_i\|^2/2}}\, v_j,

    whose expectation is exactly softmax attention. It costs more than exact attention, and serves as the reference for
    `lara` and `eva`, which approximate its proposal in linear time. A bias :math:`b_j` of the logits enters both
    exponents.

    Gradients flow through w, with reparameterised noise, but the sampled index m is treated as constant: gradients with
    respect to q and k are biased.

    Shared arguments: see `approx_attention.methods`.

    Args:
        key: typed PRNG key; not needed if ``noise`` and ``indices`` are given.
        num_samples: the number R of averaged samples, unless they are given.
        noise: :math:`\epsilon` ``[T, R, D]``; by default sampled.
        indices: m ``[T, R]``; by default sampled.
        noise_scale: ``"exact"``, or ``"official"`` for the noise of the authors' code, which is :math:`D^{1/4}` times
            too small in scaled space and makes the estimate biased.
        mask: true where a key is visible to a query, ``[T, S]``.
        bias: added to the logits, ``[T, S]``.
        return_state: return the `AttentionState`, in the accumulation dtype; its log-normalisers are exact.

    Raises:
        ValueError: shapes that do not match, counts below 1, neither key nor samples.
        TypeError: dtypes that are not floating point (or boolean, for masks).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import exact, ra
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (8, 4)) for i in range(3))
        >>> out = ra(q, k, v, jax.random.key(3), num_samples=4096)
        >>> bool(jnp.abs(out - exact(q, k, v)).max() < 0.1)
        True

    Reference:
        :cite:p:`zheng2022linear`, section 3.
    """
    head_dim, num_queries, num_keys = q.shape[-1], q.shape[0], k.shape[0]
    deviation = noise_deviation(noise_scale, head_dim)
    q, k, v = head_inputs(q, k, v, scale=scale, kv_mask=kv_mask, is_causal=is_causal)
    check_bias_and_mask(bias, mask, num_queries, num_keys)
    num_samples = check_count("num_samples", num_samples)
    noise, uniform, indices = _samples(q, key, num_samples, noise, indices, query_mask(None, kv_mask, num_queries))
    noise = deviation * noise
    half_norm = squared_norm(k).T / 2
    positions = jnp.arange(num_keys)[None, :]

    def block(args: Any) -> AttentionState:
        q, row, noise, uniform, indices, mask, bias = args
        total_bias = jnp.zeros((1, num_keys), q.dtype) if bias is None else bias.astype(q.dtype)
        for seen in (
            None if kv_mask is None else kv_mask[None, :],
            positions <= row[:, None] if is_causal else None,
            mask,
        ):
            if seen is not None:
                total_bias = jnp.where(seen, total_bias, HIDDEN)
        exact = dense_state(q, k, v, total_bias)

        def one_sample(noise: Array, uniform: Array, index: Array | None) -> Array:
            if index is None:
                logits = jnp.where(total_bias <= HIDDEN / 2, HIDDEN, q @ k.T + total_bias)
                index = _sampled_keys(logits, uniform)
            w = q + k[index] + noise
            return dense_state(w, k, v, total_bias - half_norm).out

        outs = jax.vmap(one_sample, in_axes=(1, 1, None if indices is None else 1))(noise, uniform, indices)
        seen = (exact.lse > -jnp.inf) | jnp.isnan(exact.lse)
        return AttentionState(jnp.where(seen[:, None], jnp.mean(outs, axis=0), 0), exact.lse)

    rows = max(1, min(num_queries, TILE // (num_keys * uniform.shape[1])))
    arguments = (q, jnp.arange(num_queries), noise, uniform, indices, mask, bias)
    arguments = jax.tree.map(lambda x: in_blocks(x, rows), arguments)
    return out_of_blocks(lax.map(jax.checkpoint(block), arguments), num_queries)


def _samples(
    q: Array, key: Array | None, num_samples: int, noise: Array | None, indices: Array | None, own: Array | None
) -> tuple[Array, Array, Array | None]:
    """Noise ``[T, R, D]``, and uniform numbers ``[T, R]`` that choose keys where no indices are given."""
    num_queries, head_dim = q.shape
    if indices is not None:
        check_array("indices", indices, "integers")
    if noise is not None:
        check_floating("noise", noise)
        if noise.ndim != 3:
            raise ValueError(f"noise must be [T, R, D], got shape {noise.shape}")
        num_samples = noise.shape[1]
    elif indices is not None and indices.ndim == 2:
        num_samples = indices.shape[1]
    uniform = jnp.zeros((num_queries, num_samples), q.dtype)
    if noise is None or indices is None:
        key_noise, key_index = jax.random.split(check_key("ra", key))
        # In self-attention a query samples by its rank among the real ones, so that padding changes nothing.
        row = slice(None) if own is None else RealFirst.of(own).position
        if indices is None:
            uniform = jax.random.uniform(key_index, (num_queries, num_samples), q.dtype)[row]
        if noise is None:
            noise = jax.random.normal(key_noise, (num_queries, num_samples, head_dim), q.dtype)[row]
    for name, x, shape in (
        ("noise", noise, (num_queries, num_samples, head_dim)),
        ("indices", indices, (num_queries, num_samples)),
    ):
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got shape {x.shape}")
    return noise.astype(q.dtype), uniform, indices


def _sampled_keys(logits: Array, uniform: Array) -> Array:
    """A key for each row of logits ``[T, S]`` by its softmax weights: the inverse of their cumulative sum."""
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    cumulative = jnp.cumsum(lax.stop_gradient(weights), axis=-1)
    # The first visible key at which the cumulative weights reach a uniform number in (0, 1].
    reached = (cumulative >= (1 - uniform[:, None]) * cumulative[:, -1:]) & (weights > 0)
    # Rounding can leave every cumulative weight below that number: then take the heaviest key.
    return jnp.where(jnp.any(reached, axis=-1), jnp.argmax(reached, axis=-1), jnp.argmax(weights, axis=-1))
