"""HyperAttention: exact attention within blocks of sorted hashes, and a uniform sample of the other keys."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from approx_attention.core import (
    HIDDEN,
    AttentionState,
    RealFirst,
    check_count,
    check_key,
    count_real,
    dense_state,
    head_inputs,
    mask_bias,
    merge,
    out_of_blocks,
    output_or_state,
    pad_rows,
    real_keys,
)
from approx_attention.coresets import random_places

# The signs of one token are an int32.
MOST_HASHES = 31


@output_or_state
def hyper_attention(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    sample_size: int = 256,
    block_size: int = 256,
    num_hashes: int = 7,
    kv_mask: Bool[Array, " S"] | None = None,
    scale: float | Array | None = None,
) -> AttentionState:
    r"""HyperAttention: sorted locality-sensitive hashing for the large weights, sampling for the rest.

    Queries and keys are hashed by the signs of b random projections, read as Gray codes so that neighbouring codes
    differ in one sign, and sorted by code. With B(t) the keys in the block of query t and I a uniform sample of M keys,

    .. math:: \mathrm{out}_t = \frac{\sum_{j \in B(t)} e^{s\, q_t \cdot k_j} v_j
              + \frac{n}{M} \sum_{j \in I \setminus B(t)} e^{s\, q_t \cdot k_j} v_j}
              {\sum_{j \in B(t)} e^{s\, q_t \cdot k_j}
              + \frac{n}{M} \sum_{j \in I \setminus B(t)} e^{s\, q_t \cdot k_j}}.

    Given the hashes, numerator and normaliser are unbiased. In self-attention (T = S) padded queries are in the last
    blocks; if T != S, padded queries also take places in blocks. There is no causal form: a query's block depends on
    the hashes of all queries, including later ones. The published causal recursion has the same leak.

    Shared arguments: see `approx_attention.methods`.

    Args:
        sample_size: the number M of sampled keys; with M >= S the output is exact.
        block_size: queries per block; a block has as many real keys (in proportion, if S != T).
        num_hashes: the number b of random signs, at most 31.

    Raises:
        ValueError: shapes that do not match, counts below 1, more than 31 signs, no key.
        TypeError: dtypes that are not floating point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import exact, hyper_attention
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (64, 8)) for i in range(3))
        >>> out = hyper_attention(q, k, v, jax.random.key(3), sample_size=64, block_size=16)
        >>> bool(jnp.allclose(out, exact(q, k, v), atol=1e-5))
        True

    Reference:
        :cite:p:`han2023hyperattention`, algorithms 1 and 3.
    """
    block_size = check_count("block_size", block_size)
    num_hashes = check_count("num_hashes", num_hashes)
    if num_hashes > MOST_HASHES:
        raise ValueError(f"num_hashes must be at most {MOST_HASHES}, got {num_hashes}: the signs must fit in an int32")
    sample_size = min(check_count("sample_size", sample_size), k.shape[0])
    q, k, v = head_inputs(q, k, v, scale=scale, kv_mask=kv_mask)
    key_hash, key_sample = jax.random.split(check_key("hyper_attention", key))
    real = real_keys(kv_mask, k.shape[0])

    planes = jax.random.normal(key_hash, (q.shape[1], num_hashes), q.dtype)
    rank_q, rank_k = _gray_rank(q, planes), _gray_rank(k, planes)
    is_self = q.shape[0] == k.shape[0]
    order_q = jnp.argsort(rank_q, stable=True)
    if kv_mask is not None and is_self:  # real queries first
        order_q = jnp.lexsort((rank_q, ~kv_mask))
    order_k = jnp.lexsort((rank_k, ~real))
    # The number of blocks of keys is that of queries.
    num_blocks = -(-q.shape[0] // block_size)
    keys_per_block = room = -(-k.shape[0] // num_blocks)

    def in_blocks(x: Array, length: int) -> Array:
        return pad_rows(x, num_blocks * length - x.shape[0]).reshape(num_blocks, length, *x.shape[1:])

    if kv_mask is None:
        near = tuple(in_blocks(x[order_k], room) for x in (k, v, real))
        sampled = random_places(real.astype(k.dtype), sample_size, key_sample)
    else:
        # Blocks of real keys only, so that padding does not move a key to another block.
        num_real = jnp.maximum(count_real(kv_mask), 1)
        keys_per_block = -(-num_real // (-(-num_real // block_size) if is_self else num_blocks))
        # In self-attention a block of queries meets no more keys than it has queries.
        room = min(block_size, k.shape[0]) if is_self else room
        number = jnp.arange(room, dtype=jnp.int32)[None, :]
        place = jnp.arange(num_blocks, dtype=jnp.int32)[:, None] * keys_per_block + number
        inside = (number < keys_per_block) & (place < k.shape[0])
        place = order_k[jnp.minimum(place, k.shape[0] - 1)]
        near = k[place], v[place], inside & real[place]
        # Noise goes by rank among the real keys, so that padding does not change the sample.
        tokens = RealFirst.of(kv_mask)
        sampled = tokens.order[random_places(tokens.real.astype(k.dtype), sample_size, key_sample)]
    block_of_key = (
        jnp.zeros(k.shape[0], jnp.int32).at[order_k].set(jnp.arange(k.shape[0], dtype=jnp.int32) // keys_per_block)
    )
    num_real = jnp.maximum(jnp.sum(real), 1).astype(k.dtype)
    # log(n / M), with 0 where all keys are in the sample.
    weight = jnp.log(num_real / jnp.minimum(num_real, sample_size))
    present, own = real[sampled], block_of_key[sampled]
    k_sampled, v_sampled = k[sampled], v[sampled]

    def of_block(args: tuple[Array, Array, tuple[Array, Array, Array]]) -> AttentionState:
        number, q, (k, v, real) = args
        local = dense_state(q, k, v, mask_bias(real, q.dtype)[None, :])
        # A sampled key in the block itself is already seen exactly.
        outside = jnp.where(present & (own != number), weight, HIDDEN)
        return merge(local, dense_state(q, k_sampled, v_sampled, outside[None, :]))

    blocks = jnp.arange(num_blocks, dtype=jnp.int32), in_blocks(q[order_q], block_size), near
    state = lax.map(jax.checkpoint(of_block), blocks)
    back = jnp.argsort(order_q)
    return jax.tree.map(lambda x: x[back], out_of_blocks(state, q.shape[0]))


def _gray_rank(x: Array, planes: Array) -> Array:
    """The rank ``[n]`` of each row's signs in Gray order, in which neighbours differ in one sign."""
    bits = (x @ planes > 0).astype(jnp.int32)
    # A bit of the number is the parity of the Gray code's bits up to it.
    binary = jnp.cumsum(bits, axis=1) % 2
    return binary @ (2 ** jnp.arange(planes.shape[1] - 1, -1, -1, dtype=jnp.int32))
