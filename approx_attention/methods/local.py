"""Local window attention: exact on nearby keys, ignoring all others."""

from jax import Array
from jaxtyping import Bool, Float

from approx_attention import kernels
from approx_attention.core import (
    AttentionState,
    as_pair,
    check_count,
    checked_soft_cap,
    head_inputs,
    mask_bias,
    output_or_state,
    over_real_tokens,
)


@output_or_state
def local(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    window_size: int | tuple[int, int] = 128,
    is_causal: bool = False,
    logits_soft_cap: float | None = None,
    kv_mask: Bool[Array, " S"] | None = None,
    scale: float | Array | None = None,
) -> AttentionState:
    r"""Softmax attention over the keys within a window around each query.

    .. math:: \mathrm{out}_t = \sum_{j = t-l}^{t+r} e^{s\, q_t \cdot k_j}\, v_j
              \Big/ \sum_{j = t-l}^{t+r} e^{s\, q_t \cdot k_j}

    Shared arguments: see `approx_attention.methods`.

    Args:
        window_size: a number w, or a pair ``(l, r)`` of the numbers of tokens before and after the query's own, as in
            `jax.nn.dot_product_attention`. With ``is_causal``, w means l = w - 1 and r = 0 (w tokens in all, with the
            query's own), and the r later tokens of a pair stay hidden. Else w means l = r = w - 1 (2w - 1 tokens in
            all).

    Raises:
        ValueError: shapes that do not match, a window below 1 or with negative sides.
        TypeError: dtypes that are not floating point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import local
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (6, 4)) for i in range(3))
        >>> bool(jnp.allclose(local(q, k, v, window_size=1), v, atol=1e-6))
        True

    Reference:
        :cite:p:`beltagy2020longformer`, section 3.1.
    """
    q, k, v = head_inputs(q, k, v, scale=scale, kv_mask=kv_mask, is_causal=is_causal)
    left, right = window_sides(window_size, is_causal)
    cap = checked_soft_cap(logits_soft_cap)

    def window(q: Array, k: Array, v: Array, kv_mask: Array | None) -> AttentionState:
        key_bias = None if kv_mask is None else mask_bias(kv_mask, q.dtype)
        return kernels.state(q, k, v, key_bias, left=left, right=right, logits_soft_cap=cap)

    # A window counts real tokens: padding between two tokens does not change their distance.
    return over_real_tokens(window, q, k, v, kv_mask, is_causal=is_causal)


def window_sides(window_size: int | tuple[int, int], is_causal: bool) -> tuple[int, int]:
    """The numbers of keys that a query sees before and after its own position.

    Args:
        window_size: w, for w - 1 keys on each side, or a pair of the two numbers, as in `local`.
        is_causal: whether a query sees no later keys.

    Raises:
        ValueError: a size below 1, or a negative number in a pair.
        TypeError: sizes that are not integers.

    Example:
        >>> from approx_attention.methods import window_sides
        >>> window_sides(3, False), window_sides((4, 1), True)
        ((2, 2), (4, 0))
    """
    if isinstance(window_size, tuple):
        left, right = as_pair("window_size", window_size, least=0)
    else:
        left = right = check_count("window_size", window_size) - 1
    return left, 0 if is_causal else right
