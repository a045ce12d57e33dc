"""Coresets: few weighted tokens that answer every query of bounded norm almost as all tokens do."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from approx_attention.core import (
    AttentionState,
    RealFirst,
    WeightedKV,
    attend,
    causal_state,
    check_choice,
    check_count,
    check_key,
    count_real,
    head_inputs,
    output_or_state,
    over_real_tokens,
    pad_rows,
)
from approx_attention.coresets import (
    Algorithm,
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
    algorithm: str | Algorithm = "kmeans_nystrom",
    query_radius: float | Array | None = None,
    is_causal: bool = False,
    streaming: Literal["fold", "counter"] = "fold",
    sinks: int = 4,
    block_size: int = 128,
    kv_mask: Bool[Array, " S"] | None = None,
    scale: float | Array | None = None,
) -> AttentionState:
    r"""Attention over M weighted tokens that stand for all keys and values, whatever is asked.

    .. math:: \mathrm{out}_t = \sum_c e^{s\, q_t \cdot k_c}\, u_c \Big/ \sum_c e^{s\, q_t \cdot k_c}\, m_c,

    with tokens such that :math:`\sup_{\|q\| \le \rho} \|\mathrm{out}(q) - \mathrm{attention}(q)\|` is small. Chosen
    tokens (``"halving"``, ``"stratified"``, samples) have :math:`u_c = m_c v_c`; merged ones (``"kmeans_merge"``) are
    means of keys with sums of values; ``"kmeans_nystrom"`` solves for masses and values, which may then be negative, so
    that answers are clipped to the range of the values. All but ``"balance_kv"``, ``"subgen"`` and Nystrom weights keep
    the total mass exactly.

    Which tokens are chosen has no gradient; the keys and values of the chosen have.

    Shared arguments: see `approx_attention.methods`.

    Args:
        coreset_size: the number M of tokens; with as many as real keys the answer is exact.
        algorithm: a name in `approx_attention.coresets.ALGORITHMS`, or one of its classes with settings of your own.
        query_radius: :math:`\rho`, the largest norm of a query in scaled space (`query_radius`); by default that of the
            centred keys.
        is_causal: query t sees keys j <= t: those of its block and the block before exactly, earlier ones by coreset.
        streaming: how the coreset grows causally, see `running_coreset`: folded, which merges clusters and takes no
            algorithm and no radius, or counted.
        sinks: how many of the first tokens the causal form keeps exactly, beside the coreset.

    Raises:
        ValueError: shapes that do not fit, counts below 1, an unknown algorithm, no key.
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
        halving; the default is k-means with Nystrom weights, as in :cite:p:`wildcat2026` with other landmarks.
    """
    head_dim = q.shape[-1]
    block_size = check_count("block_size", block_size)
    sinks = check_count("sinks", sinks, least=0)
    check_choice("streaming", streaming, ("fold", "counter"))
    q, k, v = head_inputs(q, k, v, scale=scale, kv_mask=kv_mask, is_causal=is_causal)
    sizes: Any = {"coreset_size": coreset_size, "algorithm": algorithm, "query_radius": query_radius}
    if is_causal:
        options: Any = {"streaming": streaming, "sinks": sinks, "max_length": q.shape[0]}
        running = running_coreset(head_dim, key, **sizes, **options)
        state = causal_state(q, k, v, running, block_size=block_size, kv_mask=kv_mask)
    else:
        state = attend(q, summarize_coreset(k, v, key, **sizes, kv_mask=kv_mask))
    return state


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
    r"""The coreset twin of Scatterbrain: exact on nearby blocks, a coreset for each of the others.

    With the support N(t), the keys of the block of query t and of the blocks just before and after it, and coresets
    :math:`C_b` of M tokens :math:`(c, m_c, u_c)` for each block b,

    .. math:: \mathrm{out}_t = \frac{\sum_{j \in N(t)} e^{s\, q_t \cdot k_j} v_j
              + \sum_{b \not\subset N(t)} \sum_{c \in C_b} e^{s\, q_t \cdot c}\, u_c}
              {\sum_{j \in N(t)} e^{s\, q_t \cdot k_j}
              + \sum_{b \not\subset N(t)} \sum_{c \in C_b} e^{s\, q_t \cdot c}\, m_c}.

    The cost is that of exact attention over three blocks and over M tokens of every block: T S M / ``window_size``.
    Unlike causal `coreset`, which folds all earlier blocks into one coreset, its causal form summarises each once.

    Shared arguments: see `approx_attention.methods`.

    Args:
        q: queries ``[T, D]``; query t stands at the position of key t, counted over real keys.
        coreset_size: the number M of tokens for each block; with as many as a block holds the answer is exact.
        algorithm: as in `coreset`; masses that are positive keep the weights positive.
        window_size: tokens per block.
        is_causal: query t sees keys j <= t: those of its block and the block before exactly, earlier ones by coresets.

    Raises:
        ValueError: shapes that do not fit, counts below 1, an unknown algorithm, no key.
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
    drawn = check_key("sparse_coreset", key)
    q, k, v = head_inputs(q, k, v, scale=scale, kv_mask=kv_mask, is_causal=is_causal)
    block = min(window_size, max(q.shape[0], k.shape[0]))
    sizes = {"block_size": block, "num_queries": q.shape[0], "num_keys": k.shape[0]}

    def summarize(k: Array, v: Array, kv_mask: Array, number: Array) -> WeightedKV:
        own = jax.random.fold_in(drawn, number)
        tokens = WeightedKV.of_tokens(k, v, kv_mask)
        return compress(tokens, own, coreset_size=coreset_size, algorithm=algorithm)

    blocks = BlockMap.banded(1, 1, **sizes)

    def by_blocks(q: Array, k: Array, v: Array, kv_mask: Array | None) -> AttentionState:
        return blocks_and_rest_state(q, k, v, blocks, summarize, is_causal=is_causal, kv_mask=kv_mask)

    state = over_real_tokens(by_blocks, q, k, v, kv_mask, is_causal=is_causal)
    return state


def summarize_coreset(
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    coreset_size: int = 256,
    algorithm: str | Algorithm = "kmeans_nystrom",
    query_radius: float | Array | None = None,
    kv_mask: Bool[Array, " S"] | None = None,
) -> WeightedKV:
    """A coreset of keys and values.

    Shared arguments: see `approx_attention.methods`.

    Args:
        coreset_size: the number M of tokens.
        algorithm: as in `coreset`.
        query_radius: the largest norm of a query in scaled space, by default that of the centred keys.
        kv_mask: true where a key is real, ``[S]``. The choice depends on these alone, but with ``"halving"``,
            ``"stratified"``, ``"thinformer"``, ``"balance_kv"`` and ``"subgen"``, which draw by the length, on S too.

    Returns:
        A `WeightedKV` of at most M tokens; as they are, if no more keys are real.

    Raises:
        ValueError: an unknown algorithm, a count below 1, no key; keys, values or a mask that are not of the same
            tokens.
        TypeError: keys or values that are not floating point, a count that is no integer.

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
    coreset_size = check_count("coreset_size", coreset_size)
    if kv_mask is None or coreset_size >= k.shape[0]:
        return compress(tokens, key, **options)
    tokens = RealFirst.of(kv_mask).front(tokens)
    small = compress(tokens, key, **options)
    # No more real keys than there is room for stay as they are.
    whole = WeightedKV(*(x[:coreset_size] for x in (tokens.k, tokens.value_sum, tokens.mass)))
    few = WeightedKV(*(pad_rows(x, coreset_size - x.shape[0]) for x in (small.k, small.value_sum, small.mass)))
    chosen = jax.tree.map(lambda a, b: jnp.where(count_real(kv_mask) <= coreset_size, a, b), whole, few)
    return dataclasses.replace(chosen, value_range=small.value_range)
