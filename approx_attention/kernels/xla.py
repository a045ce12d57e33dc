r"""Attention as one flat loop over pairs of blocks, with JAX operations for every platform.

The loop visits the pairs of a block of queries and a block of keys within reach. The size of the program does not
depend on the sequence. The gradient recomputes the weights of a tile from the normalisers.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from approx_attention.kernels.reach import Reach
from approx_attention.kernels.rows import even_split
from approx_attention.kernels.tiles import (
    HIDDEN,
    Rows,
    no_sums,
    normalised,
    padded,
    product,
    seen_cotangents,
    tile_logits,
    tile_sums,
    weights_of,
)

# Rows and columns of a tile: tiles of all parallel heads fit in the memory of an accelerator, and products are large
# enough for its matrix units.
LEAST_TILE, GREATEST_TILE = 512, 1024


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
    """Attention of one head in tiles, of tensors in their dtype, with sums in float32 or wider.

    Args:
        q: queries ``[T, D]``.
        k: keys ``[S, D]``.
        v: values ``[S, Dv]``.
        scale: factor of the logits, an array without axes; its dtype is that of the sums.
        bias: bias of each key ``[S]``; None for 0.
        reach: the keys within reach of each query.
        logits_soft_cap: cap of the logits; None for no cap.

    Returns:
        The rows of outputs and normalisers.
    """
    (blocks, rows), (key_blocks, columns) = _tiles(q, k)
    queries, keys = padded(q, blocks * rows), padded_keys(k, v, bias, scale.dtype, key_blocks * columns)

    def add(sums: Any, i: Array, j: Array) -> Any:
        seen = _seen(reach, i, j, rows, columns)
        options: Any = {"scale": scale, "seen": seen, "logits_soft_cap": logits_soft_cap}
        tile = tile_sums(at(queries, i, rows), *at(keys, j, columns), **options)
        return put(sums, i, at(sums, i, rows).plus(tile))

    pairs = _visited(reach, blocks, rows, key_blocks, columns)
    return normalised(over_pairs(add, no_sums(queries, v, scale.dtype), pairs), q.shape[0])


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
    r"""Compute gradients of q, k, v and the bias b over tiles of weights recomputed from the normalisers.

    .. math:: P = e^{X - \mathrm{lse}}, \quad dV = P^T dO, \quad dX = P \odot (dO\,V^T - \delta), \quad
              dQ = s\, dX\,K, \quad dK = s\, dX^T Q, \quad db = dX^T 1.

    With a cap c the logits are :math:`Y = c \tanh(s\,Q K^T / c)` plus a bias, and dX has the factor
    :math:`1 - (Y / c)^2` in dQ and dK.

    The tiles are those of the forward pass, so that logits of any size have the same rounding in both.

    Args:
        q: queries ``[T, D]``.
        k: keys ``[S, D]``.
        v: values ``[S, Dv]``.
        scale: factor s of the logits, an array without axes; its dtype is that of the gradients.
        out: outputs ``[T, Dv]`` of the forward pass.
        peak: maxima ``[T]`` of the forward pass.
        log_total: logarithms of sums ``[T]`` of the forward pass.
        d_out: dO ``[T, Dv]``, cotangents of the outputs.
        d_lse: cotangents of the log-normalisers ``[T]``.
        bias: bias of each key ``[S]``; None for 0.
        reach: the keys within reach of each query.
        logits_soft_cap: cap of the logits; None for no cap.

    Returns:
        The gradients of q, k and v, and of the bias if it is given.
    """
    (blocks, rows), (key_blocks, columns) = _tiles(q, k)
    peak, log_total, d_out, delta = seen_cotangents(out, peak, log_total, d_out, d_lse)
    # Rows past the end have cotangent 0.
    queries = padded((q, d_out.astype(v.dtype), delta, peak, log_total), blocks * rows)
    keys = padded_keys(k, v, bias, scale.dtype, key_blocks * columns)

    def add(gradients: tuple[Array, ...], i: Array, j: Array) -> tuple[Array, ...]:
        (q, d_out, delta, peak, log_total), (k, v, bias) = at(queries, i, rows), at(keys, j, columns)
        capped, seen = tile_logits(q, k, None, scale, logits_soft_cap), _seen(reach, i, j, rows, columns)
        logits = capped if bias is None else capped + bias[None, :]
        logits = logits if seen is None else jnp.where(seen, logits, HIDDEN)
        weights = weights_of(logits, peak[:, None], log_total[:, None])
        d_logits = weights * (product(d_out, v.T) - delta[:, None])
        d_products = d_logits if logits_soft_cap is None else d_logits * (1 - (capped / logits_soft_cap) ** 2)
        rounded = d_products.astype(q.dtype)
        terms = product(rounded, k), product(rounded.T, q), product(weights.astype(v.dtype).T, d_out)
        terms += () if bias is None else (jnp.sum(d_logits, axis=0),)
        indices = (i, j, j, j)[: len(terms)]
        return tuple(add_to(x, index, term) for x, index, term in zip(gradients, indices, terms, strict=True))

    gradients = tuple(jnp.zeros_like(x, scale.dtype) for x in (queries[0], *keys) if x is not None)
    d_q, d_k, *others = over_pairs(add, gradients, _visited(reach, blocks, rows, key_blocks, columns))
    d_q, d_k, *others = d_q[: q.shape[0]], *(x[: k.shape[0]] for x in (d_k, *others))
    return d_q * scale, d_k * scale, *others[: 1 if bias is None else 2]


def _tiles(q: Array, k: Array) -> tuple[tuple[int, int], tuple[int, int]]:
    """The numbers and sizes of blocks of queries and of keys."""
    tile = min(max(max(q.shape[0], k.shape[0]) // 8, LEAST_TILE), GREATEST_TILE)
    return even_split(q.shape[0], tile), even_split(k.shape[0], tile)


def _seen(reach: Reach, i: Array, j: Array, rows: int, columns: int) -> Array | None:
    """The mask of keys of block j visible to queries of block i; None for all."""
    if reach.is_full:
        return None
    query, key = (lax.broadcasted_iota(jnp.int32, (rows, columns), axis) for axis in (0, 1))
    return reach.seen(query + i * rows, key + j * columns)


def _visited(reach: Reach, blocks: int, rows: int, key_blocks: int, columns: int) -> list[tuple[int, int, int]]:
    """For each block of queries with visible keys: its index, the first key block, and the end of key blocks."""
    spans = [(i, reach.first(i, rows, columns), reach.end(i, rows, columns, key_blocks)) for i in range(blocks)]
    return [span for span in spans if span[1] < span[2]]


def over_pairs(step: Callable[[Any, Array, Array], Any], carry: Any, spans: list[tuple[int, int, int]]) -> Any:
    """Loop ``step(carry, i, j)`` over all ``first <= j < end`` of every ``(i, first, end)``."""
    count = sum(end - first for _, first, end in spans)
    if not count:
        return carry
    if count == 1:
        i, j, _ = spans[0]
        return step(carry, jnp.int32(i), jnp.int32(j))
    rows, firsts, ends = (jnp.asarray(np.array(x, np.int32)) for x in zip(*spans, strict=True))

    def body(_: Any, place: tuple[Array, Array, Any]) -> tuple[Array, Array, Any]:
        row, j, carry = place
        carry = step(carry, rows[row], j)
        last = j + 1 == ends[row]
        following = jnp.minimum(row + 1, len(spans) - 1)
        return jnp.where(last, following, row), jnp.where(last, firsts[following], j + 1), carry

    return lax.fori_loop(0, count, body, (jnp.int32(0), jnp.int32(spans[0][1]), carry))[2]


def at(tree: Any, index: Array, rows: int) -> Any:
    """Block ``index`` of arrays whose rows are padded to blocks.

    The axis of tokens is not split, because on a TPU this would copy every tensor into another layout.
    """
    read = functools.partial(lax.dynamic_slice_in_dim, slice_size=rows, allow_negative_indices=False)
    return jax.tree.map(lambda x: read(x, index * rows), tree)


def put(tree: Any, index: Array, block: Any) -> Any:
    """Arrays with block ``index`` replaced."""
    write = functools.partial(lax.dynamic_update_slice_in_dim, axis=0, allow_negative_indices=False)
    return jax.tree.map(lambda x, part: write(x, part, index * part.shape[0]), tree, block)


def add_to(total: Array, index: Array, term: Array) -> Array:
    """An array with a term added to block ``index``."""
    return put(total, index, at(total, index, term.shape[0]) + term)


def padded_keys(k: Array, v: Array, bias: Array | None, dtype: Any, length: int) -> tuple[Array, Array, Array | None]:
    """Keys and values padded to a length, and the bias that hides padding, or None without padding."""
    if bias is None and length > k.shape[0]:
        bias = jnp.zeros(k.shape[0], dtype)
    bias = None if bias is None else padded(bias.astype(dtype), length, HIDDEN)
    return *padded((k, v), length), bias
