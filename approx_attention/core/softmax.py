"""Exact attention states of one head: dense, blocked, windowed, and of other kernels.

Logits here are plain dot products: the scale is already folded into ``q`` and ``k``. A bias is added to the logits, and
`HIDDEN` as a bias hides a key with any logit. The blocked forms merge dense tiles, and recompute them in the
backward pass, so that memory is linear in the sequence in both directions.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from approx_attention.core.features import FeatureMap
from approx_attention.core.rows import even_split, map_rows, out_of_blocks, pad_rows
from approx_attention.core.states import AttentionState, finite_peak, merge, normalise

# The bias of a key that a query must not see. Finite, so that a row of nothing but hidden keys stays free of NaN
# without a guard inside the tile (a guard there splits XLA's fused product, maximum and exponential).
HIDDEN = -1e30
# Tiles of at most 2048 keys, and of 2^21 to 2^23 logits (8 to 32 MB in float32), run the matrix products at full speed
# from cache: smaller ones merge more often, larger ones are read from memory.
KEY_BLOCK = 2048
LEAST_TILE, GREATEST_TILE = 2**21, 2**23
# Logits of a block of queries as causal forms and decoders ask: kept for the backward pass, and not computed again.
KEPT_TILE = 2**16


def mask_bias(seen: Array, dtype: Any) -> Array:
    """The bias of a mask: 0 where it is true, `HIDDEN` elsewhere."""
    return jnp.where(seen, jnp.zeros((), dtype), HIDDEN)


def dense_state(q: Array, k: Array, v: Array, bias: Array | None = None) -> AttentionState:
    r"""Softmax attention over all keys at once, :math:`\mathrm{softmax}(q k^T + b)\, v` with a bias ``[1 or T, S]``."""
    # Adding HIDDEN alone would let a key through whose logit is as large. A key hidden from all queries is set to 0
    # instead, which leaves XLA's fused product whole; where it is hidden from some, the sum is replaced.
    if bias is None:
        logits = q @ k.T
    elif bias.shape[0] == 1:
        logits = q @ jnp.where(bias[0, :, None] <= HIDDEN / 2, 0, k).T + bias
    else:
        logits = jnp.where(bias <= HIDDEN / 2, HIDDEN, q @ k.T + bias)
    # The peak cancels between numerator and normaliser, so it needs no derivative.
    peak = lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out, lse = weights @ v / total, peak + jnp.log(total)
    if bias is not None:
        # A row with NaN must show it and not count as one that sees no key: a maximum may drop NaN, a sum never does.
        unseen = (peak < HIDDEN / 2) & ~jnp.isnan(total)
        out, lse = jnp.where(unseen, jnp.zeros_like(out), out), jnp.where(unseen, -jnp.inf, lse)
    return AttentionState(out, lse[:, 0])


# The backward pass recomputes the logits of a tile, so that no T x S array is stored.
_tile_state = jax.checkpoint(dense_state)


def blocked_state(
    q: Array,
    k: Array,
    v: Array,
    key_bias: Array | None = None,
    *,
    query_block: int | None = None,
    key_block: int = KEY_BLOCK,
) -> AttentionState:
    """Softmax attention as `dense_state` with a bias ``[S]`` on keys, by tiles whose states are merged in turn."""
    # Four blocks of queries, if tiles then are neither too small nor too large.
    if query_block is None:
        columns = min(k.shape[0], key_block)
        query_block = min(max(q.shape[0] // 4, LEAST_TILE // columns), GREATEST_TILE // columns)
    num_keys = k.shape[0]
    # Blocks of equal size and not of the largest: the padding is less than one key per block.
    key_blocks, keys_per_block = even_split(num_keys, key_block)
    padding = key_blocks * keys_per_block - num_keys
    if padding and key_bias is None:
        key_bias = jnp.zeros(num_keys, q.dtype)
    keys = pad_rows(k, padding).reshape(key_blocks, keys_per_block, -1)
    values = pad_rows(v, padding).reshape(key_blocks, keys_per_block, -1)
    biases = None
    if key_bias is not None:
        biases = jnp.pad(key_bias, (0, padding), constant_values=HIDDEN).reshape(key_blocks, 1, keys_per_block)

    def over_keys(q: Array) -> AttentionState:
        first = jax.tree.map(lambda x: x[0], (keys, values, biases))
        rest = jax.tree.map(lambda x: x[1:], (keys, values, biases))
        if key_blocks == 1:
            return (dense_state if q.shape[0] * k.shape[0] <= KEPT_TILE else _tile_state)(q, *first)
        state = _tile_state(q, *first)
        # The first tile is apart, so that a single block needs no merge with the empty state.
        step = jax.checkpoint(lambda state, tile: merge(state, dense_state(q, *tile)))
        return lax.scan(lambda state, tile: (step(state, tile), None), state, rest)[0]

    return map_rows(over_keys, q, query_block)


def kernel_state(features: FeatureMap, q: Array, k: Array, v: Array, bias: Array) -> AttentionState:
    """Attention with the kernel of a non-negative feature map, over all pairs; ``bias [1 or T, S]`` hides keys."""
    (phi_q, log_scale_q), (phi_k, log_scale_k) = features(q), features(k)
    peak_q, peak_k = (finite_peak(jnp.max(x, axis=-1)) for x in (log_scale_q, log_scale_k))
    # One peak per query cancels in its normaliser; keys share one, so that their weights stay comparable.
    peak = jnp.max(peak_k)
    phi_q = phi_q * jnp.exp(log_scale_q - peak_q[:, None])
    phi_k = phi_k * jnp.exp(log_scale_k - peak)
    # Half of HIDDEN, as sums of biases may move it; no other bias is near.
    weights = jnp.where(bias <= HIDDEN / 2, 0, phi_q @ phi_k.T)
    return normalise(weights @ v, jnp.sum(weights, axis=-1), peak_q + peak)


def window_state(
    q: Array, k: Array, v: Array, key_bias: Array | None = None, *, left: int, right: int
) -> AttentionState:
    """Attention of query t over keys t - left <= j <= t + right only, at a cost that grows with T * (left + right)."""
    num_queries, num_keys = q.shape[0], k.shape[0]
    left, right = min(left, num_queries - 1), min(right, num_keys - 1)
    # A few narrow bands at a time, batched: enough rows for the matrix products, few keys outside the window. A band
    # has about as many rows as its window has keys, in multiples of 64 (whole vector registers), up to 1024.
    span = _round_up(max(left + right, 1), 64)
    band = min(span, 1024)
    bands = max(1, min(1024, num_queries) // band)
    rows = band * bands
    blocks = -(-num_queries // rows)
    reach = band + span

    if key_bias is None:
        key_bias = jnp.zeros(num_keys, q.dtype)
    after = max(0, blocks * rows + span - left - num_keys)
    # Padded once on both sides, so that every band reads a slice of one static length.
    around = ((left, after), (0, 0))
    k, v = jnp.pad(k, around), jnp.pad(v, around)
    key_bias = jnp.pad(key_bias, (left, after), constant_values=HIDDEN)
    offset = jnp.arange(reach)[None, :] - jnp.arange(band)[:, None]
    outside = mask_bias((offset >= 0) & (offset <= left + right), q.dtype)

    def block(args: tuple[Array, Array]) -> AttentionState:
        start, q = args

        def windows(x: Array) -> Array:
            near = lax.dynamic_slice_in_dim(x, start, rows + span)
            return jnp.stack([near[first : first + reach] for first in range(0, rows, band)])

        bias = outside[None] + windows(key_bias)[:, None, :]
        state = jax.vmap(_tile_state)(q.reshape(bands, band, -1), windows(k), windows(v), bias)
        return out_of_blocks(state)

    q = pad_rows(q, blocks * rows - num_queries).reshape(blocks, rows, -1)
    state = lax.map(jax.checkpoint(block), (jnp.arange(blocks) * rows, q))
    return out_of_blocks(state, num_queries)


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
