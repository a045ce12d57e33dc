"""Groups of neighbouring tokens and their means, for the landmarks, proposals and chunks of methods."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from approx_attention.core.checks import check_count, real_keys
from approx_attention.core.padding import count_real, floor_of_share
from approx_attention.core.summaries import WeightedKV
from approx_attention.kernels import in_blocks, pad_rows


@dataclasses.dataclass(frozen=True)
class Segments:
    """M groups of tokens by their indices, which may be static.

    Attributes:
        member: indices of tokens ``[M, longest]``.
        inside: false for filling, in groups with fewer than the longest number of tokens ``[M, longest]``.
    """

    member: np.ndarray | Array
    inside: np.ndarray | Array

    def gather(self, x: Array) -> Array:
        """Rows ``[S, ...]`` by segment, ``[M, longest, ...]``, with zeros as filling."""
        # For segments of equal length this is a reshape, without a gather, and a scatter in its derivative.
        known = isinstance(self.inside, np.ndarray)
        if known and self.inside.all() and np.array_equal(self.member.reshape(-1), np.arange(x.shape[0])):
            return x.reshape(*self.member.shape, *x.shape[1:])
        inside = self.inside.reshape(self.inside.shape + (1,) * (x.ndim - 1))
        return jnp.where(inside, x[self.member], jnp.zeros((), x.dtype))

    def sums(self, x: Array) -> Array:
        """Sums of the rows ``[S, ...]`` of each segment, ``[M, ...]``."""
        return jnp.sum(self.gather(x), axis=1)

    def maxima(self, x: Array) -> Array:
        """Maxima of the rows ``[S, D]`` of each segment ``[M, D]``."""
        return jnp.max(self.gather(x), axis=1, where=self.inside[..., None], initial=-jnp.inf)


@dataclasses.dataclass(frozen=True)
class RankedSegments:
    """M groups of the real tokens of a sequence.

    Attributes:
        number: the group of each token, int32 ``[S]``; M for padding.
        num_segments: the number M of groups.
    """

    number: Array
    num_segments: int

    def sums(self, x: Array) -> Array:
        """Sums of the real rows ``[S, ...]`` of each segment, ``[M, ...]``."""
        # Padding has the number M, which is out of bounds, so the scatter drops it.
        return jax.ops.segment_sum(x, self.number, self.num_segments)

    def maxima(self, x: Array) -> Array:
        """Maxima of the real rows ``[S, D]`` of each segment ``[M, D]``; minus infinity for an empty one."""
        return jax.ops.segment_max(x, self.number, self.num_segments)


def segments_of(
    num_tokens: int, num_segments: int, real: Array | None = None, most: Array | int | None = None
) -> Segments | RankedSegments:
    r"""Cut tokens into runs whose lengths differ by at most 1: segment c contains the j with floor(j M / S) = c.

    Padding is in no segment: with ``real``, j is the rank of a token among the n real ones, S is n, and M is at most n,
    so that the segments are those of the sequence without its padding.

    Args:
        num_tokens: the number S of positions.
        num_segments: M, at most S.
        real: mask of the real tokens ``[S]``.
        most: another upper bound of M, which leaves the last segments empty; only with ``real``.

    Returns:
        The segments, with static indices unless ``real`` is given.
    """
    if real is not None:
        return RankedSegments(_ranked(num_segments, real, most), num_segments)
    return _runs(num_tokens, num_segments)


def _runs(num_tokens: int, num_segments: int) -> Segments:
    bounds = -(-np.arange(num_segments + 1) * num_tokens // num_segments)
    member = bounds[:-1, None] + np.arange(-(-num_tokens // num_segments))
    inside = member < bounds[1:, None]
    return Segments(np.minimum(member, num_tokens - 1), inside)


def _ranked(num_segments: int, real: Array, most: Array | int | None) -> Array:
    """The segment of each real token by its rank ``[S]``, and ``num_segments`` for padding."""
    count = count_real(real)
    used = jnp.minimum(num_segments, count if most is None else jnp.minimum(count, most))
    # Integer division rank M / n, whose product may exceed 2^31 for long sequences.
    number, _ = floor_of_share(jnp.cumsum(real, dtype=jnp.int32) - 1, used, jnp.maximum(count, 1))
    return jnp.where(real, number, num_segments)


def averaging_matrix(num_tokens: int, num_segments: int, dtype: Any, real: Array | None = None) -> Array:
    """The matrix whose rows average the segments of `segments_of`.

    Args:
        num_tokens: the number S of positions.
        num_segments: the number M of segments; one per token if it exceeds S.
        dtype: dtype of the matrix.
        real: mask of the real tokens ``[S]``; by default all are. Columns of padding are 0.

    Returns:
        The matrix ``[min(M, S), S]``. Rows sum to 1; with fewer than M real tokens the last rows are 0.

    Example:
        >>> import jax.numpy as jnp
        >>> averaging_matrix(4, 2, jnp.float32).tolist()
        [[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]
    """
    num_segments = min(num_segments, num_tokens)
    if real is None:
        segment = jnp.asarray(np.arange(num_tokens) * num_segments // num_tokens)
    else:
        segment = _ranked(num_segments, real, None)
    member = (segment[None, :] == jnp.arange(num_segments, dtype=segment.dtype)[:, None]).astype(dtype)
    return member / jnp.maximum(jnp.sum(member, axis=1, keepdims=True), 1)


def grid_segments(shape: tuple[int, int], num_segments: int) -> Segments:
    """Cut an image into a square number of rectangles.

    Args:
        shape: height and width of the image, whose pixels are the tokens row by row.
        num_segments: the number M of rectangles, the square of at most the shorter side.

    Returns:
        The `Segments`; sides of rectangles differ by at most one pixel.

    Raises:
        ValueError: M is not a square, or exceeds the square of the shorter side; a side below 1.
        TypeError: a side that is not an integer.

    Example:
        >>> grid_segments((4, 4), 4).member[0].tolist()  # the upper left quarter
        [0, 1, 4, 5]
    """
    height, width = (check_count("spatial_shape", side) for side in shape)
    side = math.isqrt(num_segments)
    if side * side != num_segments or side > min(height, width):
        raise ValueError(
            f"the landmarks of an image must be a square number of at most {min(height, width)}^2, got {num_segments}"
        )
    rows, columns = _runs(height, side), _runs(width, side)
    member = rows.member[:, None, :, None] * width + columns.member[None, :, None, :]
    inside = rows.inside[:, None, :, None] & columns.inside[None, :, None, :]
    return Segments(member.reshape(num_segments, -1), inside.reshape(num_segments, -1))


def landmark_segments(num_tokens: int, num_landmarks: int, spatial_shape: tuple[int, int] | None = None) -> Segments:
    """Cut tokens into runs, or an image into the largest square number of rectangles up to ``num_landmarks``.

    Args:
        num_tokens: the number of tokens.
        num_landmarks: the requested number of segments.
        spatial_shape: height and width of the image whose pixels are the tokens, row by row.

    Returns:
        The `Segments`.

    Raises:
        ValueError: ``spatial_shape`` does not match the number of tokens.
    """
    if spatial_shape is None:
        return _runs(num_tokens, num_landmarks)
    if math.prod(spatial_shape) != num_tokens:
        raise ValueError(f"spatial_shape must have {num_tokens} pixels, one per token, got {spatial_shape}")
    return grid_segments(spatial_shape, math.isqrt(min(num_landmarks, min(spatial_shape) ** 2)) ** 2)


class TokenSums(NamedTuple):
    """Sums over the real tokens of M segments.

    Attributes:
        k: sums of keys ``[M, D]``.
        v: sums of values ``[M, Dv]``.
        count: numbers of real tokens ``[M]``, in the dtype of the sums.
    """

    k: Array
    v: Array
    count: Array

    @classmethod
    def of_tokens(cls, k: Array, v: Array, kv_mask: Array | None) -> "TokenSums":
        """The sums of segments of one token each.

        Args:
            k: keys ``[S, D]``.
            v: values ``[S, Dv]``.
            kv_mask: true where a key is real ``[S]``; None if all are. Padding has sums and count 0.

        Returns:
            The sums, with M = S, in the accumulation dtype.

        Raises:
            TypeError: keys or values that are not floating point, a mask that is not boolean.
            ValueError: different numbers of keys, values and mask entries.
        """
        tokens = WeightedKV.of_tokens(k, v, kv_mask)
        return cls(tokens.k, tokens.value_sum, tokens.mass)

    def pooled(self, parts: Segments | RankedSegments) -> "TokenSums":
        """Sums over unions of these segments."""
        return jax.tree.map(parts.sums, self)

    def landmarks(self) -> WeightedKV:
        """Mean keys of the segments with their summed values; a segment without a real token has mass 0."""
        return WeightedKV(mean(self.k, self.count), self.v, self.count)


def mean(total: Array, count: Array) -> Array:
    """Rows ``total [M, D]`` over ``count [M]``; 0 for a count of 0."""
    return total / jnp.maximum(count, jnp.ones_like(count))[:, None]


def segment_means(x: Array, parts: Segments | RankedSegments, mask: Array | None = None) -> Array:
    """Means of the rows of each segment.

    Args:
        x: rows ``[S, D]``.
        parts: M segments of S tokens.
        mask: the rows that count ``[S]``; by default all.

    Returns:
        The means ``[M, D]`` in the accumulation dtype; 0 for a segment without rows that count.

    Raises:
        TypeError: rows that are not floating point, a mask that is not boolean.
        ValueError: rows that are not ``[S, D]``, a mask that is not ``[S]``.

    Example:
        >>> import jax.numpy as jnp
        >>> segment_means(jnp.arange(4.0)[:, None], segments_of(4, 2))[:, 0].tolist()
        [0.5, 2.5]
    """
    # Values without channels: the sums of `TokenSums` zero padding and count real tokens.
    sums = TokenSums.of_tokens(x, x[:, :0], mask).pooled(parts)
    return mean(sums.k, sums.count)


def landmark_means(
    x: Array,
    num_landmarks: int,
    mask: Array | None,
    spatial_shape: tuple[int, int] | None = None,
    most: Array | int | None = None,
) -> Array:
    """Means of the real rows over segments of the real tokens, or over rectangles of an image.

    Args:
        x: rows ``[S, D]``.
        num_landmarks: the number M of segments, at most S.
        mask: true where a row is real ``[S]``; None if all are. Pixels of an image keep their positions.
        spatial_shape: height and width of the image whose pixels are the tokens, row by row; None for a sequence. Then
            M is the largest square up to ``num_landmarks`` and up to that of the shorter side.
        most: as in `segments_of`; only for a sequence with a mask.

    Returns:
        The means ``[M, D]`` in the accumulation dtype; 0 for a segment without real rows.

    Raises:
        ValueError: ``spatial_shape`` does not match S.
    """
    # The pixels of an image keep their positions: padding may leave a rectangle with few pixels or none.
    if mask is None or spatial_shape is not None:
        return segment_means(x, landmark_segments(x.shape[0], num_landmarks, spatial_shape), mask)
    return segment_means(x, segments_of(x.shape[0], num_landmarks, mask, most), mask)


def paired_means(
    q: Array,
    k: Array,
    num_segments: int,
    q_mask: Array | None,
    kv_mask: Array | None,
    spatial_shape: tuple[int, int] | None = None,
) -> tuple[Array, Array, Array | None]:
    """Means of queries and of keys over equally many segments, at most the number of real queries and of real keys.

    Args:
        q: queries ``[T, D]``.
        k: keys ``[S, D]``.
        num_segments: M, at most T and S.
        q_mask: true where a query is real ``[T]``.
        kv_mask: true where a key is real ``[S]``.
        spatial_shape: as in `landmark_segments`.

    Returns:
        The means ``[M, D]`` of queries and of keys, and a mask of non-empty segments ``[M]``, None for all.
    """
    most = present = None
    if spatial_shape is None and (q_mask is not None or kv_mask is not None):
        q_mask, kv_mask = real_keys(q_mask, q.shape[0]), real_keys(kv_mask, k.shape[0])
        most = jnp.minimum(count_real(q_mask), count_real(kv_mask))
        present = jnp.arange(num_segments, dtype=jnp.int32) < most
    q_mean = landmark_means(q, num_segments, q_mask, spatial_shape, most)
    return q_mean, landmark_means(k, num_segments, kv_mask, spatial_shape, most), present


class GrowingSegments(NamedTuple):
    """Consecutive segments of equal length over a growing sequence, from position 0.

    Attributes:
        sums: the `TokenSums` of M segments; those after the last token are 0.
        length: the number of positions per segment, int32.
    """

    sums: TokenSums
    length: Array

    @classmethod
    def empty(cls, num_segments: int, head_dim: int, value_dim: int, dtype: Any) -> "GrowingSegments":
        """Segments without tokens, whose length the first block sets.

        Args:
            num_segments: the number M of segments.
            head_dim: the number D of channels of keys.
            value_dim: the number Dv of channels of values.
            dtype: float32 or wider.
        """
        room = WeightedKV.empty(num_segments, head_dim, value_dim, dtype)
        return cls(TokenSums(room.k, room.value_sum, room.mass), jnp.ones((), jnp.int32))

    def append(self, start: Array, unit: int, tokens: TokenSums, least_length: int) -> "GrowingSegments":
        """Append one block.

        If the block does not fit, neighbours are pooled in pairs and the length doubles. So a bounded number of
        segments covers any prefix, and at least half of them are in use.

        Args:
            start: position of the block's first token.
            unit: number of positions per row of ``tokens``.
            tokens: sums of the block, unit by unit.
            least_length: initial length of a segment, a multiple of ``unit``, for which all segments cover a block.
        """
        num_segments, block_size = self.sums.count.shape[0], unit * tokens.count.shape[0]
        # The first block sets the length, which is unknown in the empty state.
        length = jnp.where(start == 0, least_length, self.length)
        full = start + block_size > num_segments * length
        sums = lax.cond(full, lambda sums: jax.tree.map(_sum_pairs, sums), lambda sums: sums, self.sums)
        # Doubling costs one sum over all segments, and happens log2(S) times.
        length = jnp.where(full, 2 * length, length)
        segment = (start + unit * jnp.arange(tokens.count.shape[0], dtype=jnp.int32)) // length
        block = jax.tree.map(lambda x: jax.ops.segment_sum(x, segment, num_segments, indices_are_sorted=True), tokens)
        return GrowingSegments(jax.tree.map(jnp.add, sums, block), length)

    @classmethod
    def of_sequence(
        cls, num_segments: int, unit: int, block_size: int, tokens: TokenSums, least_length: int
    ) -> Callable[[Array], "GrowingSegments"]:
        """The segments of all prefixes of blocks of a sequence, equal to those of `append`.

        After e positions the length is the smallest ``least_length * 2^i`` for which all segments together cover e
        positions. So the full segments of all prefixes come from one table, with the first segments of each length.
        Only the last segment of a prefix is computed separately.

        Args:
            num_segments: the number M of segments.
            unit: number of positions per row of ``tokens``.
            block_size: positions per block, a multiple of ``unit``.
            tokens: sums of the whole sequence, unit by unit.
            least_length: as in `append`.

        Returns:
            ``at(count) -> GrowingSegments`` after ``count`` blocks.
        """
        num_units, per_block = tokens.count.shape[0], block_size // unit
        # Lengths in units, up to the one that covers the sequence.
        doublings = max(0, -(-num_units * unit // (num_segments * least_length)) - 1).bit_length()
        lengths = [(least_length // unit) << i for i in range(doublings + 1)]

        def firsts(x: Array, length: int) -> Array:
            """Sums of the first M segments of this length."""
            x = x[: num_segments * length]
            x = pad_rows(x, num_segments * length - x.shape[0])
            return jnp.sum(x.reshape(num_segments, length, *x.shape[1:]), axis=1)

        table = jax.tree.map(lambda x: jnp.stack([firsts(x, length) for length in lengths]), tokens)
        by_block = jax.tree.map(lambda x: in_blocks(x, per_block), tokens)
        block_sums = jax.tree.map(lambda x: jnp.sum(x, axis=1), by_block)
        aligned = all(length % per_block == 0 or per_block % length == 0 for length in lengths)
        return jax.tree_util.Partial(
            functools.partial(_segments_after, unit, per_block, tuple(lengths), aligned), table, by_block, block_sums
        )


def _segments_after(
    unit: int,
    per_block: int,
    lengths: tuple[int, ...],
    aligned: bool,
    table: TokenSums,
    by_block: TokenSums,
    block_sums: TokenSums,
    count: Array,
) -> GrowingSegments:
    """The segments after ``count`` blocks; all lengths and positions are counted in units."""
    num_segments, num_blocks = table.count.shape[1], block_sums.count.shape[0]
    count = jnp.minimum(count, num_blocks)
    end = count * per_block
    level = jnp.zeros((), jnp.int32)
    for length in lengths[:-1]:
        level = level + (length * num_segments < end).astype(jnp.int32)
    length = lengths[0] << level
    full = end // length
    # The last segment starts in block `first`: sum all blocks from there, and subtract the units before the segment.
    start = full * length
    first = start // per_block
    block = jnp.arange(num_blocks, dtype=jnp.int32)
    whole = (block >= first) & (block < count)
    number = jnp.arange(num_segments, dtype=jnp.int32)

    def rows(segments: Array, blocks: Array, units: Array) -> Array:
        def along(mask: Array, x: Array) -> Array:
            return mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))

        if aligned:
            last = jnp.sum(jnp.where(along(whole, blocks), blocks, 0), axis=0)
        else:
            after = jnp.where(along(whole & (block > first), blocks), blocks, 0)
            inside = lax.dynamic_index_in_dim(units, jnp.minimum(first, num_blocks - 1), keepdims=False)
            of_segment = (first < count) & (first * per_block + jnp.arange(per_block, dtype=jnp.int32) >= start)
            last = jnp.sum(after, axis=0) + jnp.sum(jnp.where(along(of_segment, inside), inside, 0), axis=0)
        own = lax.dynamic_index_in_dim(segments, level, keepdims=False)
        # Rows of later tokens are selected away, not multiplied by 0, because they may be NaN.
        return jnp.where(along(number < full, own), own, jnp.where(along(number == full, own), last[None], 0))

    return GrowingSegments(jax.tree.map(rows, table, block_sums, by_block), unit * length)


def _sum_pairs(x: Array) -> Array:
    """Sum rows 2c and 2c + 1 into row c, and zero the remaining rows."""
    rows = x.shape[0]
    pairs = jnp.sum(pad_rows(x, rows % 2).reshape(-1, 2, *x.shape[1:]), axis=1)
    return pad_rows(pairs, rows - pairs.shape[0])
