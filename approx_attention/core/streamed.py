r"""Exact attention of one head as a stream of tiles, full or causal, in memory linear in the sequence.

The loops are flat: over pairs of blocks, of queries and of keys, causally down to the diagonal. Their program does
not grow with the sequence. The gradient is written out: it recomputes the weights of a tile from the normalisers.

The platform that a program is lowered for decides how its tiles are computed:

- on a CPU in float32 (or wider), with the scale folded into queries and keys, in tiles for its cache;
- elsewhere from tensors as they are, with products of half-precision tensors summed in float32, and the scale applied
  to the logits: a scaled tensor in half precision would be rounded, and one in float32 is a copy.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from approx_attention.core.checks import accumulation_dtype, real_keys
from approx_attention.core.rows import along_with, even_split
from approx_attention.core.softmax import HIDDEN, blocked_state, mask_bias
from approx_attention.core.states import AttentionState

# Rows of a causal tile on a CPU: smaller tiles waste less on the diagonal, larger ones run faster.
LEAST_CPU_TILE, GREATEST_CPU_TILE = 512, 1024
# On the diagonal a CPU splits its tiles into strips of this many queries: the masked half of a strip is small.
CPU_STRIP = 128
# Rows and columns of a tile on accelerators: a tile of every head that runs at once fits their memory, and the products
# are large enough for their matrix units.
LEAST_TILE, GREATEST_TILE = 512, 1024
# A relative error of weights that the gradient does not let pass: a hundred roundings of float32.
NOTICEABLE = 1e-5


def streamed_state(
    q: Array, k: Array, v: Array, kv_mask: Array | None = None, *, scale: float | Array = 1.0, is_causal: bool = False
) -> AttentionState:
    r"""Softmax attention :math:`\mathrm{softmax}(s\, q k^T)\, v` by tiles, causally of query t over keys j <= t.

    It has no forward-mode derivative; `dense_state` has.

    Args:
        q: queries ``[T, D]``, of any floating dtype.
        k: keys ``[S, D]``.
        v: values ``[S, Dv]``. Keys and values of padding are zeros.
        kv_mask: true where a key is real, ``[S]``.
        scale: a positive factor of the logits.
        is_causal: row t of q stands at position t of k; T and S may differ.
    """
    num_queries, num_keys = q.shape[0], k.shape[0]
    if is_causal and num_queries > num_keys:
        # The last queries see all keys.
        parts = (
            streamed_state(q[:num_keys], k, v, kv_mask, scale=scale, is_causal=True),
            streamed_state(q[num_keys:], k, v, kv_mask, scale=scale),
        )
        return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
    if is_causal and num_queries < num_keys:
        k, v = k[:num_queries], v[:num_queries]
        kv_mask = None if kv_mask is None else kv_mask[:num_queries]
    dtype = accumulation_dtype(q, k, v)
    tensors = (q, k, v)
    if len({x.dtype for x in tensors}) > 1:
        tensors = tuple(x.astype(dtype) for x in tensors)
    scale = jnp.asarray(scale, dtype)
    # In shard_map the gradient of a tensor that all devices share is a sum over devices, which the rule below does not
    # take: all are made to vary alike.
    operands = *tensors, scale, *(() if kv_mask is None else (kv_mask,))
    if len({getattr(jax.typeof(x), "mat", None) for x in operands}) > 1:
        *tensors, scale = along_with((*tensors, scale), *operands)
    wide = tuple(x.astype(dtype) for x in tensors)
    return _streamed_state(tuple(tensors), wide, scale, kv_mask, is_causal)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _streamed_state(
    tensors: tuple[Array, ...], wide: tuple[Array, ...], scale: Array, kv_mask: Array | None, is_causal: bool
) -> AttentionState:
    """The state of ``tensors``; ``wide`` is never read, and takes the gradients in the dtype of the sums.

    Heads that share keys add their gradients before these are rounded to the dtype of the keys.
    """
    return _streamed_forward(tensors, wide, scale, kv_mask, is_causal)[0]


def _streamed_forward(tensors, wide, scale, kv_mask, is_causal):
    sums = _by_platform(cpu_forward, accelerator_forward, is_causal, *tensors, scale, kv_mask)
    return sums.state(), (tensors, scale, kv_mask, sums)


def _streamed_backward(is_causal, residuals, cotangent):
    tensors, scale, kv_mask, sums = residuals
    operands = *tensors, scale, kv_mask, sums, cotangent
    *gradients, d_scale = _by_platform(cpu_backward, accelerator_backward, is_causal, *operands)
    return None, tuple(gradients), d_scale, None


# Compiled also where the caller compiles nothing: else every call would compile the loops of all platforms anew.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _by_platform(cpu: Callable[..., Any], default: Callable[..., Any], is_causal: bool, *operands: Any) -> Any:
    cpu, default = (functools.partial(form, is_causal=is_causal) for form in (cpu, default))
    return lax.platform_dependent(*operands, cpu=cpu, default=default)


_streamed_state.defvjp(_streamed_forward, _streamed_backward)


class Normalised(NamedTuple):
    """Outputs ``[T, Dv]``, and normalisers ``[T]`` as peaks and the logarithms of sums.

    Added to a large peak, the logarithm of the sum would be rounded away. A row that sees no key has the peak `HIDDEN`.
    """

    out: Array
    peak: Array
    log_total: Array

    def state(self) -> AttentionState:
        """With the two parts of a normaliser added."""
        return AttentionState(self.out, jnp.where(self.peak <= HIDDEN / 2, -jnp.inf, self.peak + self.log_total))


class _Sums(NamedTuple):
    """Unnormalised sums over the keys of some tiles: weights relative to the peak, and weights times values."""

    peak: Array
    total: Array
    product: Array

    def plus(self, other: "_Sums") -> "_Sums":
        peak = lax.stop_gradient(jnp.maximum(self.peak, other.peak))
        own, others = jnp.exp(self.peak - peak), jnp.exp(other.peak - peak)
        product = self.product * own[:, None] + other.product * others[:, None]
        return _Sums(peak, self.total * own + other.total * others, product)


def _logits(q: Array, k: Array, bias: Array | None, scale: Array | None) -> Array:
    logits = _product(q, k.T)
    logits = logits if scale is None else logits * scale
    return logits if bias is None else logits + bias[None, :]


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, preferred_element_type=accumulation_dtype(a, b))


def _tile(q: Array, k: Array, v: Array, bias: Array | None, scale: Array | None = None, seen: Any = None) -> _Sums:
    logits = _logits(q, k, bias, scale)
    logits = logits if seen is None else jnp.where(seen, logits, HIDDEN)
    # The peak cancels between numerator and normaliser, so it needs no derivative.
    peak = lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits - peak)
    return _Sums(peak[:, 0], jnp.sum(weights, axis=-1), _product(weights.astype(v.dtype), v))


def _diagonal(q: Array, k: Array, v: Array, bias: Array | None, strip: int) -> _Sums:
    """A tile on the diagonal, in strips of queries that see no key behind their last."""
    parts = []
    for start in range(0, q.shape[0], strip):
        end = min(start + strip, q.shape[0])
        seen = jnp.tri(end - start, end, start, dtype=bool)
        parts.append(_tile(q[start:end], k[:end], v[:end], None if bias is None else bias[:end], seen=seen))
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


def _over_pairs(step: Callable[[Any, Array, Array], Any], carry: Any, rows: range, length: Callable[[Any], Any]) -> Any:
    """``step(carry, i, j)`` for all ``j < length(i)`` of every row i, one after the other."""
    count = sum(map(length, rows))
    if not count:
        return carry

    def body(_, place: tuple[Array, Array, Any]) -> tuple[Array, Array, Any]:
        i, j, carry = place
        carry = step(carry, i, j)
        last = j + 1 == length(i)
        return jnp.where(last, i + 1, i), jnp.where(last, 0, j + 1), carry

    return lax.fori_loop(0, count, body, (jnp.int32(rows.start), jnp.int32(0), carry))[2]


def _over_blocks(step: Callable[[Any, Array, Array], Any], carry: Any, rows: int, columns: int | None) -> Any:
    """``step(carry, i, j)`` for all pairs of blocks, or without ``columns`` for those with j <= i."""
    return _over_pairs(step, carry, range(rows), lambda i: i + 1 if columns is None else columns)


def _at(tree: Any, index: Array, rows: int) -> Any:
    """Block ``index`` of arrays whose rows are padded to blocks.

    They keep the axis of tokens: cut in two, it would cost a TPU a copy in another layout, of every tensor.
    """
    read = functools.partial(lax.dynamic_slice_in_dim, slice_size=rows, allow_negative_indices=False)
    return jax.tree.map(lambda x: read(x, index * rows), tree)


def _put(tree: Any, index: Array, block: Any) -> Any:
    write = functools.partial(lax.dynamic_update_slice_in_dim, axis=0, allow_negative_indices=False)
    return jax.tree.map(lambda x, part: write(x, part, index * part.shape[0]), tree, block)


def _padded(tree: Any, length: int, fill: float = 0) -> Any:
    """Arrays with rows of ``fill`` up to a length."""

    def of(x: Array) -> Array:
        around = ((0, length - x.shape[0]),) + ((0, 0),) * (x.ndim - 1)
        return jnp.pad(x, around, constant_values=fill) if length > x.shape[0] else x

    return jax.tree.map(of, tree)


def _key_bias(kv_mask: Array | None, num_keys: int, dtype: Any) -> Array | None:
    return None if kv_mask is None else mask_bias(real_keys(kv_mask, num_keys), dtype)


def _padded_keys(
    k: Array, v: Array, kv_mask: Array | None, dtype: Any, length: int, is_causal: bool
) -> tuple[Array, Array, Array | None]:
    """Keys and values padded to a length, and the bias that hides padding, or None where there is nothing to hide."""
    # Causally no real query sees the padding behind the last key.
    if kv_mask is None and not is_causal and length > k.shape[0]:
        kv_mask = jnp.ones(k.shape[0], bool)
    bias = _key_bias(kv_mask, k.shape[0], dtype)
    return *_padded((k, v), length), _padded(bias, length, HIDDEN)


def _no_sums(queries: Array, v: Array, dtype: Any) -> _Sums:
    """The sums over no key."""
    none = jnp.zeros_like(queries[:, 0], dtype)
    return _Sums(none + HIDDEN, none, none[:, None] + jnp.zeros((1, v.shape[1]), dtype))


def _normalise(sums: _Sums, num_queries: int) -> Normalised:
    peak, total, product = jax.tree.map(lambda x: x[:num_queries], sums)
    # A row with NaN must show it and not count as one that sees no key: a maximum may drop NaN, a sum never does.
    unseen = (peak < HIDDEN / 2) & ~jnp.isnan(total)
    out = jnp.where(unseen[:, None], 0, product / total[:, None])
    return Normalised(out, jnp.where(unseen, HIDDEN, peak), jnp.where(unseen, 0, jnp.log(total)))


def _in_float32(q: Array, k: Array, v: Array, scale: Array) -> tuple[Array, Array, Array]:
    """In the dtype of the sums, with the scale folded into queries and keys."""
    q, k, v = (x.astype(scale.dtype) for x in (q, k, v))
    return q * jnp.sqrt(scale), k * jnp.sqrt(scale), v


def cpu_forward(q: Array, k: Array, v: Array, scale: Array, kv_mask: Array | None, *, is_causal: bool) -> Normalised:
    """Attention in float32 or wider, in tiles for the cache of a CPU: those on the diagonal, then those below it."""
    q, k, v = _in_float32(q, k, v, scale)
    if not is_causal:
        state = blocked_state(q, k, v, _key_bias(kv_mask, k.shape[0], q.dtype))
        return Normalised(state.out, jnp.maximum(state.lse, HIDDEN), jnp.zeros_like(state.lse))
    blocks, rows = even_split(q.shape[0], _causal_cpu_tile(q))
    queries = _padded(q, blocks * rows)
    keys = _padded_keys(k, v, kv_mask, q.dtype, blocks * rows, is_causal)
    at = functools.partial(_at, rows=rows)

    def start(i: Array, sums: _Sums) -> _Sums:
        return _put(sums, i, _diagonal(at(queries, i), *at(keys, i), strip=CPU_STRIP))

    def add(sums: _Sums, i: Array, j: Array) -> _Sums:
        return _put(sums, i, at(sums, i).plus(_tile(at(queries, i), *at(keys, j))))

    sums = lax.fori_loop(0, blocks, start, _no_sums(queries, v, q.dtype))
    return _normalise(_over_pairs(add, sums, range(1, blocks), lambda i: i), q.shape[0])


def _causal_cpu_tile(q: Array) -> int:
    return min(max(q.shape[0] // 4, LEAST_CPU_TILE), GREATEST_CPU_TILE)


def accelerator_forward(
    q: Array, k: Array, v: Array, scale: Array, kv_mask: Array | None, *, is_causal: bool
) -> Normalised:
    """Attention of tensors in their dtype, with sums in float32 or wider."""
    (blocks, rows), (key_blocks, columns) = (even_split(x.shape[0], _accelerator_tile(q, k)) for x in (q, k))
    queries = _padded(q, blocks * rows)
    keys = _padded_keys(k, v, kv_mask, scale.dtype, key_blocks * columns, is_causal)

    def add(sums: _Sums, i: Array, j: Array) -> _Sums:
        seen = _seen(i, j, rows) if is_causal else None
        tile = _tile(_at(queries, i, rows), *_at(keys, j, columns), scale=scale, seen=seen)
        return _put(sums, i, _at(sums, i, rows).plus(tile))

    sums = _over_blocks(add, _no_sums(queries, v, scale.dtype), blocks, None if is_causal else key_blocks)
    return _normalise(sums, q.shape[0])


def _accelerator_tile(q: Array, k: Array) -> int:
    return min(max(max(q.shape[0], k.shape[0]) // 8, LEAST_TILE), GREATEST_TILE)


def _seen(i: Array, j: Array, rows: int) -> Array:
    """Which keys of block j queries of block i see, also below the diagonal: one loop is less program than two."""
    place = lax.broadcasted_iota(jnp.int32, (rows, rows), 0) - lax.broadcasted_iota(jnp.int32, (rows, rows), 1)
    return place >= (j - i) * rows


def _cotangents(sums: Normalised, cotangent: AttentionState) -> tuple[Array, Array, Array, Array]:
    """Peaks, logarithms of sums and cotangents, with zeros in rows that see no key: these have the output 0 always."""
    seen = sums.peak > HIDDEN / 2
    keep = lambda x: jnp.where(seen.reshape(-1, *(1,) * (x.ndim - 1)), x, jnp.zeros_like(x))  # noqa: E731
    return keep(sums.peak), keep(sums.log_total), keep(cotangent.out), keep(cotangent.lse)


def _add_to(total: Array, index: Array, term: Array) -> Array:
    return _put(total, index, _at(total, index, term.shape[0]) + term)


def accelerator_backward(
    q: Array,
    k: Array,
    v: Array,
    scale: Array,
    kv_mask: Array | None,
    sums: Normalised,
    cotangent: AttentionState,
    *,
    is_causal: bool,
) -> tuple[Array, Array, Array, Array]:
    r"""Gradients of q, k, v and the scale s as sums over tiles of the weights, which the normalisers give back.

    .. math:: P = e^{X - \mathrm{lse}}, \quad dV = P^T dO, \quad dX = P \odot (dO\,V^T - \delta), \quad
              dQ = s\, dX\,K, \quad dK = s\, dX^T Q, \qquad \delta_t = dO_t \cdot O_t - d\mathrm{lse}_t.

    Tiles are those of the forward pass, so that logits of any size are rounded alike in both.
    """
    num_queries, num_keys = q.shape[0], k.shape[0]
    (blocks, rows), (key_blocks, columns) = (even_split(x.shape[0], _accelerator_tile(q, k)) for x in (q, k))
    peak, log_total, d_out, d_lse = _cotangents(sums, cotangent)
    delta = jnp.sum(d_out * sums.out, axis=-1) - d_lse
    # Rows past the end have the cotangent 0.
    queries = _padded((q, d_out.astype(v.dtype), delta, peak, log_total), blocks * rows)
    keys = _padded_keys(k, v, kv_mask, scale.dtype, key_blocks * columns, is_causal)

    def add(gradients: tuple[Array, ...], i: Array, j: Array) -> tuple[Array, ...]:
        (q, d_out, delta, peak, log_total), (k, v, bias) = _at(queries, i, rows), _at(keys, j, columns)
        logits = _logits(q, k, bias, scale)
        logits = jnp.where(_seen(i, j, rows), logits, HIDDEN) if is_causal else logits
        logits = (logits - peak[:, None]) - log_total[:, None]
        # Rounding lifts no weight above 1; as a constant, so that second derivatives see the logits.
        weights = jnp.exp(logits - lax.stop_gradient(jnp.maximum(logits, 0)))
        d_logits = (weights * (_product(d_out, v.T) - delta[:, None])).astype(q.dtype)
        terms = _product(d_logits, k), _product(d_logits.T, q), _product(weights.astype(v.dtype).T, d_out)
        return tuple(_add_to(x, index, term) for x, index, term in zip(gradients, (i, j, j), terms, strict=True))

    gradients = tuple(jnp.zeros_like(x, scale.dtype) for x in (queries[0], *keys[:2]))
    d_q, d_k, d_v = _over_blocks(add, gradients, blocks, None if is_causal else key_blocks)
    d_q = d_q[:num_queries]
    return d_q * scale, d_k[:num_keys] * scale, d_v[:num_keys], jnp.sum(d_q * q.astype(d_q.dtype))


def cpu_backward(
    q: Array,
    k: Array,
    v: Array,
    scale: Array,
    kv_mask: Array | None,
    sums: Normalised,
    cotangent: AttentionState,
    *,
    is_causal: bool,
) -> tuple[Array, Array, Array, Array]:
    r"""The gradients of `accelerator_backward`, in float32 or wider and in tiles for the cache of a CPU.

    Tiles are transposed, keys by queries: then only one product of five has a transposed operand.

    The forward pass rounds its products in tiles of other shapes. Where logits are so large that the difference would
    show in a weight, the normalisers and the :math:`dO_t \cdot O_t` are computed again from the tiles of this pass.
    """
    unscaled = q
    q, k, v = _in_float32(q, k, v, scale)
    num_queries, num_keys = q.shape[0], k.shape[0]
    block = _causal_cpu_tile(q) if is_causal else GREATEST_CPU_TILE
    (query_blocks, rows), (key_blocks, columns) = even_split(num_queries, block), even_split(num_keys, block)
    length = query_blocks * rows
    peak, log_total, d_out, d_lse = _cotangents(sums, cotangent)
    own, keys = _padded((q, d_out), length), _padded_keys(k, v, kv_mask, q.dtype, key_blocks * columns, is_causal)

    def over_tiles(add: Callable[..., Any], total: Any) -> Any:
        if not is_causal:
            return _over_blocks(add, total, query_blocks, key_blocks)
        # Below the diagonal no mask is computed; tiles above it are not visited.
        total = _over_pairs(add, total, range(1, query_blocks), lambda i: i)
        seen = jnp.tri(rows, dtype=bool).T
        return lax.fori_loop(0, query_blocks, lambda i, x: add(x, i, i, seen), total)

    def tile_logits(q: Array, k: Array, bias: Array | None, seen: Any) -> Array:
        logits = k @ q.T if bias is None else k @ q.T + bias[:, None]
        return logits if seen is None else jnp.where(seen, logits, HIDDEN)

    def add_row_sums(sums: _Sums, i: Array, j: Array, seen: Any = None) -> _Sums:
        (q, d_out), (k, v, bias), before = _at(own, i, rows), _at(keys, j, columns), _at(sums, i, rows)
        logits = tile_logits(q, k, bias, seen)
        peak = lax.stop_gradient(jnp.maximum(before.peak, jnp.max(logits, axis=0)))
        weights, rest = jnp.exp(logits - peak[None, :]), jnp.exp(before.peak - peak)
        total = before.total * rest + jnp.sum(weights, axis=0)
        return _put(sums, i, _Sums(peak, total, before.product * rest + jnp.sum(weights * (v @ d_out.T), axis=0)))

    def again(peak: Array, log_total: Array, product: Array) -> tuple[Array, Array, Array]:
        none = jnp.zeros_like(peak)
        peak, total, product = over_tiles(add_row_sums, _Sums(none + HIDDEN, none, none))
        total = jnp.where(total > 0, total, 1)
        return peak, jnp.log(total), product / total

    # A row past the end gets a huge normaliser and so no weight.
    peak = _padded(peak, length, -HIDDEN)
    log_total, product = _padded((log_total, jnp.sum(d_out * sums.out, axis=-1)), length)
    # A bound on the rounding of a logit, by Cauchy's inequality: one unit of |q| |k|.
    rounding = jnp.finfo(q.dtype).eps * jnp.sqrt(jnp.max(jnp.sum(q * q, -1)) * jnp.max(jnp.sum(k * k, -1)))
    saved = lambda *x: x  # noqa: E731
    peak, log_total, product = lax.cond(rounding > NOTICEABLE, again, saved, peak, log_total, product)
    queries = *own, product - _padded(d_lse, length), peak, log_total

    def add(gradients: tuple[Array, ...], i: Array, j: Array, seen: Any = None) -> tuple[Array, ...]:
        (q, d_out, delta, peak, log_total), (k, v, bias) = _at(queries, i, rows), _at(keys, j, columns)
        logits = (tile_logits(q, k, bias, seen) - peak[None, :]) - log_total[None, :]
        # As in `accelerator_backward`.
        weights = jnp.exp(logits - lax.stop_gradient(jnp.maximum(logits, 0)))
        d_logits = weights * (v @ d_out.T - delta[None, :])
        # The barrier keeps XLA from turning this into d_logits.T @ k, whose large operand would be transposed.
        terms = lax.optimization_barrier(k.T @ d_logits).T, d_logits @ q, weights @ d_out
        return tuple(_add_to(x, index, term) for x, index, term in zip(gradients, (i, j, j), terms, strict=True))

    d_q, d_k, d_v = over_tiles(add, tuple(jnp.zeros_like(x) for x in (own[0], *keys[:2])))
    d_q, d_k, d_v = d_q[:num_queries] * jnp.sqrt(scale), d_k[:num_keys] * jnp.sqrt(scale), d_v[:num_keys]
    return d_q, d_k, d_v, jnp.sum(d_q * unscaled.astype(d_q.dtype)) / scale
