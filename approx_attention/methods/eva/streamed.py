r"""EVA over a growing prefix: proposals come from keys alone, :math:`\mu_P = \bar k_P`, so that chunks never change."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from approx_attention.core import (
    AttentionState,
    GrowingSegments,
    RunningSummary,
    TokenSums,
    WeightedKV,
    causal_state,
    check_count,
    check_counts,
    check_float_tuple,
    check_key,
    logit_scale,
    mask_bias,
    mean,
    noise_deviation,
    out_of_blocks,
)
from approx_attention.methods.eva.chunks import PoolingVectors, coefficients, pooled_keys
from approx_attention.methods.eva.layouts import DEFAULT_CHUNK, largest_divisor


def streamed_eva(
    q: Array,
    k: Array,
    v: Array,
    key: Array | None,
    *,
    window_size: int,
    chunk_size: int | None,
    num_chunks: int | None,
    kv_mask: Array | None,
    scale: float | Array | None = None,
    **options: Any,
) -> AttentionState:
    """Causal EVA of a whole sequence, equal to decoding with `running_eva`.

    Args:
        q: queries ``[T, D]``.
        k: keys ``[S, D]``.
        v: values ``[S, Dv]``.
        key: typed PRNG key of the noise; None for no noise.
        window_size: tokens per window.
        chunk_size: tokens per chunk, a divisor of the window.
        num_chunks: the largest number of chunks, by default that of the sequence.
        kv_mask: true where a key is real ``[S]``.
        scale: factor of the logits, ``1/sqrt(D)`` by default.
        **options: further arguments of `running_eva`.

    Returns:
        The `AttentionState` of the queries.

    Raises:
        ValueError: shapes that do not match, a chunk size that does not divide the window.
        TypeError: tensors that are not floating point.
    """
    chunk_size = chunk_size or largest_divisor(window_size, DEFAULT_CHUNK)
    if window_size % chunk_size:
        raise ValueError(f"chunk_size must divide window_size = {window_size}, got {chunk_size}")
    if num_chunks is None:
        num_chunks = -(-max(q.shape[0], window_size) // chunk_size)
    # Fewer queries than a block see no chunk, and the only block is shorter than a window.
    chunk_size = chunk_size if q.shape[0] >= window_size else 1
    running = running_eva(q.shape[-1], key, num_chunks=num_chunks, chunk_size=chunk_size, **options)
    scale = logit_scale(scale, q.shape[-1])
    return causal_state(q, k, v, running, block_size=window_size, kv_mask=kv_mask, scale=scale)


def running_eva(
    head_dim: int,
    key: Array | None = None,
    *,
    num_chunks: int = 256,
    chunk_size: int | None = None,
    pooling_vectors: PoolingVectors | None = None,
    count_correction: bool = True,
    noise_scale: Literal["exact", "official"] = "exact",
) -> RunningSummary:
    """The chunks of a growing prefix; neighbours are averaged in pairs so that at most ``num_chunks`` remain.

    Shared arguments: see `approx_attention.methods`.

    Args:
        key: typed PRNG key of the noise; None for no noise.
        num_chunks: the largest number of chunks.
        chunk_size: tokens per chunk, a divisor of the block; by default the largest one up to 16.
        pooling_vectors: as in `eva`.
        count_correction: as in `eva`.
        noise_scale: as in `eva`.

    Returns:
        The `RunningSummary`, for a `Decoder`.

    Raises:
        ValueError: counts below 1, an unknown noise scale; for the first block, a chunk size that does not divide it.
        TypeError: pooling vectors that are not a tuple of floating-point arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention.methods import running_eva
        >>> running = running_eva(1, num_chunks=2, chunk_size=2)
        >>> k, prefix = jnp.arange(4.0)[:, None], running.init(1, jnp.float32)
        >>> prefix = running.append(prefix, jnp.int32(0), k, k, jnp.ones(4, bool))
        >>> chunks = running.read(prefix)
        >>> chunks.k[:, 0].tolist(), chunks.mass.tolist()
        ([0.5, 2.5], [2.0, 2.0])

    Reference:
        :cite:p:`zheng2023efficient`, section 4; averaging neighbouring chunks is this library's.
    """
    head_dim, num_chunks = check_counts(head_dim=head_dim, num_chunks=num_chunks)
    chunk_size = None if chunk_size is None else check_count("chunk_size", chunk_size)
    check_float_tuple("pooling_vectors", pooling_vectors)
    deviation = noise_deviation(noise_scale, head_dim)

    def directions(k: Array, log_count: Array, first: Array | int) -> Array:
        """One direction for each of the chunks ``k [C, j, D]``, the first of which is number ``first``."""
        if pooling_vectors is None:
            mu = pooled_keys(k, log_count, None)
        else:
            mu = jnp.broadcast_to(pooling_vectors[1].astype(k.dtype)[None], (k.shape[0], head_dim))
        if key is None:
            return mu
        # Indexed by the chunk's number in the sequence: the noise does not depend on the number of blocks of a call.
        numbers = first + jnp.arange(k.shape[0], dtype=jnp.int32)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(check_key("eva", key), numbers)
        return mu + deviation * jax.vmap(lambda key: jax.random.normal(key, (head_dim,), mu.dtype))(keys)

    def init(value_dim: int, dtype: Any) -> GrowingSegments:
        return GrowingSegments.empty(num_chunks, head_dim, value_dim, dtype)

    def chunk_of(block_size: int) -> int:
        chunk = chunk_size or largest_divisor(block_size, DEFAULT_CHUNK)
        if block_size % chunk:
            raise ValueError(f"chunk_size must divide the block of {block_size} tokens, got {chunk}")
        return chunk

    def chunks(k: Array, v: Array, kv_mask: Array, chunk: int, first: Array | int) -> TokenSums:
        """The synthetic tokens of the chunks of ``k [b, D]``, the first of which is number ``first``."""
        tokens = TokenSums.of_tokens(k, v, kv_mask)
        k, v, count = jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), tuple(tokens))
        log_count = mask_bias(count > 0, count.dtype)
        beta = coefficients(k, v, log_count, directions(k, log_count, first))
        total = jnp.sum(count, axis=1)
        # Mass-weighted sums of synthetic tokens, so that pairs are averaged by adding.
        return TokenSums(total[:, None] * pooled_keys(k, log_count, pooling_vectors), total[:, None] * beta, total)

    def least_length(block_size: int, chunk: int) -> int:
        return chunk * -(-(block_size // chunk) // num_chunks)

    def append(growing: GrowingSegments, start: Array, k: Array, v: Array, kv_mask: Array) -> GrowingSegments:
        block_size = k.shape[0]
        chunk = chunk_of(block_size)
        return growing.append(
            start, chunk, chunks(k, v, kv_mask, chunk, start // chunk), least_length(block_size, chunk)
        )

    def of_sequence(k: Array, v: Array, kv_mask: Array) -> Callable[[Array], GrowingSegments]:
        block_size = k.shape[1]
        chunk = chunk_of(block_size)
        k, v, kv_mask = out_of_blocks((k, v, kv_mask))
        tokens = chunks(k, v, kv_mask, chunk, 0)
        return GrowingSegments.of_sequence(num_chunks, chunk, block_size, tokens, least_length(block_size, chunk))

    def read(growing: GrowingSegments) -> WeightedKV:
        landmarks = growing.sums.landmarks()
        if count_correction:
            return landmarks
        once = (landmarks.mass > 0).astype(landmarks.mass.dtype)
        return WeightedKV(landmarks.k, mean(landmarks.value_sum, landmarks.mass), once)

    return RunningSummary(init, append, read, of_sequence=of_sequence)
