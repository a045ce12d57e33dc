"""Mean-pooled keys and values with log counts: the simplest landmarks that are right where keys are alike."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float

from approx_attention.causal import RunningSummary, causal_state
from approx_attention.checks import check_count, head_inputs
from approx_attention.softmax import pad_rows
from approx_attention.summaries import WeightedKV, attend


def mean_pool(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    num_landmarks: int = 256,
    is_causal: bool = False,
    block_size: int = 128,
    kv_mask: Bool[Array, " S"] | None = None,
    scale: float | Array | None = None,
    return_state: bool = False,
) -> Any:
    r"""Attention over the means of M segments of keys, each weighted by its number of keys.

    With segments :math:`P_c` of consecutive tokens, :math:`\bar k_c, \bar v_c` their means over real tokens,

    .. math:: \mathrm{out}_t = \sum_c |P_c|\, e^{s\, q_t \cdot \bar k_c}\, \bar v_c
              \Big/ \sum_c |P_c|\, e^{s\, q_t \cdot \bar k_c}.

    Exact where the keys of a segment are equal, whatever their values. By Jensen's inequality it never
    overestimates the normaliser.

    Args:
        q: queries ``[T, D]``.
        k: keys ``[S, D]``.
        v: values ``[S, Dv]``.
        key: ignored.
        num_landmarks: the number M of segments, of sizes that differ by at most 1; with M >= S the answer is exact.
        is_causal: query t sees keys j <= t: those of its block and the block before exactly, earlier ones by segments
            of equal length, the least power of two (times ``ceil(block_size / M)``) with which M segments cover them.
        block_size: tokens per block of the causal form.
        kv_mask: true where a key is real, ``[S]``. A query that sees no key gives 0.
        scale: factor s of the logits, ``1/sqrt(D)`` by default.
        return_state: return the `AttentionState`, with log-normalisers, in the accumulation dtype.

    Returns:
        Outputs ``[T, Dv]`` in the dtype of ``v``, or the state.

    Raises:
        ValueError: shapes that do not fit, counts below 1.
        TypeError: dtypes that are not floating point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import exact, mean_pool
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (6, 4)) for i in range(3))
        >>> k = jnp.repeat(k[:3], 2, axis=0)
        >>> bool(jnp.allclose(mean_pool(q, k, v, num_landmarks=3), exact(q, k, v), atol=1e-6))
        True

    Reference:
        The clustered special case of Zheng et al. (2023), "Efficient attention via control variates", section 4.2,
        with the count of each chunk restored.
    """
    dtype, head_dim = v.dtype, q.shape[-1]
    check_count("block_size", block_size)
    q, k, v = head_inputs(q, k, v, scale=scale, kv_mask=kv_mask)
    if is_causal:
        running = running_mean_pool(head_dim, num_landmarks=num_landmarks)
        state = causal_state(q, k, v, running, block_size=block_size, kv_mask=kv_mask)
    else:
        state = attend(q, summarize_mean_pool(k, v, num_landmarks=num_landmarks, kv_mask=kv_mask))
    return state if return_state else state.out.astype(dtype)


def summarize_mean_pool(
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    num_landmarks: int = 256,
    kv_mask: Bool[Array, " S"] | None = None,
) -> WeightedKV:
    """Segment means of keys and sums of values; a segment without a real key has mass 0.

    Args:
        k: keys ``[S, D]`` in scaled space (`fold_scale`).
        v: values ``[S, Dv]``.
        key: ignored.
        num_landmarks: the number M of segments.
        kv_mask: true where a key is real, ``[S]``.

    Returns:
        A `WeightedKV` of min(M, S) tokens.
    """
    num_keys = k.shape[0]
    num_landmarks = min(check_count("num_landmarks", num_landmarks), num_keys)
    tokens = WeightedKV.of_tokens(k, v, kv_mask)
    sums = _SegmentSums(tokens.k, tokens.value_sum, tokens.mass)
    # Segment c holds the tokens j with floor(j M / S) = c.
    bounds = -(-np.arange(num_landmarks + 1) * num_keys // num_landmarks)
    member = bounds[:-1, None] + np.arange(-(-num_keys // num_landmarks))
    inside = member < bounds[1:, None]

    def pool(x: Array) -> Array:
        gathered = x[np.minimum(member, num_keys - 1)]
        return jnp.sum(jnp.where(inside.reshape(inside.shape + (1,) * (x.ndim - 1)), gathered, 0), axis=1)

    return jax.tree.map(pool, sums).landmarks()


def running_mean_pool(head_dim: int, key: Array | None = None, *, num_landmarks: int = 256) -> RunningSummary:
    """Segments of equal length over a growing prefix: neighbours are pooled in pairs whenever M of them no longer fit.

    Args:
        head_dim: ignored.
        key: ignored.
        num_landmarks: the number M of segments.

    Returns:
        The `RunningSummary`.
    """
    check_count("num_landmarks", num_landmarks)

    def init(head_dim: int, value_dim: int, dtype: Any) -> _Segments:
        room = WeightedKV.empty(num_landmarks, head_dim, value_dim, dtype)
        return _Segments(_SegmentSums(room.k, room.value_sum, room.mass), jnp.ones((), jnp.int32))

    def append(segments: _Segments, start: Array, k: Array, v: Array, kv_mask: Array) -> _Segments:
        block_size = k.shape[0]
        # The first block sets the length; from then on M segments hold at least half of what is to come.
        length = jnp.where(start == 0, -(-block_size // num_landmarks), segments.length)
        full = start + block_size > num_landmarks * length
        sums = lax.cond(full, lambda sums: jax.tree.map(_pool_pairs, sums), lambda sums: sums, segments.sums)
        length = jnp.where(full, 2 * length, length)
        segment = (start + jnp.arange(block_size, dtype=jnp.int32)) // length
        tokens = WeightedKV.of_tokens(k, v, kv_mask)
        block = _SegmentSums(tokens.k, tokens.value_sum, tokens.mass)
        block = jax.tree.map(lambda x: jax.ops.segment_sum(x, segment, num_landmarks, indices_are_sorted=True), block)
        return _Segments(jax.tree.map(jnp.add, sums, block), length)

    return RunningSummary(init, append, read=lambda segments: segments.sums.landmarks())


class _SegmentSums(NamedTuple):
    """Sums over the real tokens of each segment."""

    k: Array
    v: Array
    count: Array

    def landmarks(self) -> WeightedKV:
        some = jnp.maximum(self.count, jnp.ones_like(self.count))
        return WeightedKV(self.k / some[:, None], self.v, self.count)


class _Segments(NamedTuple):
    """Segments of ``length`` consecutive positions each, from position 0 on."""

    sums: _SegmentSums
    length: Array


def _pool_pairs(x: Array) -> Array:
    """Sums rows 2c and 2c + 1 into row c, and frees the rows behind."""
    rows = x.shape[0]
    pairs = jnp.sum(pad_rows(x, rows % 2).reshape(-1, 2, *x.shape[1:]), axis=1)
    return pad_rows(pairs, rows - pairs.shape[0])
