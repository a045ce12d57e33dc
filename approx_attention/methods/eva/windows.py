"""Exact attention within windows, merged with attention over the chunks that a window sees."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from approx_attention.core import (
    HIDDEN,
    LEAST_TILE,
    AttentionState,
    block_windows,
    by_platform,
    dense_state,
    joined_state,
    mask_bias,
    merge,
    out_of_blocks,
    pad_rows,
    real_keys,
)
from approx_attention.methods.eva.chunks import Chunks, Tokens, attend_chunks
from approx_attention.methods.eva.layouts import Layout, Sizes


def attend_windows(
    tokens: Tokens, sizes: Sizes, layout: Layout, chunks: Chunks, siblings: Chunks | None, local_bias: Array | None
) -> AttentionState:
    """The states of the queries over their windows exactly, the other windows of a long chunk, and all other chunks."""
    q, k, v, _, kv_mask = tokens
    num_queries, window, (left, right), dtype = q.shape[0], layout.window, sizes.sides, q.dtype
    reach = left + window + right
    if local_bias is not None and local_bias.shape != (window, reach):
        raise ValueError(f"local_bias must be [window, window + overlaps] = {[window, reach]}, got {local_bias.shape}")
    num_windows = -(-num_queries // window)
    # Windows are grouped to fill a tile of logits, with at least 1024 rows, so that matrix products stay large.
    rows = max(1024, LEAST_TILE // (reach + len(layout.chunks.segments.member)))
    blocks = -(-num_windows // max(1, rows // window))
    together = -(-num_windows // blocks)
    rows = together * window

    own_bias = jnp.zeros((1, reach), dtype) if local_bias is None else local_bias.astype(dtype)
    if sizes.is_causal:
        own_bias = jnp.where(np.tri(window, reach, left, dtype=bool), own_bias, HIDDEN)

    def apart(numbers: Array, q: Array, k: Array, v: Array, key_bias: Array) -> AttentionState:
        key_bias = key_bias[:, None, :]
        bias = jnp.where(key_bias <= HIDDEN / 2, HIDDEN, key_bias + own_bias[None])
        q_windows = q.reshape(together, window, -1)
        near = jax.vmap(dense_state)(q_windows, k, v, bias)
        if siblings is not None:
            near = merge(near, jax.vmap(dense_state)(q_windows, *_siblings(numbers, layout, siblings)))
        hidden = _hidden_chunks(numbers, sizes, layout)
        log_mass = jnp.broadcast_to(chunks.log_mass[None, :], (1, len(chunks.log_mass)))
        log_mass = log_mass if hidden is None else jnp.where(hidden, HIDDEN, log_mass)
        return attend_chunks(q, out_of_blocks(near), chunks, log_mass)

    def as_one(numbers: Array, q: Array, k: Array, v: Array, key_bias: Array) -> AttentionState:
        log_mass = jnp.broadcast_to(chunks.log_mass[None, :], (together, len(chunks.log_mass)))
        hidden = _hidden_chunks(numbers, sizes, layout)
        if hidden is not None:
            log_mass = jnp.where(hidden[::window], HIDDEN, log_mass)
        last = left if sizes.is_causal else None

        def of_window(q: Array, log_mass: Array, near: tuple[Array, Array, Array]) -> AttentionState:
            return joined_state(q, (chunks.k, chunks.beta, log_mass), near, last=last)

        return out_of_blocks(jax.vmap(of_window)(q.reshape(together, window, -1), log_mass, (k, v, key_bias)))

    # If all queries of a window see the same chunks with one coefficient each, and there is no local bias.
    is_one_set = siblings is None and local_bias is None and chunks.moments is None
    is_one_set &= sizes.exclude_local or not sizes.is_causal

    def block(args: Any) -> AttentionState:
        first, q, near = args
        operands = first + jnp.arange(together, dtype=jnp.int32), q, *near
        return by_platform(*operands, cpu=apart, default=as_one) if is_one_set else apart(*operands)

    key_bias = mask_bias(real_keys(kv_mask, k.shape[0]), dtype)
    near = tuple(
        block_windows(x, window, blocks * together, left, right, fill).reshape(blocks, together, reach, *x.shape[1:])
        for x, fill in ((k, 0.0), (v, 0.0), (key_bias, HIDDEN))
    )
    q = pad_rows(q, blocks * rows - num_queries).reshape(blocks, rows, -1)
    numbers = together * jnp.arange(blocks, dtype=jnp.int32)
    return out_of_blocks(lax.map(jax.checkpoint(block), (numbers, q, near)), num_queries)


def _siblings(numbers: Array, layout: Layout, siblings: Chunks) -> tuple[Array, Array, Array]:
    """Keys, values and log-masses of the other windows in each window's chunk, which itself is hidden."""
    per_chunk = jnp.maximum(layout.chunk // layout.window, 1)
    at = jnp.arange(layout.chunks.segments.member.shape[1] // layout.window, dtype=jnp.int32)[None, :]
    others = (numbers // per_chunk * per_chunk)[:, None] + at
    is_other = (at < per_chunk) & (others < siblings.k.shape[0]) & (others != numbers[:, None])
    others = jnp.minimum(others, siblings.k.shape[0] - 1)
    log_mass = jnp.where(is_other, siblings.log_mass[others], HIDDEN)[:, None, :]
    return siblings.k[others], siblings.beta[others], log_mass


def _hidden_chunks(numbers: Array, sizes: Sizes, layout: Layout) -> Array | None:
    """A mask of the chunks hidden from the queries of these windows, ``[queries, C]``; None if none is."""
    position = np.arange(len(layout.chunks.segments.member), dtype=np.int32)[None, :] * layout.chunk
    start, (left, right) = (numbers * layout.window)[:, None], sizes.sides
    if sizes.exclude_local:  # chunks with a token of the window
        hidden = (position + layout.chunk > start - left) & (position < start + layout.window + right)
        rows = len(numbers) * layout.window
        return jnp.repeat(hidden, layout.window, axis=0, total_repeat_length=rows)
    if sizes.is_causal:  # also the query's own chunk, whose means contain later tokens
        place = (start + jnp.arange(layout.window, dtype=jnp.int32)[None, :]).reshape(-1, 1)
        return place // layout.chunk <= position // layout.chunk
    return None
