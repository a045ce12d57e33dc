"""The keys of the largest logits of each query, found exactly: block by block, in linear memory."""

import jax.numpy as jnp
from jax import Array, lax

from approx_attention.core import along_with, in_blocks, out_of_blocks, real_keys

# Queries and keys per tile of logits: the search makes one tile at a time.
QUERY_BLOCK, KEY_BLOCK = 512, 1024


def tile_shape(num_queries: int, num_keys: int) -> tuple[int, int]:
    """The numbers of queries and of keys whose logits `largest_logits` makes at once."""
    return min(num_queries, QUERY_BLOCK), min(num_keys, KEY_BLOCK)


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
    rows, columns = tile_shape(num_queries, num_keys)
    numbers = jnp.arange(num_keys, dtype=jnp.int32)
    key_blocks = tuple(in_blocks(x, columns) for x in (k, lift, real, numbers))

    def of_rows(args: tuple[Array, Array]) -> tuple[Array, Array]:
        q, position = args

        def search(best: tuple[Array, Array], block: tuple[Array, ...]) -> tuple[tuple[Array, Array], None]:
            k, lift, real, number = block
            # Also without a causal mask, where all positions are after the keys: a mask of keys alone is the same for
            # all tiles of queries, and differentiation would move it out of their loop and store it for all rows.
            seen = real[None, :] & (number[None, :] <= position[:, None])
            logits = jnp.where(seen, q @ k.T + lift[None, :], -jnp.inf)
            # Each block keeps only its best keys, so the second sort is small; the earlier come first, and win ties.
            logits, place = lax.top_k(logits, min(count, columns))
            both = jnp.concatenate([best[0], logits], axis=1), jnp.concatenate([best[1], number[place]], axis=1)
            logits, place = lax.top_k(both[0], count)
            return (logits, jnp.take_along_axis(both[1], place, axis=1)), None

        none = jnp.full((rows, count), -jnp.inf, q.dtype), jnp.zeros((rows, count), jnp.int32)
        return lax.scan(search, along_with(none, q, k, lift, real), key_blocks)[0]

    positions = jnp.arange(num_queries, dtype=jnp.int32) + (0 if is_causal else num_keys)
    found = lax.map(of_rows, (in_blocks(q, rows), in_blocks(positions, rows)))
    return out_of_blocks(found, num_queries)


def is_found(logits: Array) -> Array:
    """The mask of largest logits that belong to a visible key."""
    # Not `> -inf`, which is false of NaN: a NaN counts, so that it comes out.
    return logits != -jnp.inf
