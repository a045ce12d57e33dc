r"""Exact attention of one head as fused kernels for GPUs, written in Pallas and compiled by Triton.

The logits are :math:`x_{tj} = s\, q_t \cdot k_j + b_j`. A program of `forward` loads a block of queries and loops over
the blocks of keys within its reach; no tile of logits is stored. `backward` recomputes each tile from the normalisers,
in two kernels: the gradient of queries loops over keys like `forward`, and that of keys loops over blocks of queries.
`jax.vmap` adds batches and heads as further axes of the grid, without copies of shared tensors.

Products are in the dtype of the tensors, summed in float32. Float32 products follow `jax.default_matmul_precision`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from approx_attention.kernels.reach import Reach
from approx_attention.kernels.tiles import HIDDEN
from approx_attention.kernels.triton_tiles import Tile, Tiles, default_tiles, padded_width

# On a GPU a power of 2 is one instruction, and a power of e about ten: inside the kernels logits are multiplied by
# this.
LOG2_E = math.log2(math.e)


def forward(
    q: Array,
    k: Array,
    v: Array,
    bias: Array,
    scale: Array,
    *,
    reach: Reach,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    r"""Compute outputs and normalisers, :math:`o_t = \sum_j e^{x_{tj} - m_t - l_t} v_j`.

    Args:
        q: queries ``[T, D]``.
        k: keys ``[S, D]`` in the dtype of the queries: float32, bfloat16 or float16.
        v: values ``[S, Dv]`` in the same dtype. Hidden keys and their values must be finite.
        bias: added to the logits of a key, ``[S]`` float32; at most ``HIDDEN / 2`` for a hidden key.
        scale: the factor of the logits, a float32 scalar.
        reach: the keys that each query sees.
        tiles: sizes of tiles, by default `default_tiles`.
        interpret: interpret the kernel, on any platform.

    Returns:
        Outputs ``[T, Dv]``, and normalisers ``[T]`` as the largest logit :math:`m_t` and the logarithm of the sum
        :math:`l_t`, in float32. A row that sees no key has output 0, maximum `HIDDEN` and logarithm 0.
    """
    size = _Size(q.shape[0], k.shape[0], q.shape[1], v.shape[1])
    step = _fitted((tiles or default_tiles(size.head_dim, size.value_dim, q.dtype)).forward, size)
    queries, exp2 = _query_blocks(size, step), jnp.exp2 if interpret else _exp2
    return _call(
        functools.partial(_forward_kernel, _Form(size, step, reach, exp2)),
        step,
        queries.count,
        [
            queries.block(size.head_dim),
            _whole(size.num_keys, step.columns, size.head_dim),
            _whole(size.num_keys, step.columns, size.value_dim),
            _whole(size.num_keys, step.columns),
            _scalar(),
        ],
        [(queries.block(size.value_dim), (size.num_queries, size.value_dim))]
        + 2 * [(queries.block(), (size.num_queries,))],
        interpret,
    )(q, k, v, bias, scale.reshape(1))


def backward(
    q: Array,
    k: Array,
    v: Array,
    bias: Array,
    scale: Array,
    peak: Array,
    log_total: Array,
    delta: Array,
    d_out: Array,
    *,
    reach: Reach,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> tuple[Array, Array, Array, Array]:
    r"""Compute gradients of queries, keys, values and bias from the gradient of outputs.

    Args:
        q: queries ``[T, D]``.
        k: keys ``[S, D]``.
        v: values ``[S, Dv]``.
        bias: added to the logits of a key, ``[S]``.
        scale: the factor of the logits.
        peak: from `forward`, ``[T]``; 0 for a row that sees no key.
        log_total: from `forward`, ``[T]``.
        delta: :math:`\langle \mathrm{d}o_t, o_t \rangle` minus the gradient of the log-normaliser, ``[T]`` float32; 0
            for a row that sees no key.
        d_out: the gradient of the outputs ``[T, Dv]`` in the dtype of the values; 0 for a row that sees no key.
        reach: the keys that each query sees.
        tiles: sizes of tiles; default: `default_tiles`.
        interpret: interpret the kernels, on any platform.

    Returns:
        Gradients of q, k, v and bias, in float32.
    """
    size = _Size(q.shape[0], k.shape[0], q.shape[1], v.shape[1])
    tiles = tiles or default_tiles(size.head_dim, size.value_dim, q.dtype)
    operands = q, k, v, bias, scale.reshape(1), peak, log_total, delta, d_out
    exp2 = jnp.exp2 if interpret else _exp2

    step = _fitted(tiles.d_queries, size)
    queries = _query_blocks(size, step)
    (d_q,) = _call(
        functools.partial(_d_queries_kernel, _Form(size, step, reach, exp2)),
        step,
        queries.count,
        [
            queries.block(size.head_dim),
            _whole(size.num_keys, step.columns, size.head_dim),
            _whole(size.num_keys, step.columns, size.value_dim),
            _whole(size.num_keys, step.columns),
            _scalar(),
            *3 * [queries.block()],
            queries.block(size.value_dim),
        ],
        [(queries.block(size.head_dim), (size.num_queries, size.head_dim))],
        interpret,
    )(*operands)

    step = _fitted(tiles.d_keys, size)
    keys = _Blocks(size.num_keys, step.columns)
    d_k, d_v, d_bias = _call(
        functools.partial(_d_keys_kernel, _Form(size, step, reach, exp2)),
        step,
        keys.count,
        [
            _whole(size.num_queries, step.rows, size.head_dim),
            keys.block(size.head_dim),
            keys.block(size.value_dim),
            keys.block(),
            _scalar(),
            *3 * [_whole(size.num_queries, step.rows)],
            _whole(size.num_queries, step.rows, size.value_dim),
        ],
        [
            (keys.block(size.head_dim), (size.num_keys, size.head_dim)),
            (keys.block(size.value_dim), (size.num_keys, size.value_dim)),
            (keys.block(), (size.num_keys,)),
        ],
        interpret,
    )(*operands)
    return d_q, d_k, d_v, d_bias


class _Size(NamedTuple):
    num_queries: int
    num_keys: int
    head_dim: int
    value_dim: int


class _Form(NamedTuple):
    """The static parameters of a kernel."""

    size: _Size
    tile: Tile
    reach: Reach
    exp2: Callable[[Array], Array]


class _Blocks(NamedTuple):
    """An axis of tokens in blocks, one per program, in ascending or descending order."""

    length: int
    rows: int
    last_first: bool = False

    @property
    def count(self) -> int:
        return pl.cdiv(self.length, self.rows)

    def block(self, *width: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (self.rows, *map(padded_width, width)), lambda i: (self.index(i), *(jnp.int32(0) for _ in width))
        )

    def index(self, program: Array) -> Array:
        return self.count - 1 - program if self.last_first else program

    def first(self) -> Array:
        """The first token of this program."""
        return self.index(pl.program_id(0)) * self.rows


def _query_blocks(size: _Size, tile: Tile) -> _Blocks:
    # In the causal form the last queries see the most keys: their programs start first, and short ones fill the end.
    return _Blocks(size.num_queries, tile.rows, last_first=True)


def fits(q: Array, v: Array) -> bool:
    """Whether blocks of heads of these widths fit in the memory of a multiprocessor."""
    return max(padded_width(x.shape[1]) for x in (q, v)) <= (1024 if q.dtype.itemsize == 2 else 512)


def _whole(length: int, rows: int, *width: int) -> pl.BlockSpec:
    """An array that every program reads in blocks of rows."""
    shape = pl.cdiv(length, rows) * rows, *map(padded_width, width)
    return pl.BlockSpec(shape, lambda i: tuple(jnp.int32(0) for _ in shape))


def _scalar() -> pl.BlockSpec:
    return pl.BlockSpec((1,), lambda i: (jnp.int32(0),))


def _fitted(tile: Tile, size: _Size) -> Tile:
    """The tile, reduced for short sequences."""
    rows, columns = min(tile.rows, padded_width(size.num_queries)), min(tile.columns, padded_width(size.num_keys))
    return tile._replace(rows=rows, columns=columns)


def _call(
    kernel: Callable[..., None],
    tile: Tile,
    count: int,
    operands: list[pl.BlockSpec],
    results: list[tuple[pl.BlockSpec, tuple[int, ...]]],
    interpret: bool,
) -> Callable[..., Any]:
    def of_operands(*arrays: Array) -> Any:
        # In shard_map outputs vary over the same axes as operands.
        out_type = functools.partial(
            jax.ShapeDtypeStruct, dtype=jnp.float32, manual_axis_type=jax.typeof(arrays[0]).mat
        )
        return pl.pallas_call(
            kernel,
            grid=(count,),
            in_specs=operands,
            out_specs=[block for block, _ in results],
            out_shape=[out_type(shape) for _, shape in results],
            compiler_params=plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
            interpret=interpret,
        )(*arrays)

    return of_operands


def _forward_kernel(
    form: _Form,
    q_ref,
    k_ref,
    v_ref,
    bias_ref,
    scale_ref,
    out_ref,
    peak_ref,
    log_total_ref,
):
    size, tile, reach, exp2 = form
    first = _query_blocks(size, tile).first()
    queries = _Rows(0, first, tile.rows, size.num_queries)
    q, scale = queries.read(q_ref, size.head_dim), scale_ref[0] * LOG2_E

    def over(start: Array, carry: tuple[Array, Array, Array], at_edge: bool) -> tuple[Array, Array, Array]:
        product, peak, total = carry
        keys = _Rows(start, start, tile.columns, size.num_keys)
        k, v = keys.read(k_ref, size.head_dim), keys.read(v_ref, size.value_dim)
        bias = keys.read(bias_ref, fill=HIDDEN) * LOG2_E
        logits = _dot(q, k, transposed=True) * scale + bias[None, :]
        if at_edge:
            logits = jnp.where(_seen(queries, keys, reach), logits, HIDDEN)
        greatest = jnp.maximum(peak, jnp.max(logits, axis=1))
        weights = exp2(logits - greatest[:, None])
        fading = exp2(peak - greatest)
        product = product * fading[:, None] + _dot(weights.astype(v.dtype), v)
        return product, greatest, total * fading + jnp.sum(weights, axis=1)

    nothing = (
        jnp.zeros((tile.rows, padded_width(size.value_dim)), jnp.float32),
        jnp.full((tile.rows,), HIDDEN, jnp.float32),
        jnp.zeros((tile.rows,), jnp.float32),
    )
    product, peak, total = _over_reach(over, nothing, first, tile.rows, tile.columns, size.num_keys, reach)
    # A row with NaN must give NaN, and not count as one that sees no key: a maximum may drop NaN, a sum does not.
    peak = jnp.where(jnp.isnan(total), total, peak)
    unseen = peak <= HIDDEN / 2
    total = jnp.where(unseen, 1.0, total)
    queries.write(out_ref, jnp.where(unseen[:, None], 0.0, product / total[:, None]), size.value_dim)
    queries.write(peak_ref, jnp.where(unseen, HIDDEN, peak / LOG2_E))
    queries.write(log_total_ref, jnp.log(total))


def _d_queries_kernel(
    form: _Form,
    q_ref,
    k_ref,
    v_ref,
    bias_ref,
    scale_ref,
    peak_ref,
    log_total_ref,
    delta_ref,
    d_out_ref,
    d_q_ref,
):
    size, tile, reach, exp2 = form
    first = _query_blocks(size, tile).first()
    queries = _Rows(0, first, tile.rows, size.num_queries)
    q, d_out, scale = queries.read(q_ref, size.head_dim), queries.read(d_out_ref, size.value_dim), scale_ref[0]
    peak, log_total = (queries.read(ref)[:, None] * LOG2_E for ref in (peak_ref, log_total_ref))
    delta = queries.read(delta_ref)[:, None]

    def over(start: Array, d_q: Array, at_edge: bool) -> Array:
        keys = _Rows(start, start, tile.columns, size.num_keys)
        k, v = keys.read(k_ref, size.head_dim), keys.read(v_ref, size.value_dim)
        bias = keys.read(bias_ref, fill=HIDDEN) * LOG2_E
        logits = _dot(q, k, transposed=True) * (scale * LOG2_E) + bias[None, :]
        weights = exp2(_at_most_one((logits - peak) - log_total, log_total))
        if at_edge:
            weights = jnp.where(_seen(queries, keys, reach), weights, 0.0)
        d_logits = weights * (_dot(d_out, v, transposed=True) - delta)
        return d_q + _dot(d_logits.astype(k.dtype), k)

    d_q = jnp.zeros((tile.rows, padded_width(size.head_dim)), jnp.float32)
    d_q = _over_reach(over, d_q, first, tile.rows, tile.columns, size.num_keys, reach)
    queries.write(d_q_ref, d_q * scale, size.head_dim)


def _d_keys_kernel(
    form: _Form,
    q_ref,
    k_ref,
    v_ref,
    bias_ref,
    scale_ref,
    peak_ref,
    log_total_ref,
    delta_ref,
    d_out_ref,
    d_k_ref,
    d_v_ref,
    d_bias_ref,
):
    size, tile, reach, exp2 = form
    first = _Blocks(size.num_keys, tile.columns).first()
    keys = _Rows(0, first, tile.columns, size.num_keys)
    k, v, scale = keys.read(k_ref, size.head_dim), keys.read(v_ref, size.value_dim), scale_ref[0]
    bias = keys.read(bias_ref, fill=HIDDEN)[:, None] * LOG2_E

    # The tile is transposed, with keys as rows, so that the weights are the left factor without a transpose.
    def over(start: Array, carry: tuple[Array, Array, Array], at_edge: bool) -> tuple[Array, Array, Array]:
        d_k, d_v, d_bias = carry
        queries = _Rows(start, start, tile.rows, size.num_queries)
        q, d_out = queries.read(q_ref, size.head_dim), queries.read(d_out_ref, size.value_dim)
        peak, log_total = (queries.read(ref)[None, :] * LOG2_E for ref in (peak_ref, log_total_ref))
        delta = queries.read(delta_ref)[None, :]
        logits = _dot(k, q, transposed=True) * (scale * LOG2_E) + bias
        weights = exp2(_at_most_one((logits - peak) - log_total, log_total))
        if at_edge:
            weights = jnp.where(_seen(queries, keys, reach, transposed=True), weights, 0.0)
        d_v = d_v + _dot(weights.astype(d_out.dtype), d_out)
        d_logits = weights * (_dot(v, d_out, transposed=True) - delta)
        d_k = d_k + _dot(d_logits.astype(q.dtype), q)
        return d_k, d_v, d_bias + jnp.sum(d_logits, axis=1)

    nothing = (
        jnp.zeros((tile.columns, padded_width(size.head_dim)), jnp.float32),
        jnp.zeros((tile.columns, padded_width(size.value_dim)), jnp.float32),
        jnp.zeros((tile.columns,), jnp.float32),
    )
    seen = reach.of_keys()
    d_k, d_v, d_bias = _over_reach(over, nothing, first, tile.columns, tile.rows, size.num_queries, seen)
    keys.write(d_k_ref, d_k * scale, size.head_dim)
    keys.write(d_v_ref, d_v, size.value_dim)
    keys.write(d_bias_ref, d_bias)


class _Rows(NamedTuple):
    """Rows of a reference from a start: the tokens from a position on, of ``length`` tokens in all."""

    start: Any
    first: Any
    count: int
    length: int

    @property
    def positions(self) -> Array:
        return self.first + jnp.arange(self.count, dtype=jnp.int32)

    def read(self, ref: Any, width: int | None = None, fill: float = 0.0) -> Array:
        part, mask = self._part(ref, width), self._mask(width)
        if mask is None:
            return plgpu.load(part)
        return plgpu.load(part, mask=mask, other=jnp.asarray(fill, ref.dtype))

    def write(self, ref: Any, value: Array, width: int | None = None) -> None:
        plgpu.store(self._part(ref, width), value, mask=self._mask(width))

    def _part(self, ref: Any, width: int | None) -> Any:
        rows = pl.ds(self.start, self.count)
        return ref.at[rows] if width is None else ref.at[rows, :]

    def _mask(self, width: int | None) -> Array | None:
        """The mask of existing entries, or None if all exist."""
        rows = None if self.length % self.count == 0 else self.positions < self.length
        if width is None:
            return rows
        padded = padded_width(width)
        columns = None if width == padded else jnp.arange(padded, dtype=jnp.int32)[None, :] < width
        if rows is None:
            return columns
        return rows[:, None] if columns is None else rows[:, None] & columns


def _dot(a: Array, b: Array, transposed: bool = False) -> Array:
    """The product of a with b, or with the transpose of b."""
    return lax.dot_general(a, b, (((1,), (int(transposed),)), ((), ())), preferred_element_type=jnp.float32)


def _at_most_one(exponent: Array, log_total: Array) -> Array:
    """Exponents of weights, clipped to 0 against rounding; NaN in a row with NaN."""
    # A minimum on a GPU drops NaN unless both arguments are NaN.
    return jnp.minimum(exponent, log_total - log_total)


def _exp2(x: Array) -> Array:
    """Powers of 2, with 0 below 2^-126; exact subnormal results would need three more instructions."""
    result = jax.ShapeDtypeStruct(x.shape, x.dtype)
    instruction = "ex2.approx.ftz.f32 $0, $1;"
    return plgpu.elementwise_inline_asm(
        instruction, args=[x], constraints="=f,f", pack=1, result_shape_dtypes=[result]
    )[0]


def _seen(queries: _Rows, keys: _Rows, reach: Reach, transposed: bool = False) -> Array:
    """The mask of visible pairs, ``[queries, keys]`` or transposed."""
    query, key = queries.positions, keys.positions
    return reach.seen(query[None, :], key[:, None]) if transposed else reach.seen(query[:, None], key[None, :])


def _over_reach(
    over: Callable[[Array, Any, bool], Any],
    carry: Any,
    first: Array,
    rows: int,
    columns: int,
    length: int,
    reach: Reach,
) -> Any:
    """Loop ``over(start, carry, at_edge)`` over the blocks of columns within reach of the rows from ``first`` on.

    Blocks at an edge of the reach come before and after those that all rows see completely.
    """
    count = pl.cdiv(length, columns)

    def block(position: Array, round_up: bool = False) -> Array:
        inside = jnp.clip(position, 0, count * columns)
        return lax.div(inside + (columns - 1 if round_up else 0), jnp.int32(columns))

    position = first + reach.offset
    begin = inner_begin = jnp.int32(0)
    end = inner_end = jnp.int32(count)
    if reach.left is not None:
        begin = block(position - reach.left)
        inner_begin = block(position + (rows - 1) - reach.left, round_up=True)
    if reach.right is not None:
        end = jnp.maximum(block(position + rows + reach.right, round_up=True), begin)
        inner_begin = jnp.minimum(inner_begin, end)
        inner_end = jnp.maximum(block(position + 1 + reach.right), inner_begin)

    def loop(begin: Array, end: Array, carry: Any, at_edge: bool) -> Any:
        return lax.fori_loop(begin, end, lambda j, carry: over(j * columns, carry, at_edge), carry)

    if reach.left is not None:
        carry = loop(begin, inner_begin, carry, True)
    carry = loop(inner_begin, inner_end, carry, False)
    if reach.right is not None:
        carry = loop(inner_end, end, carry, True)
    return carry
