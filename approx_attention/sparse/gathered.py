"""Exact attention of each query over a few keys, which are gathered."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from approx_attention.core import AttentionState, dense_state, in_blocks, mask_bias, out_of_blocks, pad_rows

# Number of pattern entries whose keys and values are gathered at once: with 64 channels each, 4 MB in float32.
GATHERED = 2**13


def rows_gathered(num_queries: int, per_query: int) -> int:
    """The number of queries whose ``per_query`` keys and values each are gathered at once."""
    return min(num_queries, max(1, GATHERED // per_query))


def gathered_state(
    q: Array,
    k: Array,
    v: Array,
    places: Array,
    seen: Array,
    bias: Array | None = None,
    *,
    logits_soft_cap: float | None = None,
) -> AttentionState:
    r"""Exact attention of each query over K gathered keys, at a cost of O(T K (D + Dv)).

    .. math:: \mathrm{out}_t = \sum_i e^{q_t \cdot k_{p_{ti}} + b_{ti}} v_{p_{ti}}
              \Big/ \sum_i e^{q_t \cdot k_{p_{ti}} + b_{ti}}

    Args:
        q: queries ``[T, D]`` in scaled space.
        k: keys ``[S, D]``.
        v: values ``[S, Dv]``.
        places: the indices p of the keys, int32 ``[T, K]``.
        seen: mask of valid entries ``[T, K]``; no key twice.
        bias: added to the logits ``[T, K]``, or None.
        logits_soft_cap: that of `kernels.state`.

    Returns:
        The `AttentionState` of the queries.
    """
    num_queries, per_query = places.shape
    # Invalid entries refer to a row of zeros, so that NaN in a key cannot enter.
    k, v = pad_rows(k, 1), pad_rows(v, 1)
    places = jnp.where(seen, places, k.shape[0] - 1)
    rows = rows_gathered(num_queries, per_query)

    @jax.checkpoint
    def of_rows(args: tuple[Array, Array, Array | None]) -> AttentionState:
        q, places, bias = args
        # The barrier keeps the gather separate: fused into the products, it would read the rows once per use.
        k_own, v_own = lax.optimization_barrier((k[places], v[places]))
        hidden = mask_bias(places < k.shape[0] - 1, q.dtype)
        bias = hidden if bias is None else hidden + bias
        of_row = functools.partial(dense_state, logits_soft_cap=logits_soft_cap)
        state = jax.vmap(lambda q, k, v, bias: of_row(q[None], k, v, bias[None]))(q, k_own, v_own, bias)
        return jax.tree.map(lambda x: x[:, 0], state)

    blocks = in_blocks(q, rows), in_blocks(places, rows), None if bias is None else in_blocks(bias, rows)
    state = lax.map(of_rows, blocks)
    return out_of_blocks(state, num_queries)
