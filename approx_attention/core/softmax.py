"""Exact attention states of one head: dense, blocked, triangular (causal), windowed, and of other kernels.

Logits here are plain dot products: the scale is already folded into ``q`` and ``k``. A bias is added to the logits, and
`HIDDEN` as a bias hides a key with any logit. The blocked forms merge dense tiles, and recompute them in the
backward pass, so that memory is linear in the sequence in both directions.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from approx_attention.core.checks import real_keys
from approx_attention.core.features import FeatureMap
from approx_attention.core.rows import along_with, even_split, map_rows, out_of_blocks, pad_rows
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
# A relative error of weights that the streamed gradient does not let pass: a hundred roundings of float32.
NOTICEABLE = 1e-5
# A causal tile no longer than this is computed whole: its masked half costs less than splitting it.
TRIANGLE = 128


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


def triangular_state(q: Array, k: Array, v: Array, key_bias: Array | None = None) -> AttentionState:
    r"""Causal attention, query t over keys j <= t, by halves: two triangles and the square below them.

    .. math:: \text{causal}(n) = \big[\,\text{causal}(n/2);\;
              \text{merge}(\text{causal}(n/2),\ \text{blocked}(q_{\text{late}}, k_{\text{early}}))\,\big]

    No tile above the diagonal is computed. ``q`` may have more or fewer rows than ``k``; row t of q stands at
    position t of k.
    """
    num_queries, num_keys = q.shape[0], k.shape[0]
    if num_queries > num_keys:
        early = triangular_state(q[:num_keys], k, v, key_bias)
        late = blocked_state(q[num_keys:], k, v, key_bias)
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), early, late)
    if num_queries < num_keys:
        k, v = k[:num_queries], v[:num_queries]
        key_bias = None if key_bias is None else key_bias[:num_queries]

    # Padded so that every halving is even: triangles of one size are one program.
    halvings = max(0, -(-num_queries // TRIANGLE) - 1).bit_length()
    padding = -num_queries % (1 << halvings)
    # Padded keys come last, so no real query sees them.
    q, k, v = (pad_rows(x, padding) for x in (q, k, v))
    state = _triangle(q, k, v, None if key_bias is None else pad_rows(key_bias, padding), halvings)
    return jax.tree.map(lambda x: x[:num_queries], state)


def _triangle(q: Array, k: Array, v: Array, key_bias: Array | None, halvings: int) -> AttentionState:
    length = q.shape[0]
    if halvings == 0:
        bias = mask_bias(jnp.tri(length, dtype=bool), q.dtype)
        return _tile_state(q, k, v, bias if key_bias is None else bias + key_bias[None, :])
    half = length // 2
    halves = jax.tree.map(lambda x: x.reshape(2, half, *x.shape[1:]), (q, k, v, key_bias))

    def recurse(half: tuple[Array, Array, Array, Array | None]) -> AttentionState:
        q, k, v, key_bias = half
        return _triangle(q, k, v, key_bias, halvings - 1)

    # Small triangles are batched to fill the machine; large ones run in turn to stay in cache.
    state = jax.vmap(recurse)(halves) if length <= KEY_BLOCK else lax.map(recurse, halves)
    early, late = jax.tree.map(lambda x: x[0], state), jax.tree.map(lambda x: x[1], state)
    below = blocked_state(q[half:], k[:half], v[:half], None if key_bias is None else key_bias[:half])
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), early, merge(late, below))


def streamed_state(q: Array, k: Array, v: Array, kv_mask: Array | None, is_causal: bool) -> AttentionState:
    """Computes `triangular_state` or `blocked_state`, with a backward pass of one stream of tiles and no merge.

    It has no forward-mode derivative; `dense_state` has.
    """
    # In shard_map the gradient of a tensor that all devices share is a sum over devices, which the rule below does not
    # take: all three tensors are made to vary alike.
    if len({getattr(jax.typeof(x), "mat", None) for x in (q, k, v)}) > 1:
        q, k, v = along_with((q, k, v), q, k, v)
    return _streamed_state(q, k, v, kv_mask, is_causal)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _streamed_state(q: Array, k: Array, v: Array, kv_mask: Array | None, is_causal: bool) -> AttentionState:
    return _streamed(q, k, v, kv_mask, is_causal)


def _streamed(q: Array, k: Array, v: Array, kv_mask: Array | None, is_causal: bool) -> AttentionState:
    key_bias = None if kv_mask is None else mask_bias(kv_mask, q.dtype)
    return (triangular_state if is_causal else blocked_state)(q, k, v, key_bias)


def _streamed_forward(q, k, v, kv_mask, is_causal):
    # Not `_streamed_state` itself: a derivative of the gradient (a Hessian) then works in forward mode.
    state = _streamed(q, k, v, kv_mask, is_causal)
    return state, (q, k, v, kv_mask, state)


def _streamed_backward(is_causal, residuals, cotangent):
    r"""Gradients as sums over tiles of the weights, which the normalisers give back.

    .. math:: P = e^{X - \mathrm{lse}}, \quad dV = P^T dO, \quad dX = P \odot (dO\,V^T - \delta), \quad
              dQ = dX\,K, \quad dK = dX^T Q, \qquad \delta_t = dO_t \cdot O_t - d\mathrm{lse}_t.

    Tiles are transposed, keys by queries: then only one product of five has a transposed operand.

    The forward pass rounds its products in tiles of other shapes. Where logits are so large that the difference would
    show in a weight, the normalisers and the :math:`dO_t \cdot O_t` are computed again from the tiles of this pass.
    """
    q, k, v, kv_mask, state = residuals
    num_queries, num_keys = q.shape[0], k.shape[0]
    # Smaller causal tiles waste less on the diagonal, larger ones run faster.
    block = min(max(num_queries // 4, 512), 1024) if is_causal else 1024
    query_blocks, rows = even_split(num_queries, block)
    key_blocks, columns = (-(-num_keys // rows), rows) if is_causal else even_split(num_keys, block)
    # A row that sees no key has the output 0 for any input: cotangents of it are dropped, and -inf is not subtracted.
    seen = state.lse > -jnp.inf
    lse = jnp.where(seen, state.lse, jnp.zeros_like(state.lse))
    d_out = jnp.where(seen[:, None], cotangent.out, jnp.zeros_like(cotangent.out))
    d_lse = jnp.where(seen, cotangent.lse, jnp.zeros_like(cotangent.lse))
    extra = query_blocks * rows - num_queries
    by_query = pad_rows(q, extra), pad_rows(d_out, extra)
    padding = key_blocks * columns - num_keys
    bias = mask_bias(pad_rows(real_keys(kv_mask, num_keys), padding), q.dtype)
    by_key = (pad_rows(k, padding), pad_rows(v, padding), bias)
    # Below the diagonal no mask is computed; tiles above it are not visited.
    pairs = np.array([(i, j) for i in range(query_blocks) for j in range(key_blocks) if not is_causal or j < i])
    diagonal_pairs = np.array([(i, i) for i in range(min(query_blocks, key_blocks))])

    def over_tiles(tile, total):
        if len(pairs):
            total, _ = lax.scan(tile, total, pairs)
        if is_causal:
            total, _ = lax.scan(functools.partial(tile, diagonal=True), total, diagonal_pairs)
        return total

    def tile_logits(q, k, bias, diagonal):
        logits = k @ q.T + bias[:, None]
        return jnp.where(jnp.tri(columns, dtype=bool).T, logits, HIDDEN) if diagonal else logits

    def add_row_sums(sums, pair, diagonal=False):
        i, j = pair[0] * rows, pair[1] * columns
        q, d_out, peak, total, product = (lax.dynamic_slice_in_dim(x, i, rows) for x in (*by_query, *sums))
        k, v, bias = (lax.dynamic_slice_in_dim(x, j, columns) for x in by_key)
        logits = tile_logits(q, k, bias, diagonal)
        new = lax.stop_gradient(jnp.maximum(peak, jnp.max(logits, axis=0)))
        weights, before = jnp.exp(logits - new[None, :]), jnp.exp(peak - new)
        total = total * before + jnp.sum(weights, axis=0)
        product = product * before + jnp.sum(weights * (v @ d_out.T), axis=0)
        put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=i, axis=0)
        return tuple(put(x, part) for x, part in zip(sums, (new, total, product), strict=True)), None

    def again(lse, product):
        # Peak and sum stay apart: added to a large peak, the logarithm of the sum would be rounded away.
        none = jnp.zeros_like(lse)
        peak, total, product = over_tiles(add_row_sums, (none + HIDDEN, none, none))
        total = jnp.where(total > 0, total, 1)
        return peak, jnp.log(total), product / total

    # A row past the end gets a huge normaliser and so no weight.
    lse = jnp.pad(lse, (0, extra), constant_values=-HIDDEN)
    product = pad_rows(jnp.sum(d_out * state.out, axis=-1), extra)
    # A bound on the rounding of a logit, by Cauchy's inequality: one unit of |q| |k|.
    rounding = jnp.finfo(q.dtype).eps * jnp.sqrt(jnp.max(jnp.sum(q * q, -1)) * jnp.max(jnp.sum(k * k, -1)))
    saved = lambda lse, product: (lse, jnp.zeros_like(lse), product)  # noqa: E731
    *normaliser, product = lax.cond(rounding > NOTICEABLE, again, saved, lse, product)
    by_query = *by_query, product - pad_rows(d_lse, extra), *normaliser

    def tile(gradients, pair, diagonal=False):
        i, j = pair[0] * rows, pair[1] * columns
        q, d_out, delta, peak, log_total = (lax.dynamic_slice_in_dim(x, i, rows) for x in by_query)
        k, v, bias = (lax.dynamic_slice_in_dim(x, j, columns) for x in by_key)
        logits = (tile_logits(q, k, bias, diagonal) - peak[None, :]) - log_total[None, :]
        # Rounding lifts no weight above 1; as a constant, so that second derivatives see the logits.
        weights = jnp.exp(logits - lax.stop_gradient(jnp.maximum(logits, 0)))
        d_logits = weights * (v @ d_out.T - delta[None, :])
        # The barrier keeps XLA from turning this into d_logits.T @ k, whose large operand would be transposed.
        d_q = lax.optimization_barrier(k.T @ d_logits).T
        terms = (d_q, i), (d_logits @ q, j), (weights @ d_out, j)

        def add(total, term, start):
            size = term.shape[0]
            return lax.dynamic_update_slice_in_dim(total, lax.dynamic_slice_in_dim(total, start, size) + term, start, 0)

        return tuple(add(total, *term) for total, term in zip(gradients, terms, strict=True)), None

    gradients = over_tiles(tile, tuple(jnp.zeros_like(x) for x in (by_query[0], by_key[0], by_key[1])))
    d_q, d_k, d_v = gradients
    return d_q[:num_queries], d_k[:num_keys], d_v[:num_keys], None


_streamed_state.defvjp(_streamed_forward, _streamed_backward)


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
