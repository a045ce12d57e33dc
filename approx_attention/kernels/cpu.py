"""Attention in tiles that fit the cache of a CPU, in float32 or wider, with the scale folded into queries and keys."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from approx_attention.kernels import xla
from approx_attention.kernels.reach import Reach
from approx_attention.kernels.rows import even_split, map_rows, out_of_blocks, pad_rows, round_up
from approx_attention.kernels.states import AttentionState, merge
from approx_attention.kernels.tiles import (
    GREATEST_TILE,
    HIDDEN,
    KEY_BLOCK,
    LEAST_TILE,
    Rows,
    Sums,
    dense_state,
    mask_bias,
    no_sums,
    normalised,
    padded,
    seen_cotangents,
    sees_a_key,
    tile_sums,
    weights_of,
)
from approx_attention.kernels.xla import add_to, at, over_pairs, padded_keys, put

CAUSAL = Reach(right=0)
# Rows of a causal tile: smaller tiles waste less on the diagonal, larger ones run faster.
LEAST_CAUSAL_TILE, GREATEST_CAUSAL_TILE = 512, 1024
# Tiles on the diagonal are split into strips of this many queries: the masked half of a strip is small.
STRIP = 128
# Up to this number of logits, as in causal blocks and decoding, there is one tile.
ONE_TILE = 2**16
# The largest relative error of weights in the gradient: a hundred rounding errors of float32.
NOTICEABLE = 1e-5


def forward(
    q: Array,
    k: Array,
    v: Array,
    scale: Array,
    bias: Array | None = None,
    *,
    reach: Reach,
    logits_soft_cap: float | None = None,
    **_: Any,
) -> Rows:
    """Attention by the form for the given reach; arguments and result are those of ``xla.forward``."""
    q, k, v = _in_float32(q, k, v, scale)
    if logits_soft_cap is not None:
        return xla.forward(q, k, v, jnp.ones_like(scale), bias, reach=reach, logits_soft_cap=logits_soft_cap)
    if q.shape[0] * k.shape[0] <= ONE_TILE:
        return normalised(tile_sums(q, k, v, bias, seen=_seen(reach, q, k)), q.shape[0])
    if reach.is_full:
        return _rows(blocked_state(q, k, v, bias))
    if reach == CAUSAL and q.shape[0] == k.shape[0]:
        return _causal(q, k, v, bias)
    if _is_window(reach):
        return _rows(window_state(q, k, v, bias, reach=reach))
    return xla.forward(q, k, v, jnp.ones_like(scale), bias, reach=reach)


def backward(
    q: Array,
    k: Array,
    v: Array,
    scale: Array,
    out: Array,
    peak: Array,
    log_total: Array,
    d_out: Array,
    d_lse: Array,
    bias: Array | None = None,
    *,
    reach: Reach,
    logits_soft_cap: float | None = None,
    **_: Any,
) -> tuple[Array, ...]:
    """The gradients of ``xla.backward``, which describes the arguments, by the form for the given reach."""
    q, k, v = _in_float32(q, k, v, scale)
    rows = out, peak, log_total, d_out, d_lse
    if logits_soft_cap is not None:
        options: Any = {"reach": reach, "logits_soft_cap": logits_soft_cap}
        gradients = xla.backward(q, k, v, jnp.ones_like(scale), *rows, bias, **options)
    elif q.shape[0] * k.shape[0] <= ONE_TILE:
        gradients = _tile_backward(q, k, v, d_out, d_lse, bias, reach=reach)
    elif reach.is_full or (reach == CAUSAL and q.shape[0] == k.shape[0]):
        gradients = _streamed_backward(q, k, v, *rows, bias, reach=reach)
    elif _is_window(reach):
        state = functools.partial(window_state, reach=reach)
        operands = (q, k, v) if bias is None else (q, k, v, bias)
        gradients = jax.vjp(state, *operands)[1](AttentionState(d_out, jnp.where(sees_a_key(peak), d_lse, 0)))
    else:
        gradients = xla.backward(q, k, v, jnp.ones_like(scale), *rows, bias, reach=reach)
    d_q, d_k, *others = gradients
    return d_q * jnp.sqrt(scale), d_k * jnp.sqrt(scale), *others


def _in_float32(q: Array, k: Array, v: Array, scale: Array) -> tuple[Array, Array, Array]:
    """Tensors in the accumulation dtype, with the scale folded into queries and keys."""
    q, k, v = (x.astype(scale.dtype) for x in (q, k, v))
    return q * jnp.sqrt(scale), k * jnp.sqrt(scale), v


def _rows(state: AttentionState) -> Rows:
    return Rows(state.out, jnp.where(state.lse == -jnp.inf, HIDDEN, state.lse), jnp.zeros_like(state.lse))


def _seen(reach: Reach, q: Array, k: Array) -> Array | None:
    """The mask of visible keys ``[T, S]``; None for all."""
    if reach.is_full:
        return None
    return reach.seen(np.arange(q.shape[0])[:, None], np.arange(k.shape[0])[None, :])


def _is_window(reach: Reach) -> bool:
    return reach.left is not None and reach.left >= 0 and reach.right is not None and reach.offset == 0


def _tile_backward(
    q: Array, k: Array, v: Array, d_out: Array, d_lse: Array, bias: Array | None, *, reach: Reach
) -> tuple[Array, ...]:
    """Gradients of one tile for a scale of 1, transposed like those of `_streamed_backward`.

    Normalisers are recomputed too, so that `jax.checkpoint` need not repeat the forward pass.
    """
    logits, seen = k @ q.T, _seen(reach, q, k)
    logits = logits if bias is None else logits + bias[:, None]
    logits = logits if seen is None else jnp.where(seen.T, logits, HIDDEN)
    peak = lax.stop_gradient(jnp.max(logits, axis=0))
    weights = jnp.exp(logits - peak[None, :])
    weights = weights / jnp.sum(weights, axis=0)[None, :]
    sees = sees_a_key(peak)
    d_out, d_lse = jnp.where(sees[:, None], d_out, 0), jnp.where(sees, d_lse, 0)
    d_weights = v @ d_out.T
    d_logits = weights * (d_weights - (jnp.sum(weights * d_weights, axis=0) - d_lse)[None, :])
    gradients = _transposed_product(k, d_logits), d_logits @ q, weights @ d_out
    return gradients if bias is None else (*gradients, jnp.sum(d_logits, axis=1))


def _transposed_product(k: Array, d_logits: Array) -> Array:
    """``d_logits.T @ k``; the barrier keeps XLA from this form, which would transpose the large operand."""
    return lax.optimization_barrier(k.T @ d_logits).T


# The backward pass recomputes the logits of a tile, so that no T x S array is stored.
_tile_state = jax.checkpoint(dense_state)


def blocked_state(q: Array, k: Array, v: Array, key_bias: Array | None = None) -> AttentionState:
    """Attention over all keys, by tiles whose states are merged sequentially."""
    # Four blocks of queries, if tiles are then neither too small nor too large; few queries use more keys per tile.
    key_block = max(KEY_BLOCK, LEAST_TILE // q.shape[0])
    columns = min(k.shape[0], key_block)
    query_block = min(max(q.shape[0] // 4, LEAST_TILE // columns), GREATEST_TILE // columns)
    num_keys = k.shape[0]
    # Blocks of equal size instead of the largest size: the padding is less than one key per block.
    key_blocks, keys_per_block = even_split(num_keys, key_block)
    k, v, key_bias = padded_keys(k, v, key_bias, q.dtype, key_blocks * keys_per_block)
    keys, values = (x.reshape(key_blocks, keys_per_block, -1) for x in (k, v))
    biases = None if key_bias is None else key_bias.reshape(key_blocks, 1, keys_per_block)

    def over_keys(q: Array) -> AttentionState:
        first = jax.tree.map(lambda x: x[0], (keys, values, biases))
        rest = jax.tree.map(lambda x: x[1:], (keys, values, biases))
        state = dense_state(q, *first)
        if key_blocks == 1:
            return state
        # The first tile is separate, so that a single block needs no merge with the empty state.
        return lax.scan(lambda state, tile: (merge(state, dense_state(q, *tile)), None), state, rest)[0]

    return map_rows(over_keys, q, query_block)


def window_state(q: Array, k: Array, v: Array, key_bias: Array | None = None, *, reach: Reach) -> AttentionState:
    """Attention of query t over keys t - left <= j <= t + right, at a cost proportional to T * (left + right)."""
    num_queries, num_keys = q.shape[0], k.shape[0]
    assert reach.left is not None
    assert reach.right is not None
    left, right = min(reach.left, num_queries - 1), min(reach.right, num_keys - 1)
    # Batches of a few narrow bands: enough rows for the matrix products, few keys outside the window. A band has about
    # as many rows as its window has keys, in multiples of 64 (whole vector registers), up to 1024.
    span = round_up(max(left + right, 1), 64)
    band = min(span, 1024)
    bands = max(1, min(1024, num_queries) // band)
    rows = band * bands
    blocks = -(-num_queries // rows)
    width = band + span

    if key_bias is None:
        key_bias = jnp.zeros(num_keys, q.dtype)
    after = max(0, blocks * rows + span - left - num_keys)
    # Padded once on both sides, so that every band reads a slice of one static length.
    around = ((left, after), (0, 0))
    k, v = jnp.pad(k, around), jnp.pad(v, around)
    key_bias = jnp.pad(key_bias, (left, after), constant_values=HIDDEN)
    offset = jnp.arange(width)[None, :] - jnp.arange(band)[:, None]
    outside = mask_bias((offset >= 0) & (offset <= left + right), q.dtype)

    def block(args: tuple[Array, Array]) -> AttentionState:
        start, q = args

        def windows(x: Array) -> Array:
            near = lax.dynamic_slice_in_dim(x, start, rows + span)
            return jnp.stack([near[first : first + width] for first in range(0, rows, band)])

        bias = outside[None] + windows(key_bias)[:, None, :]
        state = jax.vmap(_tile_state)(q.reshape(bands, band, -1), windows(k), windows(v), bias)
        return out_of_blocks(state)

    q = pad_rows(q, blocks * rows - num_queries).reshape(blocks, rows, -1)
    state = lax.map(jax.checkpoint(block), (jnp.arange(blocks) * rows, q))
    return out_of_blocks(state, num_queries)


def _causal(q: Array, k: Array, v: Array, bias: Array | None) -> Rows:
    """Causal attention: first the tiles on the diagonal, then those below it."""
    blocks, rows = even_split(q.shape[0], _causal_tile(q))
    queries, keys = padded(q, blocks * rows), _causal_keys(k, v, bias, blocks * rows)

    def start(i: Array, sums: Sums) -> Sums:
        return put(sums, i, _diagonal(at(queries, i, rows), *at(keys, i, rows)))

    def add(sums: Sums, i: Array, j: Array) -> Sums:
        return put(sums, i, at(sums, i, rows).plus(tile_sums(at(queries, i, rows), *at(keys, j, rows))))

    sums = lax.fori_loop(0, blocks, start, no_sums(queries, v, q.dtype))
    return normalised(over_pairs(add, sums, _below_diagonal(blocks)), q.shape[0])


def _causal_tile(q: Array) -> int:
    return min(max(q.shape[0] // 4, LEAST_CAUSAL_TILE), GREATEST_CAUSAL_TILE)


def _causal_keys(k: Array, v: Array, bias: Array | None, length: int) -> tuple[Array, Array, Array | None]:
    """Padded keys, without a bias for padding: no real query sees keys after the last one."""
    return *padded((k, v), length), None if bias is None else padded(bias, length, HIDDEN)


def _below_diagonal(blocks: int) -> list[tuple[int, int, int]]:
    return [(i, 0, i) for i in range(1, blocks)]


def _diagonal(q: Array, k: Array, v: Array, bias: Array | None) -> Sums:
    """A tile on the diagonal, in strips of queries with the keys up to their last one."""
    parts = []
    for start in range(0, q.shape[0], STRIP):
        end = min(start + STRIP, q.shape[0])
        seen = jnp.tri(end - start, end, start, dtype=bool)
        parts.append(tile_sums(q[start:end], k[:end], v[:end], None if bias is None else bias[:end], seen=seen))
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


def _streamed_backward(
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    peak: Array,
    log_total: Array,
    d_out: Array,
    d_lse: Array,
    bias: Array | None,
    *,
    reach: Reach,
) -> tuple[Array, ...]:
    """Gradients over all keys, or causally, for a scale of 1.

    Tiles are transposed, keys by queries, so that only one product of five has a transposed operand.

    The forward pass rounds its products in tiles of other shapes. If logits are so large that the difference would
    affect weights, the normalisers and the products of outputs with cotangents are recomputed from the tiles of this
    pass.
    """
    num_queries, num_keys = q.shape[0], k.shape[0]
    is_causal = not reach.is_full
    block = _causal_tile(q) if is_causal else GREATEST_CAUSAL_TILE
    (query_blocks, rows), (key_blocks, columns) = even_split(num_queries, block), even_split(num_keys, block)
    length = query_blocks * rows
    d_lse = jnp.where(sees_a_key(peak), d_lse, 0)
    peak, log_total, d_out, _ = seen_cotangents(out, peak, log_total, d_out, d_lse)
    own = padded((q, d_out), length)
    keys = _causal_keys(k, v, bias, length) if is_causal else padded_keys(k, v, bias, q.dtype, key_blocks * columns)

    def over_tiles(add: Callable[..., Any], total: Any) -> Any:
        if not is_causal:
            return over_pairs(add, total, [(i, 0, key_blocks) for i in range(query_blocks)])
        # Below the diagonal there is no mask; tiles above it are not visited.
        total = over_pairs(add, total, _below_diagonal(query_blocks))
        lower = jnp.tri(rows, dtype=bool).T
        return lax.fori_loop(0, query_blocks, lambda i, x: add(x, i, i, lower), total)

    def transposed_logits(q: Array, k: Array, bias: Array | None, lower: Any) -> Array:
        logits = k @ q.T if bias is None else k @ q.T + bias[:, None]
        return logits if lower is None else jnp.where(lower, logits, HIDDEN)

    def add_row_sums(sums: Sums, i: Array, j: Array, lower: Any = None) -> Sums:
        (q, d_out), (k, v, bias), before = at(own, i, rows), at(keys, j, columns), at(sums, i, rows)
        logits = transposed_logits(q, k, bias, lower)
        peak = lax.stop_gradient(jnp.maximum(before.peak, jnp.max(logits, axis=0)))
        weights, rest = jnp.exp(logits - peak[None, :]), jnp.exp(before.peak - peak)
        total = before.total * rest + jnp.sum(weights, axis=0)
        return put(sums, i, Sums(peak, total, before.product * rest + jnp.sum(weights * (v @ d_out.T), axis=0)))

    def again(peak: Array, log_total: Array, product: Array) -> tuple[Array, Array, Array]:
        none = jnp.zeros_like(peak)
        peak, total, product = over_tiles(add_row_sums, Sums(none + HIDDEN, none, none))
        total = jnp.where(total > 0, total, 1)
        return peak, jnp.log(total), product / total

    # A row past the end gets a huge normaliser, and so no weight.
    peak = padded(peak, length, -HIDDEN)
    log_total, product = padded((log_total, jnp.sum(d_out * out, axis=-1)), length)
    # A bound of the rounding error of a logit, by the Cauchy-Schwarz inequality: one unit of |q| |k|.
    rounding = jnp.finfo(q.dtype).eps * jnp.sqrt(jnp.max(jnp.sum(q * q, -1)) * jnp.max(jnp.sum(k * k, -1)))
    saved = lambda *x: x  # noqa: E731
    peak, log_total, product = lax.cond(rounding > NOTICEABLE, again, saved, peak, log_total, product)
    queries = *own, product - padded(d_lse, length), peak, log_total

    def add(gradients: tuple[Array, ...], i: Array, j: Array, lower: Any = None) -> tuple[Array, ...]:
        (q, d_out, delta, peak, log_total), (k, v, bias) = at(queries, i, rows), at(keys, j, columns)
        weights = weights_of(transposed_logits(q, k, bias, lower), peak[None, :], log_total[None, :])
        d_logits = weights * (v @ d_out.T - delta[None, :])
        terms = _transposed_product(k, d_logits), d_logits @ q, weights @ d_out
        terms += () if bias is None else (jnp.sum(d_logits, axis=1),)
        indices = (i, j, j, j)[: len(terms)]
        return tuple(add_to(x, index, term) for x, index, term in zip(gradients, indices, terms, strict=True))

    gradients = tuple(jnp.zeros_like(x) for x in (own[0], *keys) if x is not None)
    d_q, *others = over_tiles(add, gradients)
    return d_q[:num_queries], *(x[:num_keys] for x in others[: 2 if bias is None else 3])
