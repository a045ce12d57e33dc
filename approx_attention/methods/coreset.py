"""Coresets: a few weighted tokens that approximate the output of all tokens, for every query of bounded norm."""

import dataclasses
import functools
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from approx_attention.core import (
    AttentionState,
    RealFirst,
    WeightedKV,
    check_choice,
    check_count,
    check_key,
    count_real,
    head_inputs,
    output_or_state,
    over_real_tokens,
    pad_rows,
    state_by_summary,
)
from approx_attention.coresets import (
    Algorithm,
    Streaming,
    algorithm_of,
    compress,
    running_coreset,
)
from approx_attention.sparse import BlockMap, blocks_and_rest_state


@output_or_state
def coreset(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    coreset_size: int = 256,
    algorithm: str | Algorithm = "guarded",
    query_radius: float | Array | None = None,
    is_causal: bool = False,
    streaming: Streaming = "fold",
    sinks: int = 4,
    block_size: int = 128,
    kv_mask: Bool[Array, " S"] | None = None,
    scale: float | Array | None = None,
) -> AttentionState:
    r"""Attention over a coreset: M weighted tokens that replace all keys and values, for every query.

    .. math:: \mathrm{out}_t = \sum_c e^{s\, q_t \cdot k_c}\, u_c \Big/ \sum_c e^{s\, q_t \cdot k_c}\, m_c,

    with tokens such that :math:`\sup_{\|q\| \le \rho} \|\mathrm{out}(q) - \mathrm{attention}(q)\|` is small. Chosen
    tokens (``"halving"``, ``"stratified"``, samples) have :math:`u_c = m_c v_c`. Merged ones (``"kmeans_merge"``) are
    means of keys with sums of values. ``"kmeans_nystrom"`` solves for masses and values; masses may be negative, so
    outputs are clipped to the range of the values. ``"guarded"`` makes a merge and a solution and keeps the better one.
    All but ``"balance_kv"``, ``"subgen"`` and Nystrom weights keep the total mass exactly.

    The choice of tokens has no gradient; the keys and values of the chosen ones have.

    Shared arguments: see `approx_attention.methods`.

    Args:
        coreset_size: the number M of tokens; with as many as real keys the output is exact.
        algorithm: a name in `approx_attention.coresets.ALGORITHMS`, or an instance of one of its classes.
        query_radius: :math:`\rho`, the largest norm of a query in scaled space (`query_radius`); by default that of the
            centred keys.
        streaming: growth of the coreset in the causal form, see `running_coreset`: ``"fold"`` merges clusters and
            ``"refit"`` solves for masses and values with every block; neither takes an algorithm, and only the second a
            radius. ``"counter"`` keeps one coreset for each level of a binary counter.
        sinks: the number of initial tokens that the causal form keeps exactly, in addition to the coreset.

    Raises:
        ValueError: shapes that do not match, counts below 1, an unknown algorithm, no key.
        TypeError: dtypes that are not floating point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import coreset, exact
        >>> q, k, v = (0.5 * jax.random.normal(jax.random.key(i), (512, 8)) for i in range(3))
        >>> out = coreset(q, k, v, jax.random.key(3), coreset_size=128)
        >>> bool(jnp.linalg.norm(out - exact(q, k, v)) < 0.05 * jnp.linalg.norm(exact(q, k, v)))
        True

    Reference:
        :cite:p:`liberty2026nearly`, for the problem and its bounds; :cite:p:`karnin2019discrepancy` for
        halving; Nystrom weights as in :cite:p:`wildcat2026`, with other landmarks. The choice by errors on probes is
        a construction of this library.
    """
    # Checked without is_causal too, so that an error does not show up only in the causal form.
    sinks = check_count("sinks", sinks, least=0)
    check_choice("streaming", streaming, get_args(Streaming))
    options: Any = {"coreset_size": coreset_size, "algorithm": algorithm, "query_radius": query_radius}
    # Trained models put large weights on the first few tokens (attention sinks), which merging would blur.
    growth: Any = {"streaming": streaming, "sinks": sinks, "max_length": q.shape[0]}
    return state_by_summary(
        q,
        k,
        v,
        functools.partial(summarize_coreset, key=key, **options),
        functools.partial(running_coreset, key=key, **options, **growth),
        is_causal=is_causal,
        block_size=block_size,
        kv_mask=kv_mask,
        scale=scale,
    )


@output_or_state
def sparse_coreset(
    q: Float[Array, "T D"],
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    coreset_size: int = 8,
    algorithm: str | Algorithm = "kmeans_merge",
    window_size: int = 64,
    is_causal: bool = False,
    kv_mask: Bool[Array, " S"] | None = None,
    scale: float | Array | None = None,
) -> AttentionState:
    r"""Scatterbrain with coresets: exact attention to nearby blocks, and a coreset for each other block.

    The support N(t) contains the keys of the block of query t and of the blocks just before and after it. With a
    coreset :math:`C_b` of M tokens :math:`(c, m_c, u_c)` for each block b,

    .. math:: \mathrm{out}_t = \frac{\sum_{j \in N(t)} e^{s\, q_t \cdot k_j} v_j
              + \sum_{b \not\subset N(t)} \sum_{c \in C_b} e^{s\, q_t \cdot c}\, u_c}
              {\sum_{j \in N(t)} e^{s\, q_t \cdot k_j}
              + \sum_{b \not\subset N(t)} \sum_{c \in C_b} e^{s\, q_t \cdot c}\, m_c}.

    The cost is that of exact attention over three blocks, and over M tokens of every block: T S M / ``window_size``.
    Causal `coreset` folds all earlier blocks into one coreset; here each block keeps the coreset made for it.

    Shared arguments: see `approx_attention.methods`.

    Args:
        coreset_size: the number M of tokens for each block; with ``window_size`` of them the output is exact.
        algorithm: as in `coreset`; positive masses keep the weights positive.
        window_size: tokens per block; in the causal form a query sees its block and the block before exactly.

    Raises:
        ValueError: shapes that do not match, counts below 1, an unknown algorithm, no key.
        TypeError: dtypes that are not floating point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import exact, sparse_coreset
        >>> q, k, v = (0.5 * jax.random.normal(jax.random.key(i), (256, 8)) for i in range(3))
        >>> out = sparse_coreset(q, k, v, jax.random.key(3), coreset_size=16, window_size=32)
        >>> bool(jnp.linalg.norm(out - exact(q, k, v)) < 0.2 * jnp.linalg.norm(exact(q, k, v)))
        True

    Reference:
        :cite:p:`chen2021scatterbrain`, section 4, with a coreset in place of its features.
    """
    window_size = check_count("window_size", window_size)
    coreset_size = check_count("coreset_size", coreset_size)
    algorithm_of(algorithm)
    sample_key = check_key("sparse_coreset", key)
    q, k, v = head_inputs(q, k, v, scale=scale, kv_mask=kv_mask, is_causal=is_causal)
    block = min(window_size, max(q.shape[0], k.shape[0]))
    sizes = {"block_size": block, "num_queries": q.shape[0], "num_keys": k.shape[0]}

    def summarize(k: Array, v: Array, kv_mask: Array, number: Array) -> WeightedKV:
        # With one PRNG key for all blocks, their random choices, and so their errors, would be correlated.
        block_key = jax.random.fold_in(sample_key, number)
        tokens = WeightedKV.of_tokens(k, v, kv_mask)
        return compress(tokens, block_key, coreset_size=coreset_size, algorithm=algorithm)

    blocks = BlockMap.banded(1, 1, **sizes)

    def by_blocks(q: Array, k: Array, v: Array, kv_mask: Array | None) -> AttentionState:
        return blocks_and_rest_state(q, k, v, blocks, summarize, is_causal=is_causal, kv_mask=kv_mask)

    # Blocks are cut by position, so padding must not take any.
    return over_real_tokens(by_blocks, q, k, v, kv_mask, is_causal=is_causal)


def summarize_coreset(
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    coreset_size: int = 256,
    algorithm: str | Algorithm = "guarded",
    query_radius: float | Array | None = None,
    kv_mask: Bool[Array, " S"] | None = None,
) -> WeightedKV:
    """Summarise keys and values by a coreset.

    Arguments are those of `coreset`, with keys in scaled space (`approx_attention.methods`). The choice depends on the
    real keys only. With ``"halving"``, ``"stratified"``, ``"thinformer"``, ``"balance_kv"`` and ``"subgen"`` it also
    depends on S, because their random numbers do.

    Returns:
        A `WeightedKV` of at most M tokens; the tokens themselves if at most M keys are real.

    Raises:
        ValueError: an unknown algorithm, a count below 1, no PRNG key, different numbers of keys, values and mask
            entries.
        TypeError: keys or values that are not floating point, a count that is not an integer.

    Example:
        >>> import jax
        >>> from approx_attention import summarize_coreset
        >>> k, v = (jax.random.normal(jax.random.key(i), (64, 4)) for i in range(2))
        >>> summarize_coreset(k, v, jax.random.key(2), coreset_size=8, algorithm="uniform").mass.sum().tolist()
        64.0
    """
    coreset_size = check_count("coreset_size", coreset_size)
    options: Any = {"coreset_size": coreset_size, "algorithm": algorithm, "query_radius": query_radius}
    tokens = WeightedKV.of_tokens(k, v, kv_mask)
    if kv_mask is None or coreset_size >= k.shape[0]:
        return compress(tokens, key, **options)
    # Algorithms pair and sample tokens by position: with the real ones first, padding takes none.
    tokens = RealFirst.of(kv_mask).front(tokens)
    small = compress(tokens, key, **options)
    # If at most M keys are real, they are the coreset. Their number is traced, so both coresets are made, padded to one
    # size, and one is selected.
    whole = WeightedKV(*(x[:coreset_size] for x in (tokens.k, tokens.value_sum, tokens.mass)))
    few = WeightedKV(*(pad_rows(x, coreset_size - x.shape[0]) for x in (small.k, small.value_sum, small.mass)))
    chosen = jax.tree.map(lambda a, b: jnp.where(count_real(kv_mask) <= coreset_size, a, b), whole, few)
    # Signed masses need the range of the values; unchanged tokens lie within it.
    return dataclasses.replace(chosen, value_range=small.value_range)
