"""Top-k attention: every query over the keys of its largest logits."""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from approx_attention.core import (
    AttentionState,
    along_with,
    check_count,
    checked_soft_cap,
    head_inputs,
    in_blocks,
    out_of_blocks,
    output_or_state,
    real_keys,
)
from approx_attention.sparse import gathered_state

# Queries and keys per tile of logits: the search makes one tile at a time.
QUERY_BLOCK, KEY_BLOCK = 512, 1024


@output_or_state
def top_k(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    keys_per_query: int = 32,
    is_causal: bool = False,
    logits_soft_cap: float | None = None,
    kv_mask: Bool[Array, " S"] | None = None,
    scale: float | Array | None = None,
) -> AttentionState:
    r"""Softmax attention of every query over the K keys with the largest logits.

    .. math:: \mathrm{out}_t
              = \sum_{j \in S_t} e^{s\, q_t \cdot k_j}\, v_j \Big/ \sum_{j \in S_t} e^{s\, q_t \cdot k_j},
              \qquad S_t = \operatorname{arg\,top}_K\; q_t \cdot k_j

    The keys are found exactly, block by block, with the best so far. Memory is linear; time is not, since every logit
    is computed. This saves the memory of the weights and the products with the values, and shows the best that a search
    for the largest logits can reach. The total variation to softmax is the weight left out. The choice of keys has no
    gradient; of equal logits the first keys are chosen.

    Shared arguments: see `approx_attention.methods`.

    Args:
        keys_per_query: the number K of keys; with K >= S the output is exact.

    Raises:
        ValueError: shapes that do not fit, a count below 1.
        TypeError: dtypes that are not floating point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import top_k
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (6, 4)) for i in range(3))
        >>> best = jnp.argmax(q @ k.T, axis=1)
        >>> bool(jnp.allclose(top_k(q, k, v, keys_per_query=1), v[best], atol=1e-6))
        True

    Reference:
        :cite:p:`gupta2021topk`, section 3.
    """
    count = min(check_count("keys_per_query", keys_per_query), k.shape[0])
    q, k, v = head_inputs(q, k, v, scale=scale, kv_mask=kv_mask, is_causal=is_causal)
    logits, places = largest_logits(q, k, count, is_causal=is_causal, kv_mask=kv_mask)
    # The logits are computed again, from the gathered keys alone: the search has no gradient.
    return gathered_state(q, k, v, places, is_found(logits), logits_soft_cap=checked_soft_cap(logits_soft_cap))


def largest_logits(
    q: Array,
    k: Array,
    count: int,
    *,
    key_bias: Array | None = None,
    is_causal: bool = False,
    kv_mask: Array | None = None,
) -> tuple[Array, Array]:
    """The largest logits of every query, in falling order, and their keys.

    Shared arguments: see `approx_attention.methods`.

    Args:
        q: queries ``[T, D]`` in scaled space.
        k: keys ``[S, D]`` in scaled space.
        count: the number of keys per query.
        key_bias: added to the logits of each key ``[S]``, or None.

    Returns:
        The logits with their biases ``[T, count]``, -inf where the query sees fewer keys, and the places of their keys,
        int32 ``[T, count]``. Neither has a gradient.
    """
    num_queries, num_keys = q.shape[0], k.shape[0]
    lift = jnp.zeros(num_keys, q.dtype) if key_bias is None else key_bias
    q, k, lift = lax.stop_gradient((q, k, lift))
    real = real_keys(kv_mask, num_keys)
    rows, columns = min(num_queries, QUERY_BLOCK), min(num_keys, KEY_BLOCK)
    numbers = jnp.arange(num_keys, dtype=jnp.int32)
    key_blocks = tuple(in_blocks(x, columns) for x in (k, lift, real, numbers))

    def of_rows(args: tuple[Array, Array]) -> tuple[Array, Array]:
        q, position = args

        def search(best: tuple[Array, Array], block: tuple[Array, ...]) -> tuple[tuple[Array, Array], None]:
            k, lift, real, number = block
            seen = real[None, :]
            if is_causal:
                seen = seen & (number[None, :] <= position[:, None])
            logits = jnp.where(seen, q @ k.T + lift[None, :], -jnp.inf)
            # The best of a block are few, so that few are sorted twice; the earlier come first, and so win ties.
            logits, place = lax.top_k(logits, min(count, columns))
            both = jnp.concatenate([best[0], logits], axis=1), jnp.concatenate([best[1], number[place]], axis=1)
            logits, place = lax.top_k(both[0], count)
            return (logits, jnp.take_along_axis(both[1], place, axis=1)), None

        none = jnp.full((rows, count), -jnp.inf, q.dtype), jnp.zeros((rows, count), jnp.int32)
        return lax.scan(search, along_with(none, q, k, lift, real), key_blocks)[0]

    positions = jnp.arange(num_queries, dtype=jnp.int32)
    found = lax.map(of_rows, (in_blocks(q, rows), in_blocks(positions, rows)))
    return out_of_blocks(found, num_queries)


def is_found(logits: Array) -> Array:
    """Which of the largest logits belong to a key that the query sees."""
    # Not `> -inf`, which is false of NaN: a NaN counts, so that it comes out.
    return logits != -jnp.inf
