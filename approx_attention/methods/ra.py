"""Randomised attention: an unbiased draw of softmax attention, at quadratic cost."""

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
    check_choice,
    check_count,
    check_floating,
    check_key,
    dense_state,
    head_inputs,
    in_blocks,
    out_of_blocks,
    output_or_state,
    query_mask,
    squared_norm,
)

# Logits of at most this many pairs exist at a time.
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
    r"""Randomised attention: the random feature of each query is drawn from the very mixture that makes it unbiased.

    With :math:`q, k` scaled by :math:`\sqrt s`, weights :math:`\pi_{tm}` of softmax attention, and R draws per query,

    .. math:: m \sim \pi_t, \qquad \epsilon \sim N(0, I), \qquad w = q_t + k_m + \epsilon, \qquad
              \mathrm{out}_t = \sum_j \frac{e^{w \cdot k_j - \|k_j\|^2/2}}{\sum_i e^{w \cdot k_i - \|k_i\|^2/2}}\, v_j,

    whose expectation is softmax attention exactly. It costs more than exact attention: it is the yardstick of the
    linear methods that approximate its proposal, `lara` and `eva`. A bias :math:`b_j` of the logits enters both
    exponents.

    Gradients flow through w and the noise is reparameterised, but the drawn index m is a constant to them: gradients
    with respect to q and k are biased.

    Shared arguments: see `approx_attention.methods`.

    Args:
        key: typed PRNG key; not needed if ``noise`` and ``indices`` are given.
        num_samples: the number R of draws that are averaged, unless they are given.
        noise: :math:`\epsilon` ``[T, R, D]`` in place of a draw.
        indices: m ``[T, R]`` in place of a draw.
        noise_scale: ``"exact"``, or ``"official"`` for the noise of the authors' code, which is :math:`D^{1/4}` times
            too small in scaled space and makes the estimate biased.
        mask: true where a query may see a key, ``[T, S]``.
        bias: added to the logits, ``[T, S]``.
        return_state: return the `AttentionState`, in the accumulation dtype; its log-normalisers are exact.

    Raises:
        ValueError: shapes that do not fit, counts below 1, neither key nor draws.
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
    check_choice("noise_scale", noise_scale, ("exact", "official"))
    q, k, v = head_inputs(q, k, v, scale=scale, kv_mask=kv_mask, is_causal=is_causal)
    check_bias_and_mask(bias, mask, num_queries, num_keys)
    num_samples = check_count("num_samples", num_samples)
    if indices is not None:
        check_array("indices", indices, "integers")
    if noise is not None:
        check_floating("noise", noise)
        if noise.ndim != 3:
            raise ValueError(f"noise must be [T, R, D], got shape {noise.shape}")
        num_samples = noise.shape[1]
    uniform = jnp.zeros((num_queries, num_samples), q.dtype)
    if noise is None or indices is None:
        key_noise, key_index = jax.random.split(check_key("ra", key))
        # In self-attention a query draws by its rank among the real ones.
        own = query_mask(None, kv_mask, num_queries)
        drawer = slice(None) if own is None else RealFirst.of(own).position
        if indices is None:
            uniform = jax.random.uniform(key_index, (num_queries, num_samples), q.dtype)[drawer]
        if noise is None:
            noise = jax.random.normal(key_noise, (num_queries, num_samples, head_dim), q.dtype)[drawer]
    for name, x, shape in (
        ("noise", noise, (num_queries, num_samples, head_dim)),
        ("indices", indices, (num_queries, num_samples)),
    ):
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got shape {x.shape}")
    noise = noise.astype(q.dtype)
    if noise_scale == "official":
        noise = noise * head_dim**-0.25
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

        def draw(noise: Array, uniform: Array, indices: Array | None) -> Array:
            if indices is None:
                logits = jnp.where(total_bias <= HIDDEN / 2, HIDDEN, q @ k.T + total_bias)
                weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
                cumulative = jnp.cumsum(lax.stop_gradient(weights), axis=-1)
                # The first key in sight at which the share of the weights reaches a uniform number in (0, 1].
                reached = (cumulative >= (1 - uniform[:, None]) * cumulative[:, -1:]) & (weights > 0)
                indices = jnp.where(
                    jnp.any(reached, axis=-1), jnp.argmax(reached, axis=-1), jnp.argmax(weights, axis=-1)
                )
            w = q + k[indices] + noise
            return dense_state(w, k, v, total_bias - half_norm).out

        outs = jax.vmap(draw, in_axes=(1, 1, None if indices is None else 1))(noise, uniform, indices)
        seen = (exact.lse > -jnp.inf) | jnp.isnan(exact.lse)
        return AttentionState(jnp.where(seen[:, None], jnp.mean(outs, axis=0), 0), exact.lse)

    rows = max(1, min(num_queries, TILE // (num_keys * num_samples)))
    arguments = (q, jnp.arange(num_queries), noise, uniform, indices, mask, bias)
    arguments = jax.tree.map(lambda x: in_blocks(x, rows), arguments)
    state = out_of_blocks(lax.map(jax.checkpoint(block), arguments), num_queries)
    return state
