"""Longformer: softmax attention over a sliding window and a few global tokens."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from approx_attention import kernels
from approx_attention.core import (
    HIDDEN,
    AttentionState,
    check_count,
    checked_soft_cap,
    head_inputs,
    mask_bias,
    merge,
    output_or_state,
    over_real_tokens,
    real_keys,
)


@output_or_state
def longformer(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    window_size: int = 128,
    num_global: int = 4,
    is_causal: bool = False,
    logits_soft_cap: float | None = None,
    kv_mask: Bool[Array, " S"] | None = None,
    scale: float | Array | None = None,
) -> AttentionState:
    r"""Longformer: softmax attention over a sliding window and a few global tokens.

    .. math:: \mathrm{out}_t
              = \sum_{j \in S_t} e^{s\, q_t \cdot k_j}\, v_j \Big/ \sum_{j \in S_t} e^{s\, q_t \cdot k_j},
              \qquad S_t = \begin{cases} \{0, \dots, S - 1\} & t < G \\
              \{j : |t - j| < w\} \cup \{0, \dots, G - 1\} & \text{else.} \end{cases}

    A global token sees every key, and every query sees it. The first G real tokens are global, so place global tokens
    first. The published model has separate projections of q, k and v for global attention; here there is one q, k
    and v. In the causal form the window lies before the query, and global tokens do not see later keys either: a window
    with attention sinks.

    Shared arguments: see `approx_attention.methods`.

    Args:
        window_size: w: the query's own position and w - 1 tokens on each side (only before it if causal).
        num_global: the number G of global tokens; by default 4, the usual number of attention sinks.

    Raises:
        ValueError: shapes that do not match, a window without any key.
        TypeError: dtypes that are not floating point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import exact, longformer
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (32, 4)) for i in range(3))
        >>> out = longformer(q, k, v, window_size=2, num_global=3)
        >>> bool(jnp.allclose(out[:3], exact(q, k, v)[:3], atol=1e-6))
        True

    Reference:
        :cite:p:`beltagy2020longformer`, section 3.1; sinks: :cite:p:`xiao2023sinks`.
    """
    num_keys = k.shape[0]
    left = check_count("window_size", window_size) - 1
    num_global = min(check_count("num_global", num_global, least=0), num_keys)
    state_of = functools.partial(kernels.state, logits_soft_cap=checked_soft_cap(logits_soft_cap))
    q, k, v = head_inputs(q, k, v, scale=scale, kv_mask=kv_mask, is_causal=is_causal)

    def window_and_global(q: Array, k: Array, v: Array, kv_mask: Array | None) -> AttentionState:
        bias = mask_bias(real_keys(kv_mask, num_keys), q.dtype)
        # Global keys are hidden from the window, because every query sees them in the other state; none counts twice.
        not_global = jnp.where(jnp.arange(num_keys) < num_global, HIDDEN, bias)
        state = state_of(q, k, v, not_global, left=left, right=0 if is_causal else left)
        if num_global == 0:
            return state
        columns = state_of(q, *(x[:num_global] for x in (k, v, bias)))
        # Global queries see all keys, so their state is computed separately instead of merged.
        if is_causal:
            rows = state_of(*(x[:num_global] for x in (q, k, v, bias)), left=num_global, right=0)
        else:
            rows = state_of(q[:num_global], k, v, bias)
        return jax.tree.map(lambda x, row: x.at[: row.shape[0]].set(row), merge(state, columns), rows)

    return over_real_tokens(window_and_global, q, k, v, kv_mask, is_causal=is_causal)
