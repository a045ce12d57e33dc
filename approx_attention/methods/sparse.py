"""Sparse attention: exact on the keys of a pattern, alone or with a summary of the others; patterns that are in use."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from approx_attention.core import (
    HIDDEN,
    AttentionState,
    FeatureMoments,
    Summary,
    blocked_state,
    check_array,
    check_count,
    check_key,
    head_inputs,
    in_blocks,
    mask_bias,
    merge,
    output_or_state,
    over_real_tokens,
    real_keys,
    require_scaled_space,
    triangular_state,
    window_state,
)
from approx_attention.sparse import (
    BlockMap,
    SparsePattern,
    block_lists_state,
    block_sparse_state,
    blocks_and_rest_state,
    gathered_state,
    is_traced,
    support_and_moments_state,
)

# One gathered key takes as long as so many keys of a block that is visited.
GATHER_COST = 24
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
    kv_mask: Bool[Array, " S"] | None = None,
    scale: float | Array | None = None,
) -> AttentionState:
    r"""Softmax attention over the support of a pattern; what lies outside is not computed.

    .. math:: \mathrm{out}_t = \sum_{j \in S_t} e^{s\, q_t \cdot k_j}\, v_j \Big/ \sum_{j \in S_t} e^{s\, q_t \cdot k_j}

    Only the support S of the pattern counts; its weights are for those who realise it. There are two forms. Blocks:
    every block of queries meets each block of keys that holds an entry, in matrix products, and entries outside the
    support are hidden; its cost is that of the visited area. Gathered: every query fetches its own keys, at a cost of
    T K (D + Dv), far more for one key. A `BlockMap`, which is known when tracing, runs by blocks. A pattern whose
    arrays are known takes the cheaper form: gathered, if 24 K is less than the keys that a query meets in blocks of 64
    or 128. A traced pattern is gathered, because its blocks are not known; so is one that is an argument of
    `attention`, which takes ``method=sparse_attention, pattern=...``.

    Shared arguments: see `approx_attention.methods`.

    Args:
        pattern: which keys each query sees, of T queries and S keys.
        is_causal: of these keys only j <= t.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: dtypes that are not floating point, a pattern that is none.

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
    chosen = pattern if isinstance(pattern, BlockMap) else _cheaper(pattern, is_causal)
    if isinstance(chosen, BlockMap):
        state = _over_blocks(q, k, v, chosen, is_causal, kv_mask)
    else:
        state = _over_gathered(q, k, v, chosen, is_causal, kv_mask)
    return state


def _check_pattern(pattern: Any, num_queries: int, num_keys: int) -> None:
    if not isinstance(pattern, SparsePattern | BlockMap):
        raise TypeError(f"pattern must be a SparsePattern or a BlockMap, got {type(pattern).__name__}")
    given = pattern.num_queries, pattern.num_keys
    if given != (num_queries, num_keys):
        raise ValueError(f"pattern must be of [T, S] = {[num_queries, num_keys]}, got {list(given)}")


def _cheaper(pattern: SparsePattern, is_causal: bool) -> SparsePattern | BlockMap:
    """The pattern as it is, to be gathered, or its blocks, by what each form costs."""
    if is_traced(pattern):
        return pattern
    if is_causal:
        # Keys ascend, so those that are seen come first.
        valid = np.asarray(pattern.valid) & (np.asarray(pattern.indices) <= np.arange(pattern.num_queries)[:, None])
        width = max(1, int(valid.sum(axis=1).max()))
        pattern = dataclasses.replace(
            pattern,
            indices=np.asarray(pattern.indices)[:, :width],
            log_weights=jnp.where(valid, pattern.log_weights, -jnp.inf)[:, :width],
            valid=valid[:, :width],
        )
    visited = {}
    for block_size in BLOCK_SIZES:
        with jax.ensure_compile_time_eval():
            mask = np.asarray(pattern.block_mask(block_size))
        visited[block_size] = (np.tril(mask) if is_causal else mask).sum() * block_size**2
    block_size = min(visited, key=lambda size: visited[size])
    if GATHER_COST * pattern.keys_per_row * pattern.num_queries < visited[block_size]:
        return pattern
    return BlockMap.from_pattern(pattern, block_size)


def _over_blocks(
    q: Array, k: Array, v: Array, blocks: BlockMap, is_causal: bool, kv_mask: Array | None
) -> AttentionState:
    return block_sparse_state(q, k, v, blocks.causal() if is_causal else blocks, kv_mask=kv_mask)


def _over_gathered(
    q: Array, k: Array, v: Array, pattern: SparsePattern, is_causal: bool, kv_mask: Array | None
) -> AttentionState:
    seen = pattern.valid
    if is_causal:
        seen = seen & (pattern.indices <= jnp.arange(q.shape[0], dtype=jnp.int32)[:, None])
    if kv_mask is not None:
        seen = seen & kv_mask[pattern.indices]
    return gathered_state(q, k, v, pattern.indices, seen)


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
    r"""Exact attention on a sparse support, and a summary, of any kind, of the keys outside it.

    With weights :math:`\hat e_{tj}` that the summary gives the keys, one normaliser for all and support :math:`S_t`,

    .. math:: A_{tj} = e^{s\, q_t \cdot k_j}\,[j \in S_t] + \hat e_{tj}\,[j \notin S_t], \qquad
              \mathrm{out}_t = \sum_j A_{tj} v_j \Big/ \sum_j A_{tj}.

    With a `BlockMap` every block that is visited belongs to the support, whole. Each block of keys is summarised by
    itself, and a query is answered by the summaries of the blocks that it does not see: nothing is subtracted, so that
    weights are positive wherever those of the summary are, and the answer is exact if the summary loses nothing. With
    moments of features this is Scatterbrain (`scatterbrain`), with control variates of chunks it is `eva`, with
    coresets `sparse_coreset`. Token summaries are as many as blocks: their cost grows with T S, divided by how many
    keys a token stands for.

    With a `SparsePattern` every query has keys of its own, one summary of all keys is made, and what it makes of the
    support is subtracted, which needs moments: other summaries do not say what share of them is a key's. Where most of
    the estimated weight lies on the support, little but rounding is left of the rest, and answers may leave the range
    of the values: prefer blocks. Causally the keys of the query's block and of the one before it join the support.

    Shared arguments: see `approx_attention.methods`.

    Args:
        key: typed PRNG key, if the summary is random. Blocks of tokens draw independently; moments share one draw (to
            make it once, bind ``projection``).
        pattern: the support.
        summarize: ``(k, v, key, *, kv_mask) -> summary`` in scaled space, such as `summarize_favor`,
            ``functools.partial(summarize_coreset, coreset_size=8)`` or `summarize_mean_pool`, whose log-normalisers are
            those of softmax attention.
        block_size: tokens per block of the causal form with a `SparsePattern`; a `BlockMap` has its own.
        is_causal: query t sees keys j <= t; of earlier blocks that it does not visit, the summaries.

    Raises:
        ValueError: shapes that do not fit; causally, a block that does not see itself.
        TypeError: dtypes that are not floating point, a pattern that is none.
        NotImplementedError: a `SparsePattern` with a summary of tokens.

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
            raise ValueError("causally every block must visit itself: a summary of it would tell of the future")

        def of_block(k: Array, v: Array, kv_mask: Array, number: Array) -> Summary:
            own = None if key is None else jax.random.fold_in(key, number)
            summary = require_scaled_space("sparse_plus_summary", summarize(k, v, own, kv_mask=kv_mask))
            return summarize(k, v, key, kv_mask=kv_mask) if isinstance(summary, FeatureMoments) else summary

        state = blocks_and_rest_state(q, k, v, pattern, of_block, is_causal=is_causal, kv_mask=kv_mask)
    else:
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
        state = support_and_moments_state(q, k, v, pattern.indices, pattern.valid, moments_of, **options)
    return state


@output_or_state
def longformer(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    window_size: int = 128,
    num_global: int = 4,
    is_causal: bool = False,
    kv_mask: Bool[Array, " S"] | None = None,
    scale: float | Array | None = None,
) -> AttentionState:
    r"""A sliding window, and a few global tokens that see every key and that every query sees.

    .. math:: \mathrm{out}_t
              = \sum_{j \in S_t} e^{s\, q_t \cdot k_j}\, v_j \Big/ \sum_{j \in S_t} e^{s\, q_t \cdot k_j},
              \qquad S_t = \begin{cases} \{0, \dots, S - 1\} & t < G \\
              \{j : |t - j| < w\} \cup \{0, \dots, G - 1\} & \text{else.} \end{cases}

    The first G real tokens are the global ones: order the sequence so. The published model gives global attention
    projections of its own; here there is one q, k and v. Causally the window lies before the query, a global token too
    sees no key after it, and what is left is a window with attention sinks.

    Shared arguments: see `approx_attention.methods`.

    Args:
        q: queries ``[T, D]``; query t stands at the position of key t, counted over real keys.
        window_size: w, the query's own position and w - 1 tokens to a side (only before it if causal).
        num_global: the number G of global tokens.
        is_causal: no key after the query.

    Raises:
        ValueError: shapes that do not fit, a window without any key.
        TypeError: dtypes that are not floating point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import exact, longformer
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (32, 4)) for i in range(3))
        >>> out = longformer(q, k, v, window_size=2, num_global=3)
        >>> bool(jnp.allclose(out[:3], exact(q, k, v)[:3], atol=1e-6))
        True

    Reference:
        :cite:p:`beltagy2020longformer`, section 3.1; sinks: :cite:p:`xiao2023sinks`.
    """
    num_keys = k.shape[0]
    left = check_count("window_size", window_size) - 1
    num_global = min(check_count("num_global", num_global, least=0), num_keys)
    q, k, v = head_inputs(q, k, v, scale=scale, kv_mask=kv_mask, is_causal=is_causal)

    def window_and_global(q: Array, k: Array, v: Array, kv_mask: Array | None) -> AttentionState:
        bias = mask_bias(real_keys(kv_mask, num_keys), q.dtype)
        not_global = jnp.where(jnp.arange(num_keys) < num_global, HIDDEN, bias)
        state = window_state(q, k, v, not_global, left=left, right=0 if is_causal else left)
        if num_global == 0:
            return state
        columns = blocked_state(q, *(x[:num_global] for x in (k, v, bias)))
        rows = (triangular_state if is_causal else blocked_state)(q[:num_global], k, v, bias)
        return jax.tree.map(lambda x, row: x.at[: row.shape[0]].set(row), merge(state, columns), rows)

    state = over_real_tokens(window_and_global, q, k, v, kv_mask, is_causal=is_causal)
    return state


@output_or_state
def bigbird(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    num_random_blocks: int = 3,
    num_window_blocks: int = 3,
    num_global_blocks: int = 1,
    block_size: int = 64,
    blocks: Int[Array, "Tb R"] | None = None,
    is_causal: bool = False,
    kv_mask: Bool[Array, " S"] | None = None,
    scale: float | Array | None = None,
) -> AttentionState:
    r"""A sliding window, global tokens and random keys, all by blocks.

    A query of block i sees the blocks of

    .. math:: \{j : |i - j| \le (w - 1) / 2\} \cup \{0, \dots, g - 1\} \cup R_i,

    and one of the first g blocks sees every block. The r blocks :math:`R_i` are drawn uniformly, without replacement,
    from those that are left. Blocks are those of the real tokens, of which the first are the global ones (the published
    internal variant takes the last block too). Causally a query sees of all these the keys j <= t: the window lies
    before it, and its blocks are drawn from earlier ones.

    Shared arguments: see `approx_attention.methods`.

    Args:
        q: queries ``[T, D]``; query t stands at the position of key t, counted over real keys.
        key: typed PRNG key; not needed if ``blocks`` is given or none are drawn.
        num_random_blocks: the number r; where fewer blocks are left, all are seen, and if that holds everywhere the
            answer is exact.
        num_window_blocks: the number w of blocks, odd, of which the query's own is the middle one (the last if causal,
            where there are (w + 1) / 2).
        num_global_blocks: the number g.
        block_size: tokens per block.
        blocks: numbers of the random blocks (of real tokens) ``[ceil(T / block_size), R]`` in place of a draw; those
            that a query sees anyhow, or twice, or not at all if causal, count for nothing, and neither do numbers that
            are no block's, such as -1.
        is_causal: no key after the query.

    Raises:
        ValueError: shapes that do not fit, a window of an even number of blocks, neither key nor blocks.
        TypeError: dtypes that are not floating point, blocks that are no integers.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import bigbird, exact
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (32, 4)) for i in range(3))
        >>> out = bigbird(q, k, v, jax.random.key(3), block_size=4, num_random_blocks=6)
        >>> bool(jnp.allclose(out, exact(q, k, v), atol=1e-5))
        True

    Reference:
        :cite:p:`zaheer2020bigbird`, section 2 and appendix D.
    """
    block_size = check_count("block_size", block_size)
    num_random_blocks = check_count("num_random_blocks", num_random_blocks, least=0)
    num_global_blocks = check_count("num_global_blocks", num_global_blocks, least=0)
    num_window_blocks = check_count("num_window_blocks", num_window_blocks)
    if num_window_blocks % 2 == 0:
        raise ValueError(f"num_window_blocks must be odd, the same to both sides, got {num_window_blocks}")
    q, k, v = head_inputs(q, k, v, scale=scale, kv_mask=kv_mask, is_causal=is_causal)
    block_size = min(block_size, max(q.shape[0], k.shape[0]))
    sizes = {"block_size": block_size, "num_queries": q.shape[0], "num_keys": k.shape[0]}
    rows, columns = np.indices([-(-n // block_size) for n in (q.shape[0], k.shape[0])])
    near = abs(rows - columns) <= num_window_blocks // 2
    fixed = BlockMap.from_blocks(near | (columns < num_global_blocks) | (rows < num_global_blocks), **sizes)
    fixed = fixed.causal() if is_causal else fixed
    free = ~fixed.visited & ((columns < rows) | (not is_causal))

    count = min(num_random_blocks, int(free.sum(axis=1).max()))
    if blocks is not None:
        check_array("blocks", blocks, "integers")
        if blocks.ndim != 2 or blocks.shape[0] != len(free):
            raise ValueError(f"blocks must be [ceil(T / block_size), R] with {len(free)} rows, got {blocks.shape}")
        blocks = jnp.asarray(blocks)

    def by_blocks(q: Array, k: Array, v: Array, kv_mask: Array | None) -> AttentionState:
        state = block_sparse_state(q, k, v, fixed, kv_mask=kv_mask)
        if blocks is not None:
            drawn = _given_lists(free, blocks)
        elif num_random_blocks:
            present = None if kv_mask is None else jnp.any(in_blocks(kv_mask, block_size), axis=1)
            drawn = _random_lists(free, count, check_key("bigbird", key), present)
        else:
            return state
        return merge(state, block_lists_state(q, k, v, *drawn, block_size=block_size, kv_mask=kv_mask))

    state = over_real_tokens(by_blocks, q, k, v, kv_mask, is_causal=is_causal)
    return state


def _random_lists(free: np.ndarray, count: int, key: Array, present: Array | None) -> tuple[Array, Array]:
    """For each row a uniform draw of so many of its free columns, and which are; what a row draws depends on no other.

    Columns that are not ``present`` are not drawn: blocks of nothing but padding.

    Neither does the order of columns depend on how many there are: a prefix of a sequence draws like the whole.
    """
    numbers = jnp.arange(free.shape[1], dtype=jnp.int32)
    may_be_drawn = jnp.asarray(free) if present is None else free & present[None, :]

    def of_row(args: tuple[Array, Array]) -> tuple[Array, Array]:
        row, free = args
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, row), numbers)
        drawn = jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32))(keys)
        priority = jnp.where(free, drawn, -1)
        best, chosen = lax.top_k(priority, count)
        return chosen.astype(jnp.int32), best >= 0

    return lax.map(of_row, (jnp.arange(len(free), dtype=jnp.int32), may_be_drawn))


def _given_lists(free: np.ndarray, blocks: Array) -> tuple[Array, Array]:
    """Given columns for each row, and which are free and listed for the first time."""
    lists = jnp.sort(blocks.astype(jnp.int32), axis=1)
    again = jnp.pad(lists[:, 1:] == lists[:, :-1], ((0, 0), (1, 0)))
    inside = (lists >= 0) & (lists < free.shape[1])
    lists = jnp.where(inside, lists, 0)
    is_free = jnp.take_along_axis(jnp.asarray(free), lists, axis=1)
    return lists, inside & is_free & ~again
