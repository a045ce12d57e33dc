"""Mean pooling with log counts: the simplest landmarks, exact where the keys of a segment are equal."""

import functools
from collections.abc import Callable
from typing import Any

from jax import Array
from jaxtyping import Bool, Float

from approx_attention.core import (
    AttentionState,
    GrowingSegments,
    RunningSummary,
    TokenSums,
    WeightedKV,
    check_count,
    check_counts,
    check_tokens,
    out_of_blocks,
    output_or_state,
    segments_of,
    state_by_summary,
)


@output_or_state
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
) -> AttentionState:
    r"""Attention over the means of M segments of keys, each weighted by its number of keys.

    With segments :math:`P_c` of consecutive real tokens and their means :math:`\bar k_c, \bar v_c`,

    .. math:: \mathrm{out}_t = \sum_c |P_c|\, e^{s\, q_t \cdot \bar k_c}\, \bar v_c
              \Big/ \sum_c |P_c|\, e^{s\, q_t \cdot \bar k_c}.

    The output is exact if the keys of each segment are equal, for any values. By Jensen's inequality the normaliser is
    never overestimated.

    Shared arguments: see `approx_attention.methods`.

    Args:
        num_landmarks: the number M of segments, whose sizes differ by at most 1; with one segment per real key the
            output is exact. In the causal form the segments of earlier blocks have equal length: the smallest power of
            two (times ``ceil(block_size / M)``) for which M segments cover them.

    Raises:
        ValueError: shapes that do not match, counts below 1.
        TypeError: dtypes that are not floating point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import exact, mean_pool
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (6, 4)) for i in range(3))
        >>> k = jnp.repeat(k[:3], 2, axis=0)
        >>> bool(jnp.allclose(mean_pool(q, k, v, num_landmarks=3), exact(q, k, v), atol=1e-6))
        True

    Reference:
        The clustered special case of :cite:p:`zheng2023efficient`, section 4.2, with the count of each chunk.
    """
    return state_by_summary(
        q,
        k,
        v,
        functools.partial(summarize_mean_pool, num_landmarks=num_landmarks),
        functools.partial(running_mean_pool, num_landmarks=num_landmarks),
        is_causal=is_causal,
        block_size=block_size,
        kv_mask=kv_mask,
        scale=scale,
    )


def summarize_mean_pool(
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    num_landmarks: int = 256,
    kv_mask: Bool[Array, " S"] | None = None,
) -> WeightedKV:
    """Summarise the real keys by segment means of keys and sums of values.

    Arguments are those of `mean_pool`, with keys in scaled space (`approx_attention.methods`).

    Returns:
        A `WeightedKV` of min(M, S) tokens; if fewer than M keys are real, the other tokens have mass 0.

    Raises:
        ValueError: shapes that do not match, a count below 1.
        TypeError: dtypes that are not floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention import summarize_mean_pool
        >>> k = jnp.array([[1.0], [3.0], [5.0], [7.0]])
        >>> summary = summarize_mean_pool(k, k, num_landmarks=2)
        >>> summary.k[:, 0].tolist(), summary.mass.tolist()
        ([2.0, 6.0], [2.0, 2.0])
    """
    check_tokens(k, v, kv_mask)
    num_keys = k.shape[0]
    num_landmarks = min(check_count("num_landmarks", num_landmarks), num_keys)
    # Segments are cut over the real tokens, and sums (not means) are pooled: padding has no effect on either.
    return TokenSums.of_tokens(k, v, kv_mask).pooled(segments_of(num_keys, num_landmarks, kv_mask)).landmarks()


def running_mean_pool(head_dim: int, key: Array | None = None, *, num_landmarks: int = 256) -> RunningSummary:
    """Segments of equal length over a growing prefix; neighbours are pooled in pairs when M segments are full.

    Arguments are those of `mean_pool`, for keys in scaled space (`approx_attention.methods`), and ``head_dim``, the
    number D of channels.

    Returns:
        The `RunningSummary`, for a `Decoder`.

    Raises:
        ValueError: counts below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention.methods import running_mean_pool
        >>> running = running_mean_pool(1, num_landmarks=2)
        >>> k, prefix = jnp.arange(8.0)[:, None], running.init(1, jnp.float32)
        >>> for start in (0, 4):
        ...     block = k[start : start + 4]
        ...     prefix = running.append(prefix, jnp.int32(start), block, block, jnp.ones(4, bool))
        >>> running.read(prefix).k[:, 0].tolist()
        [1.5, 5.5]
    """
    head_dim, num_landmarks = check_counts(head_dim=head_dim, num_landmarks=num_landmarks)

    def init(value_dim: int, dtype: Any) -> GrowingSegments:
        return GrowingSegments.empty(num_landmarks, head_dim, value_dim, dtype)

    def append(growing: GrowingSegments, start: Array, k: Array, v: Array, kv_mask: Array) -> GrowingSegments:
        # The initial length is the shortest with which M segments cover one block; later it doubles.
        least_length = -(-k.shape[0] // num_landmarks)
        return growing.append(start, 1, TokenSums.of_tokens(k, v, kv_mask), least_length)

    def of_sequence(k: Array, v: Array, kv_mask: Array) -> Callable[[Array], GrowingSegments]:
        block_size = k.shape[1]
        tokens = TokenSums.of_tokens(*out_of_blocks((k, v, kv_mask)))
        return GrowingSegments.of_sequence(num_landmarks, 1, block_size, tokens, -(-block_size // num_landmarks))

    return RunningSummary(init, append, read=lambda growing: growing.sums.landmarks(), of_sequence=of_sequence)
