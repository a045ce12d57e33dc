"""Exact attention on a sparse support plus a summary of the other keys: Scatterbrain with any summary.

If the support consists of blocks, the summary of the rest is merged from the summaries of other blocks: nothing is
subtracted, and weights are positive if those of the summary are. If each query has different keys, the summary's
estimates of these keys must be subtracted (`support_and_moments_state`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from approx_attention.core import (
    HIDDEN,
    LEAST_TILE,
    AttentionState,
    FeatureMoments,
    RunningSummary,
    Summary,
    WeightedKV,
    attend,
    causal_state_by_place,
    dense_state,
    finite_peak,
    in_blocks,
    merge,
    out_of_blocks,
    pad_rows,
    real_keys,
    running_moments,
    subtract,
)
from approx_attention.sparse.blocks import BlockMap, block_sparse_state
from approx_attention.sparse.gathered import gathered_state, rows_gathered

# Blocks are batched up to this number of rows: large enough for matrix products, small enough for the cache.
ROWS = 1024

# Summary of one block, ``(k [b, D], v [b, Dv], kv_mask [b], number) -> summary``; moments share their features.
SummarizeBlock = Callable[[Array, Array, Array, Array], Summary]


def blocks_and_rest_state(
    q: Array,
    k: Array,
    v: Array,
    blocks: BlockMap,
    summarize: SummarizeBlock,
    *,
    is_causal: bool = False,
    kv_mask: Array | None = None,
) -> AttentionState:
    """Exact attention over the visited blocks of a map, merged with a summary of the other blocks.

    Args:
        q: queries ``[T, D]`` in scaled space.
        k: keys ``[S, D]``, without NaN in padding.
        v: values ``[S, Dv]``.
        blocks: the map; every key of a visited block is in the support.
        summarize: makes the summary of a block.
        is_causal: query t sees keys j <= t, and summaries of earlier blocks; its own block must be visited.
        kv_mask: true where a key is real ``[S]``.

    Returns:
        The `AttentionState` of the queries.
    """
    block, num_queries = blocks.block_size, q.shape[0]
    rows, columns = np.indices(blocks.kinds.shape)
    # Causally only earlier blocks are summarised; part of the query's own block cannot be.
    far = ~blocks.visited & ((columns < rows) | (not is_causal))
    support = BlockMap.from_blocks(blocks.visited, block_size=block, num_queries=num_queries, num_keys=blocks.num_keys)
    near = block_sparse_state(q, k, v, support.causal() if is_causal else support, kv_mask=kv_mask)
    if not far.any():
        return near
    tokens = tuple(in_blocks(x, block) for x in (k, v, real_keys(kv_mask, k.shape[0])))
    numbers = jnp.arange(far.shape[1], dtype=jnp.int32)
    one: Any = summarize(tokens[0][0], tokens[1][0], tokens[2][0], numbers[0])
    of_moments = isinstance(one, FeatureMoments)

    # All blocks have the same features: only the sums are stacked.
    @jax.checkpoint
    def bare(args: Any) -> Any:
        summary: Any = summarize(*args)
        return dataclasses.replace(summary, features=None) if of_moments else summary

    # Batched, because a single block does not use the machine well.
    together = max(1, ROWS // block)
    summaries = lax.map(bare, (*tokens, numbers), batch_size=together)
    q_blocks = in_blocks(q, block)
    if of_moments:
        rest = _moments_of(summaries, far)

        @jax.checkpoint
        def from_moments(args: tuple[Array, Any]) -> AttentionState:
            q, moments = args
            return attend(q, dataclasses.replace(moments, features=one.features))

        answer = lax.map(from_moments, (q_blocks, rest), batch_size=together)
    else:
        per_block = summaries.mass.shape[1]

        @jax.checkpoint
        def from_tokens(args: tuple[Array, Array]) -> AttentionState:
            q, far = args
            return attend(q, _tokens_of(summaries, far))

        # Every block of queries reads the tokens of all blocks, with mass for far blocks only: tiles bound the batch.
        together = max(1, min(together, LEAST_TILE // (block * per_block * far.shape[1])))
        answer = lax.map(from_tokens, (q_blocks, jnp.asarray(far)), batch_size=together)
    return merge(near, out_of_blocks(answer, num_queries))


def _tokens_of(summaries: WeightedKV, far: Array) -> WeightedKV:
    """The tokens of all blocks, with mass 0 for those that are not ``far``, at static shapes."""
    mass = jnp.where(far[:, None], summaries.mass, 0)
    value_sum = jnp.where(far[:, None, None], summaries.value_sum, 0)
    value_range = summaries.value_range
    if value_range is not None:
        low = jnp.min(value_range[:, 0], axis=0, initial=jnp.inf, where=far[:, None])
        value_range = jnp.stack([low, jnp.max(value_range[:, 1], axis=0, initial=-jnp.inf, where=far[:, None])])
    k, value_sum, mass = out_of_blocks((summaries.k, value_sum, mass))
    return WeightedKV(k, value_sum, mass, value_range)


def _moments_of(moments: Any, far: np.ndarray) -> Any:
    """The merged moments of the blocks ``far [Tb, Sb]`` of each block of queries.

    With a window the far blocks are one run before it and one after, whose merged moments come from two scans; other
    maps need a sum over all blocks for each block of queries.
    """
    first = np.where(far.all(axis=1), far.shape[1], np.argmin(far, axis=1))
    last = np.where(far.all(axis=1), 0, far.shape[1] - np.argmin(far[:, ::-1], axis=1))
    place = np.arange(far.shape[1])
    is_run = ((place < first[:, None]) | (place >= last[:, None])) == far
    return _around_runs(moments, first, last) if is_run.all() else _masked_sums(moments, far)


def _around_runs(moments: Any, first: np.ndarray, last: np.ndarray) -> Any:
    """Moments of the blocks before ``first [Tb]`` and from ``last [Tb]`` on, by one scan from each end."""
    before, after = _running(moments), _running(moments, reverse=True)
    # If all blocks are far, the first run contains all of them and the second is empty, so that none counts twice.
    last = np.where(first == moments.mass.shape[0], moments.mass.shape[0], last)
    return jax.vmap(merge)(*(jax.tree.map(lambda x, at=at: x[at], y) for y, at in ((before, first), (after, last))))


def _running(moments: Any, *, reverse: bool = False) -> Any:
    """Moments of the blocks before each index 0..n; with ``reverse``, of the blocks from it on."""
    none = jax.tree.map(lambda x: jnp.zeros_like(x[0]), moments)
    # The identity of `merge`.
    none = dataclasses.replace(none, log_scale=jnp.full_like(none.log_scale, -jnp.inf))

    def step(past: Any, block: Any) -> tuple[Any, Any]:
        both = merge(past, block)
        return both, both

    totals = lax.scan(step, none, moments, reverse=reverse)[1]
    parts = (totals, jax.tree.map(lambda x: x[None], none))
    return jax.tree.map(lambda *x: jnp.concatenate(x), *(parts if reverse else parts[::-1]))


def _masked_sums(moments: Any, far: np.ndarray) -> Any:
    """Moments of any blocks, at a cost of Tb Sb R Dv, each with its own log-scale, so that none underflows."""

    @jax.checkpoint
    def of_row(far: Array) -> Any:
        log_scale = jnp.where(far[:, None], moments.log_scale, -jnp.inf)
        peak = jnp.max(log_scale, axis=0)
        weights = jnp.exp(log_scale - finite_peak(peak)[None, :])
        # Weights of 0 would pass on the NaN of other blocks.
        sums, mass = jnp.where(far[:, None, None], moments.value_sum, 0), jnp.where(far[:, None], moments.mass, 0)
        value_sum = jnp.einsum("br,brd->rd", weights, sums)
        return FeatureMoments(value_sum, jnp.sum(weights * mass, axis=0), peak, moments.features)

    return lax.map(of_row, jnp.asarray(far))


def support_and_moments_state(
    q: Array,
    k: Array,
    v: Array,
    places: Array,
    seen: Array,
    summarize: Callable[[Array, Array, Array], FeatureMoments],
    *,
    block_size: int,
    is_causal: bool = False,
    kv_mask: Array | None = None,
) -> AttentionState:
    r"""Exact attention over a support of each query, plus moments of all keys minus their estimates on the support.

    .. math:: A_{tj} = \phi(q_t) \cdot \phi(k_j) + \big(e^{q_t \cdot k_j} - \phi(q_t) \cdot \phi(k_j)\big)\,[j \in S_t].

    In the causal form the keys of the query's block and of the block before are always exact, without a subtraction.

    The rest is computed by subtraction: its relative error is the rounding error over the remaining share of the sum.
    If only rounding error remains, the rest is empty. So the method is useful only if the features give most of the
    weight to keys outside the support.

    Args:
        q: queries ``[T, D]`` in scaled space.
        k: keys ``[S, D]``, without NaN in padding.
        v: values ``[S, Dv]``.
        places: indices of keys, int32 ``[T, K]``.
        seen: mask of valid entries ``[T, K]``; no key twice.
        summarize: ``(k, v, kv_mask) -> moments`` of any tokens, additive over tokens.
        block_size: tokens per block of the causal form.
        is_causal: query t sees keys j <= t.
        kv_mask: true where a key is real ``[S]``.

    Returns:
        The `AttentionState` of the queries.
    """
    kv_mask = real_keys(kv_mask, k.shape[0])
    if is_causal:
        block_size = min(block_size, q.shape[0])
        first = summarize(k[:1], v[:1], kv_mask[:1])
        running = _running_sums(summarize, first.features)._replace(near=_nothing)
        whole = causal_state_by_place(q, k, v, running, block_size=block_size, kv_mask=kv_mask)
        block = jnp.arange(q.shape[0], dtype=jnp.int32)[:, None] // block_size
        seen = seen & (places < (block - 1) * block_size)
    else:
        whole = attend(q, summarize(k, v, kv_mask))
    seen = seen & kv_mask[places]
    near = gathered_state(q, k, v, places, seen)
    if is_causal:
        sizes = {"block_size": block_size, "num_queries": q.shape[0], "num_keys": k.shape[0]}
        near = merge(near, block_sparse_state(q, k, v, BlockMap.banded(1, 0, **sizes).causal(), kv_mask=kv_mask))
    # States are logarithms without a sign: negative estimates are added to the whole, and positive ones subtracted.
    positive, negative = _estimates_of_own(q, k, v, places, seen, summarize)
    rest = subtract(merge(whole, negative), positive)
    # Rows without moments, such as those of the first blocks, have no rest; estimates on the support must not add one.
    answered = whole.lse > -jnp.inf
    rest = AttentionState(jnp.where(answered[:, None], rest.out, 0), jnp.where(answered, rest.lse, -jnp.inf))
    return merge(near, rest)


def _running_sums(summarize: Callable[[Array, Array, Array], FeatureMoments], features: Any) -> RunningSummary:
    """Moments of a growing prefix, summed block by block with the feature map of the first block."""
    running = running_moments(features)

    def append(moments: Any, _: Array, k: Array, v: Array, kv_mask: Array) -> Any:
        block = dataclasses.replace(summarize(k, v, kv_mask), features=features)
        return dataclasses.replace(merge(running.read(moments), block), features=None)

    return running._replace(append=append)


def _nothing(q: Array, k: Array, v: Array, bias: Array) -> AttentionState:
    """The empty state in place of nearby attention, which `support_and_moments_state` adds separately."""
    return AttentionState.empty(q.shape[0], v.shape[1], q.dtype)


def _estimates_of_own(
    q: Array,
    k: Array,
    v: Array,
    places: Array,
    seen: Array,
    summarize: Callable[[Array, Array, Array], FeatureMoments],
) -> tuple[AttentionState, AttentionState]:
    """The states of positive and of negative estimates of the moments on the support of each query."""
    one: Any = summarize(k[:1], v[:1], jnp.ones(1, bool))

    @jax.vmap
    def moments_of(k: Array) -> tuple[Array, Array]:
        # By `summarize` instead of the feature map, which may weight features differently for queries.
        moments = summarize(k[None], jnp.zeros((1, 1), k.dtype), jnp.ones(1, bool))
        return moments.mass, moments.log_scale

    mass, log_scale_k = moments_of(k)
    peak_k = finite_peak(jnp.max(log_scale_k, axis=1))
    phi_k = pad_rows(mass * jnp.exp(log_scale_k - peak_k[:, None]), 1)
    v, peak_k = pad_rows(v, 1), jnp.pad(peak_k, (0, 1))
    nowhere, num_queries = k.shape[0], q.shape[0]
    rows = rows_gathered(num_queries, places.shape[1])

    @jax.checkpoint
    def of_rows(args: tuple[Array, Array]) -> AttentionState:
        q, places = args
        values, log_scale = one.features(q)
        # Features of queries and of keys are relative to the maximum of their row; maxima are added as logarithms.
        peak = finite_peak(jnp.max(log_scale, axis=1))
        phi = values * jnp.exp(log_scale - peak[:, None])
        phi = jnp.broadcast_to(phi, (q.shape[0], phi_k.shape[1]))
        kernel = jnp.einsum("tr,tkr->tk", phi, phi_k[places])
        kernel = jnp.stack([kernel, -kernel], axis=1)
        present = (places < nowhere)[:, None, :] & (kernel > 0)
        log_kernel = jnp.log(jnp.where(present, kernel, 1)) + (peak[:, None] + peak_k[places])[:, None, :]
        bias = jnp.where(present, log_kernel, HIDDEN)
        # The logarithms of the estimates are biases of keys without channels: a softmax over biases only.
        signs, keys = jnp.zeros((2, 1), q.dtype), jnp.zeros((places.shape[1], 1), q.dtype)
        return jax.vmap(lambda v, bias: dense_state(signs, keys, v, bias))(v[places], bias)

    state = lax.map(of_rows, (in_blocks(q, rows), in_blocks(jnp.where(seen, places, nowhere), rows)))
    state = out_of_blocks(state, num_queries)
    positive, negative = (jax.tree.map(lambda x, sign=sign: x[:, sign], state) for sign in range(2))
    return positive, negative
