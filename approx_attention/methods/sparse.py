"""Sparse attention: exact on the keys of a pattern, alone or with a summary of the others."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from approx_attention.core import (
    AttentionState,
    FeatureMoments,
    Summary,
    WeightedKV,
    check_count,
    checked_soft_cap,
    head_inputs,
    output_or_state,
    require_scaled_space,
)
from approx_attention.sparse import (
    BlockMap,
    SparsePattern,
    block_sparse_state,
    blocks_and_rest_state,
    gathered_state,
    is_traced,
    pairs_of_blocks,
    support_and_moments_state,
)

# The cost of a gathered key relative to a key of a visited block, which is used in matrix products.
GATHER_COST = 24
# Blocks of 64 fit scattered patterns more closely, blocks of 128 make larger matrix products.
BLOCK_SIZES = (64, 128)


@output_or_state
def sparse_attention(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    pattern: SparsePattern | BlockMap,
    is_causal: bool = False,
    logits_soft_cap: float | None = None,
    kv_mask: Bool[Array, " S"] | None = None,
    scale: float | Array | None = None,
) -> AttentionState:
    r"""Softmax attention over the support of a sparse pattern.

    .. math:: \mathrm{out}_t = \sum_{j \in S_t} e^{s\, q_t \cdot k_j}\, v_j \Big/ \sum_{j \in S_t} e^{s\, q_t \cdot k_j}

    Only the support S of the pattern is used; its weights are for `approx_attention.realization`. There are two forms:

    - By blocks: a pair of blocks with an entry is computed by matrix products, with entries outside the support hidden.
      The cost is proportional to the visited area.
    - Gathered: every query gathers its K keys, at a cost of T K (D + Dv), with a far higher cost per key.

    A `BlockMap`, which is static, runs by blocks. A pattern with concrete arrays uses the cheaper form: gathered, if
    24 K is less than the number of keys per query in blocks of 64 or 128. A traced pattern is gathered, because its
    blocks are unknown; so is a pattern passed to `attention` as ``method=sparse_attention, pattern=...``.

    Shared arguments: see `approx_attention.methods`.

    Args:
        pattern: the visible keys of each query, for T queries and S keys. It refers to positions, including padding.

    Raises:
        ValueError: shapes that do not match.
        TypeError: dtypes that are not floating point, a pattern that is neither of the two kinds.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import SparsePattern, local, sparse_attention
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (32, 4)) for i in range(3))
        >>> out = sparse_attention(q, k, v, pattern=SparsePattern.banded(32, range(-3, 4)))
        >>> bool(jnp.allclose(out, local(q, k, v, window_size=4), atol=1e-6))
        True

    Reference:
        :cite:p:`child2019sparse`; blocks: :cite:p:`zaheer2020bigbird`, appendix D.
    """
    q, k, v = head_inputs(q, k, v, scale=scale, kv_mask=kv_mask, is_causal=is_causal)
    _check_pattern(pattern, q.shape[0], k.shape[0])
    cap = checked_soft_cap(logits_soft_cap)
    chosen = pattern if isinstance(pattern, BlockMap) else _cheaper(pattern, is_causal)
    if isinstance(chosen, BlockMap):
        chosen = chosen.causal() if is_causal else chosen
        return block_sparse_state(q, k, v, chosen, kv_mask=kv_mask, logits_soft_cap=cap)
    return _over_gathered(q, k, v, chosen, is_causal, kv_mask, cap)


def _check_pattern(pattern: Any, num_queries: int, num_keys: int) -> None:
    if not isinstance(pattern, SparsePattern | BlockMap):
        raise TypeError(f"pattern must be a SparsePattern or a BlockMap, got {type(pattern).__name__}")
    given = pattern.num_queries, pattern.num_keys
    if given != (num_queries, num_keys):
        raise ValueError(f"pattern must be of [T, S] = {[num_queries, num_keys]}, got {list(given)}")


def _cheaper(pattern: SparsePattern, is_causal: bool) -> SparsePattern | BlockMap:
    """The pattern as it is, to be gathered, or its blocks, whichever costs less."""
    if is_traced(pattern):
        return pattern
    if is_causal:
        indices, valid = np.asarray(pattern.indices), np.asarray(pattern.valid)
        # Keys ascend, so those that are seen come first: the others need not be gathered.
        valid = valid & (indices <= np.arange(pattern.num_queries)[:, None])
        width = max(1, int(valid.sum(axis=1).max()))
        # Weights may be traced, as where a gradient is taken of all floats.
        log_weights = jnp.where(valid, pattern.log_weights, -jnp.inf)[:, :width]
        indices, valid = indices[:, :width], valid[:, :width]
        pattern = dataclasses.replace(pattern, indices=indices, log_weights=log_weights, valid=valid)
    visited = {size: size**2 * np.count_nonzero(np.bincount(pairs_of_blocks(pattern, size))) for size in BLOCK_SIZES}
    block_size = min(visited, key=lambda size: visited[size])
    if GATHER_COST * pattern.keys_per_row * pattern.num_queries < visited[block_size]:
        return pattern
    return BlockMap.from_pattern(pattern, block_size)


def _over_gathered(
    q: Array,
    k: Array,
    v: Array,
    pattern: SparsePattern,
    is_causal: bool,
    kv_mask: Array | None,
    logits_soft_cap: float | None,
) -> AttentionState:
    seen = pattern.valid
    if is_causal:
        seen = seen & (pattern.indices <= jnp.arange(q.shape[0], dtype=jnp.int32)[:, None])
    if kv_mask is not None:
        seen = seen & kv_mask[pattern.indices]
    return gathered_state(q, k, v, pattern.indices, seen, logits_soft_cap=logits_soft_cap)


@output_or_state
def sparse_plus_summary(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    pattern: BlockMap | SparsePattern,
    summarize: Callable[..., Summary],
    block_size: int = 64,
    is_causal: bool = False,
    kv_mask: Bool[Array, " S"] | None = None,
    scale: float | Array | None = None,
) -> AttentionState:
    r"""Exact attention on a sparse support plus a summary of the keys outside it.

    With weights :math:`\hat e_{tj}` of keys in the summary and support :math:`S_t`, and one normaliser,

    .. math:: A_{tj} = e^{s\, q_t \cdot k_j}\,[j \in S_t] + \hat e_{tj}\,[j \notin S_t], \qquad
              \mathrm{out}_t = \sum_j A_{tj} v_j \Big/ \sum_j A_{tj}.

    With a `BlockMap` the support consists of the visited blocks. Each block of keys has a summary, and a query uses the
    summaries of the blocks that it does not see. Nothing is subtracted, so weights are positive if those of the summary
    are, and the output is exact if the summary is. With feature moments this is `scatterbrain`, with control variates
    of chunks `eva`, with coresets `sparse_coreset`. With summaries of tokens the cost grows with T S, divided by the
    number of keys per token.

    With a `SparsePattern` the support differs between queries. There is one summary of all keys, from which the
    features of the support are subtracted. This needs feature moments, because the share of a key in other summaries is
    unknown. If most of the estimated weight is on the support, the difference is mostly rounding error, and outputs may
    leave the range of the values: prefer blocks. In the causal form the keys of the query's block and of the block
    before it are added to the support.

    Shared arguments: see `approx_attention.methods`.

    Args:
        key: typed PRNG key, if the summary is random. Summaries of tokens are independent between blocks; moments share
            one random projection (bind ``projection`` to sample it once).
        pattern: the support.
        summarize: ``(k, v, key, *, kv_mask) -> summary`` in scaled space, such as `summarize_favor`,
            ``functools.partial(summarize_coreset, coreset_size=8)`` or `summarize_mean_pool`, whose log-normalisers are
            those of softmax attention.
        block_size: tokens per block of the causal form with a `SparsePattern`; a `BlockMap` has a block size.

    Raises:
        ValueError: shapes that do not match; causally, a block that does not see itself.
        TypeError: dtypes that are not floating point, a pattern that is neither of the two kinds.
        NotImplementedError: a `SparsePattern` with a summary of tokens, a `BlockMap` with one that is neither
            `FeatureMoments` nor `WeightedKV`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import exact, sparse_plus_summary, summarize_exact
        >>> from approx_attention.sparse import BlockMap
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (32, 4)) for i in range(3))
        >>> window = BlockMap.banded(1, 1, block_size=4, num_queries=32, num_keys=32)
        >>> out = sparse_plus_summary(q, k, v, pattern=window, summarize=summarize_exact)
        >>> bool(jnp.allclose(out, exact(q, k, v), atol=1e-5))
        True

    Reference:
        :cite:p:`chen2021scatterbrain`, section 4.
    """
    q, k, v = head_inputs(q, k, v, scale=scale, kv_mask=kv_mask, is_causal=is_causal)
    _check_pattern(pattern, q.shape[0], k.shape[0])
    if isinstance(pattern, BlockMap):
        if is_causal and not np.diagonal(pattern.visited).all():
            raise ValueError("with is_causal every block must visit itself: its summary would leak the future")

        def of_block(k: Array, v: Array, kv_mask: Array, number: Array) -> Summary:
            block_key = None if key is None else jax.random.fold_in(key, number)
            summary = require_scaled_space("sparse_plus_summary", summarize(k, v, block_key, kv_mask=kv_mask))
            if not isinstance(summary, FeatureMoments | WeightedKV):
                raise NotImplementedError(
                    "sparse_plus_summary with a BlockMap supports FeatureMoments and WeightedKV only, got "
                    f"{type(summary).__name__}"
                )
            # Moments of several blocks are added, so all need the features of one PRNG key. The kind of a summary is
            # known only after it is made; XLA removes the unused one.
            return summarize(k, v, key, kv_mask=kv_mask) if isinstance(summary, FeatureMoments) else summary

        return blocks_and_rest_state(q, k, v, pattern, of_block, is_causal=is_causal, kv_mask=kv_mask)
    block_size = check_count("block_size", block_size)

    def moments_of(k: Array, v: Array, kv_mask: Array) -> FeatureMoments:
        summary = require_scaled_space("sparse_plus_summary", summarize(k, v, key, kv_mask=kv_mask))
        if not isinstance(summary, FeatureMoments):
            raise NotImplementedError(
                "sparse_plus_summary with a SparsePattern supports FeatureMoments only, got "
                f"{type(summary).__name__}; use a BlockMap"
            )
        return summary

    options: Any = {"is_causal": is_causal, "kv_mask": kv_mask, "block_size": block_size}
    return support_and_moments_state(q, k, v, pattern.indices, pattern.valid, moments_of, **options)
