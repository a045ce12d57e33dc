r"""The attention kernel for TPUs (Pallas, Mosaic).

All tensors have the sequence as their last axis, in HBM and in blocks: 64 channels as the last axis would be padded to
128. A tile of logits has queries as rows; in the kernel for the gradient of keys and values it is transposed. Row
tensors are transposed once per block of rows. Column tensors need no transpose, because the matrix units accept a
transposed operand.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from approx_attention.kernels.reach import Reach
from approx_attention.kernels.rows import round_up
from approx_attention.kernels.tiles import HIDDEN

LANES = 128
# With these settings of `jax.default_matmul_precision` float32 products take one pass of the matrix units.
_ONE_PASS = None, "default", "fastest", "bfloat16", "BF16_BF16_F32"


class Tile(NamedTuple):
    """Block sizes, multiples of 128.

    Attributes:
        rows: queries per block.
        columns: keys per block.
        strip: columns of a tile of logits that are computed at once.
    """

    rows: int
    columns: int
    strip: int


class Tiles(NamedTuple):
    """The tiles of the kernels for the state and for both gradients."""

    forward: Tile
    backward: Tile


# Chosen from the compiler's schedules for a v5e at d = 64 and 128, not from times; see `benchmarks/kernels.py`.
# Backward: the fewest bundles per logit among tiles that leave VMEM for d = 256 in half precision. Forward: 512 rows
# need 5 % fewer bundles, but read keys and values twice as often, for which the memory of a v6e is too slow.
TILES = Tiles(Tile(1024, 1024, 512), Tile(1024, 512, 512))
# The largest number of bytes of a query or key plus a value for which these tiles fit in VMEM (16 MiB on a v5e).
TOKEN_BYTES = 1024
# The largest number of channels of a query plus a value for which the smallest tiles fit.
MOST_CHANNELS = 2048


def default_tiles(head_dim: int, value_dim: int, dtype: Any) -> Tiles:
    """`TILES`, or smaller ones for wide heads."""
    size = (head_dim + value_dim) * jnp.dtype(dtype).itemsize
    # Products in full precision need twice the memory.
    size *= 2 if _precision(dtype) == lax.Precision.HIGHEST else 1
    halvings = max(0, math.ceil(math.log2(size / TOKEN_BYTES)))
    return Tiles(*(Tile(*(max(LANES, length >> halvings) for length in tile)) for tile in TILES))


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
    """Outputs ``[T, Dv]``, maxima ``[T]`` and logarithms of sums ``[T]`` of one head, in float32."""
    (num_queries, _), (num_keys, value_dim) = q.shape, v.shape
    q, k, v = (_multiplied(x) for x in (q, k, v))
    tiles = tiles or default_tiles(q.shape[1], value_dim, q.dtype)
    call = _Call(reach, _fitted(tiles.forward, num_queries, num_keys), num_queries, num_keys, interpret)
    queries, keys = call.rows_of(q), (*(call.columns_of(x) for x in (k, v)), call.bias(bias))
    width = queries.shape[0], keys[1].shape[0]
    rows = call.tile.rows
    out, peak, log_total = call(
        functools.partial(_forward_kernel, call),
        "attention_forward",
        operands=[(scale.reshape(1, 1), "scale"), (queries, "row"), *((x, "column") for x in keys)],
        outputs=[(width[1], "row"), (1, "row"), (1, "row")],
        scratch=[((rows, width[0]), q.dtype), *[((rows, x), jnp.float32) for x in (LANES, LANES, width[1])]],
    )
    return out[:value_dim, :num_queries].T, peak[0, :num_queries], log_total[0, :num_queries]


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
    """Gradients of q, k, v and the bias, in float32; see `xla.backward`."""
    (num_queries, head_dim), (num_keys, value_dim) = q.shape, v.shape
    q, k, v, d_out = (_multiplied(x) for x in (q, k, v, d_out))
    tiles = tiles or default_tiles(head_dim, value_dim, q.dtype)
    call = _Call(reach, _fitted(tiles.backward, num_queries, num_keys), num_queries, num_keys, interpret)
    queries = *(call.rows_of(x) for x in (q, d_out)), *(call.rows_of(x[:, None]) for x in (peak, log_total, delta))
    keys = *(call.columns_of(x) for x in (k, v)), call.bias(bias)
    width, value_width = queries[0].shape[0], queries[1].shape[0]
    rows = call.tile.rows
    (d_q,) = call(
        functools.partial(_d_queries_kernel, call),
        "attention_d_queries",
        operands=[(scale.reshape(1, 1), "scale"), *((x, "row") for x in queries), *((x, "column") for x in keys)],
        outputs=[(width, "row")],
        scratch=[
            *(((rows, x.shape[0]), x.dtype) for x in queries[:2]),
            *(((rows, x), jnp.float32) for x in (LANES, LANES, LANES, width)),
        ],
    )
    # The same pairs with queries and keys exchanged, so that keys are rows.
    call = call.exchanged()
    rows = call.tile.rows
    d_k, d_v, d_bias = call(
        functools.partial(_d_keys_kernel, call),
        "attention_d_keys",
        operands=[(scale.reshape(1, 1), "scale"), *((x, "row") for x in keys), *((x, "column") for x in queries)],
        outputs=[(width, "row"), (value_width, "row"), (1, "row")],
        scratch=[
            *(((rows, x.shape[0]), x.dtype) for x in keys[:2]),
            *(((rows, x), jnp.float32) for x in (LANES, width, value_width, LANES)),
        ],
    )
    d_q, d_k, d_v = d_q[:head_dim, :num_queries].T, d_k[:head_dim, :num_keys].T, d_v[:value_dim, :num_keys].T
    return d_q, d_k, d_v, d_bias[0, :num_keys]


def fits(q: Array, v: Array) -> bool:
    """Whether the smallest tile of heads of these widths fits in the VMEM of a TPU."""
    return q.shape[1] + v.shape[1] <= MOST_CHANNELS


def _fitted(tile: Tile, num_queries: int, num_keys: int) -> Tile:
    """A tile no larger than needed."""
    rows, columns = (min(size, round_up(n, LANES)) for size, n in ((tile.rows, num_queries), (tile.columns, num_keys)))
    return Tile(rows, columns, min(tile.strip, columns))


class _Call(NamedTuple):
    """A call of a kernel over blocks of rows and their visited blocks of columns."""

    reach: Reach
    tile: Tile
    num_rows: int
    num_columns: int
    interpret: bool

    def exchanged(self) -> "_Call":
        tile = Tile(self.tile.columns, self.tile.rows, min(self.tile.strip, self.tile.rows))
        return _Call(self.reach.of_keys(), tile, self.num_columns, self.num_rows, self.interpret)

    @property
    def blocks(self) -> tuple[int, int]:
        """The numbers of blocks of rows and of columns."""
        return -(-self.num_rows // self.tile.rows), -(-self.num_columns // self.tile.columns)

    def rows_of(self, x: Array) -> Array:
        return _sequence_last(x, self.blocks[0] * self.tile.rows)

    def columns_of(self, x: Array) -> Array:
        return _sequence_last(x, self.blocks[1] * self.tile.columns)

    def bias(self, bias: Array) -> Array:
        length = self.blocks[1] * self.tile.columns
        return jnp.pad(bias.astype(jnp.float32), (0, length - self.num_columns), constant_values=HIDDEN)[None, :]

    def column_block(self, i: Array, step: Array) -> tuple[Array, Array]:
        """The index of the step's block of columns, and whether it is visited."""
        _, columns = self.blocks
        first = self.reach.first(i, self.tile.rows, self.tile.columns)
        end = self.reach.end(i, self.tile.rows, self.tile.columns, columns)
        return first + step, first + step < end

    def seen(self, i: Array, j: Array, start: int, width: int) -> Array:
        """The mask of visible columns in a strip of tile (i, j)."""
        row, column = (lax.broadcasted_iota(jnp.int32, (self.tile.rows, width), axis) for axis in (0, 1))
        return self.reach.seen(row + i * self.tile.rows, column + (j * self.tile.columns + start))

    def strips(self) -> list[tuple[int, int]]:
        """The starts and widths of strips."""
        starts = range(0, self.tile.columns, self.tile.strip)
        return [(start, min(self.tile.strip, self.tile.columns - start)) for start in starts]

    def __call__(
        self,
        kernel: Any,
        name: str,
        *,
        operands: list[tuple[Array, str]],
        outputs: list[tuple[int, str]],
        scratch: list[tuple[tuple[int, int], Any]],
    ) -> list[Array]:
        blocks, column_blocks = self.blocks
        steps = max(self.reach.most_blocks(blocks, self.tile.rows, self.tile.columns, column_blocks), 1)

        def column_index(i: Array, step: Array) -> tuple[int, Array]:
            # A step without a visited block keeps the previous index, so that nothing is read.
            j, _ = self.column_block(i, step)
            end = self.reach.end(i, self.tile.rows, self.tile.columns, column_blocks)
            return 0, jnp.clip(jnp.minimum(j, end - 1), 0, column_blocks - 1)

        def spec(channels: int, kind: str) -> pl.BlockSpec:
            if kind == "scale":
                return pl.BlockSpec(memory_space=pltpu.SMEM)
            if kind == "row":
                return pl.BlockSpec((channels, self.tile.rows), lambda i, step: (0, i))
            return pl.BlockSpec((channels, self.tile.columns), column_index)

        length = blocks * self.tile.rows
        # In shard_map outputs vary over the same axes as operands.
        varying = jax.typeof(operands[-1][0]).mat
        out_type = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32, manual_axis_type=varying)
        return pl.pallas_call(
            kernel,
            grid=(blocks, steps),
            in_specs=[spec(x.shape[0], kind) for x, kind in operands],
            out_specs=[spec(channels, kind) for channels, kind in outputs],
            out_shape=[out_type((channels, length)) for channels, _ in outputs],
            scratch_shapes=[pltpu.VMEM(shape, dtype) for shape, dtype in scratch],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
            interpret=self.interpret,
            name=name,
        )(*(x for x, _ in operands))


def _sequence_last(x: Array, length: int) -> Array:
    """Rows ``[n, D]`` as ``[D', length]``, padded with zeros to the length and to full registers of channels."""
    channels = x.shape[1] if x.shape[1] == 1 else round_up(x.shape[1], 32 // x.dtype.itemsize)
    return jnp.pad(x.T, ((0, channels - x.shape[1]), (0, length - x.shape[0])))


def _turned(x: Array) -> Array:
    """The transpose via float32, because narrower numbers are packed in pairs of rows."""
    return x.astype(jnp.float32).T.astype(x.dtype)


def _to_lanes(row: Array) -> Array:
    """A row ``[1, n]`` as a column in all lanes, ``[n, 128]``."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def _along(column: Array, width: int) -> Array:
    """A column in all lanes, ``[n, 128]``, repeated to ``[n, width]``."""
    return column if width == LANES else jnp.tile(column, (1, width // LANES))


def _multiplied(x: Array) -> Array:
    """Cast to a dtype that the matrix units of a TPU support, which float16 is not."""
    return x if x.dtype == jnp.bfloat16 else x.astype(jnp.float32)


def _precision(dtype: Any) -> lax.Precision:
    """The precision of products, by `jax.default_matmul_precision`."""
    # Mosaic supports products in one pass and in full float32 precision; intermediate settings are rounded up.
    # Declared dynamically when JAX is imported.
    asked = getattr(jax.config, "jax_default_matmul_precision")  # noqa: B009
    is_full = dtype == jnp.float32 and asked not in _ONE_PASS
    return lax.Precision.HIGHEST if is_full else lax.Precision.DEFAULT


def _product(a: Array, b: Array, axis: int = 0) -> Array:
    axes = (((1,), (axis,)), ((), ()))
    return lax.dot_general(a, b, axes, precision=_precision(a.dtype), preferred_element_type=jnp.float32)


def _product_transposed(a: Array, b: Array) -> Array:
    return _product(a, b, axis=1)


def _on_visited(call: _Call, step_of_tile: Any) -> None:
    """Run the step of a tile, with a mask only if an edge of the reach crosses it."""
    i, step = pl.program_id(0), pl.program_id(1)
    j, is_visited = call.column_block(i, step)
    if call.reach.is_full:
        step_of_tile(i, j, is_masked=False)
        return
    is_whole = call.reach.is_whole(i, j, call.tile.rows, call.tile.columns)
    pl.when(is_visited & is_whole)(lambda: step_of_tile(i, j, is_masked=False))
    pl.when(is_visited & jnp.logical_not(is_whole))(lambda: step_of_tile(i, j, is_masked=True))


def _forward_kernel(
    call: _Call, scale: Any, q: Any, k: Any, v: Any, bias: Any, out: Any, peak: Any, log_total: Any, *scratch: Any
) -> None:
    turned, highest, total, sums = scratch

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        turned[...] = _turned(q[...])
        highest[...] = jnp.full_like(highest, HIDDEN)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    def tile(i: Array, j: Array, *, is_masked: bool) -> None:
        for start, width in call.strips():
            part = pl.ds(start, width)
            logits = _product(turned[...], k[:, part]) * scale[0, 0] + bias[:, part]
            if is_masked:
                logits = jnp.where(call.seen(i, j, start, width), logits, HIDDEN)
            before = highest[...]
            now = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
            weights, rest = jnp.exp(logits - _along(now, width)), jnp.exp(before - now)
            # The sum over lanes is computed at the end.
            of_lanes = functools.reduce(jnp.add, [weights[:, x : x + LANES] for x in range(0, width, LANES)])
            highest[...], total[...] = now, total[...] * rest + of_lanes
            product = _product_transposed(weights.astype(v.dtype), v[:, part])
            sums[...] = sums[...] * rest[:, :1] + product

    _on_visited(call, tile)

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _() -> None:
        all_lanes = jnp.sum(total[...], axis=1, keepdims=True)
        # A row with NaN must give NaN: a maximum may drop NaN, a sum does not.
        top = jnp.where(all_lanes == all_lanes, highest[:, :1], all_lanes)
        unseen = top <= HIDDEN / 2
        out[...] = jnp.where(unseen, 0.0, sums[...] / all_lanes).T
        of_row = lambda x: jnp.broadcast_to(x, (x.shape[0], LANES)).T[:1]  # noqa: E731
        peak[...] = of_row(jnp.where(unseen, HIDDEN, top))
        log_total[...] = of_row(jnp.where(unseen, 0.0, jnp.log(all_lanes)))


def _weights(logits: Array, peak: Array, log_total: Array) -> Array:
    # Rounding must not lift a weight above 1.
    return jnp.exp(jnp.minimum((logits - peak) - log_total, 0.0))


def _d_queries_kernel(
    call: _Call,
    scale: Any,
    q: Any,
    d_out: Any,
    peak: Any,
    log_total: Any,
    delta: Any,
    k: Any,
    v: Any,
    bias: Any,
    d_q: Any,
    *scratch: Any,
) -> None:
    turned_q, turned_d_out, peaks, logs, deltas, total = scratch

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        turned_q[...], turned_d_out[...] = _turned(q[...]), _turned(d_out[...])
        peaks[...], logs[...], deltas[...] = (_to_lanes(x[...]) for x in (peak, log_total, delta))
        total[...] = jnp.zeros_like(total)

    def tile(i: Array, j: Array, *, is_masked: bool) -> None:
        for start, width in call.strips():
            part = pl.ds(start, width)
            logits = _product(turned_q[...], k[:, part]) * scale[0, 0] + bias[:, part]
            if is_masked:
                logits = jnp.where(call.seen(i, j, start, width), logits, HIDDEN)
            weights = _weights(logits, _along(peaks[...], width), _along(logs[...], width))
            d_logits = weights * (_product(turned_d_out[...], v[:, part]) - _along(deltas[...], width))
            total[...] += _product_transposed(d_logits.astype(k.dtype), k[:, part])

    _on_visited(call, tile)

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _() -> None:
        d_q[...] = (total[...] * scale[0, 0]).T


def _d_keys_kernel(
    call: _Call,
    scale: Any,
    k: Any,
    v: Any,
    bias: Any,
    q: Any,
    d_out: Any,
    peak: Any,
    log_total: Any,
    delta: Any,
    d_k: Any,
    d_v: Any,
    d_bias: Any,
    *scratch: Any,
) -> None:
    turned_k, turned_v, biases, total_k, total_v, total_bias = scratch

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        turned_k[...], turned_v[...], biases[...] = _turned(k[...]), _turned(v[...]), _to_lanes(bias[...])
        for total in (total_k, total_v, total_bias):
            total[...] = jnp.zeros_like(total)

    def tile(j: Array, i: Array, *, is_masked: bool) -> None:
        for start, width in call.strips():
            part = pl.ds(start, width)
            logits = _product(turned_k[...], q[:, part]) * scale[0, 0] + _along(biases[...], width)
            if is_masked:
                logits = jnp.where(call.seen(j, i, start, width), logits, HIDDEN)
            weights = _weights(logits, peak[:, part], log_total[:, part])
            d_logits = weights * (_product(turned_v[...], d_out[:, part]) - delta[:, part])
            total_v[...] += _product_transposed(weights.astype(d_out.dtype), d_out[:, part])
            total_k[...] += _product_transposed(d_logits.astype(q.dtype), q[:, part])
            total_bias[...] += functools.reduce(jnp.add, [d_logits[:, x : x + LANES] for x in range(0, width, LANES)])

    _on_visited(call, tile)

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _() -> None:
        d_k[...], d_v[...] = (total_k[...] * scale[0, 0]).T, total_v[...].T
        d_bias[...] = jnp.broadcast_to(jnp.sum(total_bias[...], axis=1, keepdims=True), total_bias.shape).T[:1]
