"""Coresets: few weighted tokens that answer every query of bounded norm almost as all tokens do."""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from approx_attention.core import (
    AttentionState,
    RealFirst,
    RunningSummary,
    WeightedKV,
    accumulation_dtype,
    attend,
    causal_state,
    check_choice,
    check_count,
    check_counts,
    check_key,
    check_not_negative,
    check_number,
    check_positive,
    check_rows,
    count_real,
    head_inputs,
    merge,
    out_of_blocks,
    over_real_tokens,
    pad_rows,
    shown,
    squared_norm,
    unknown,
)
from approx_attention.coresets import ALGORITHMS, Algorithm, k_means, spread_places
from approx_attention.sparse import BlockMap, blocks_and_rest_state


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
    return_state: bool = False,
) -> Any:
    r"""Attention over M weighted tokens that stand for all keys and values, whatever is asked.

    .. math:: \mathrm{out}_t = \sum_c e^{s\, q_t \cdot k_c}\, u_c \Big/ \sum_c e^{s\, q_t \cdot k_c}\, m_c,

    with tokens such that :math:`\sup_{\|q\| \le \rho} \|\mathrm{out}(q) - \mathrm{attention}(q)\|` is small. Chosen
    tokens (``"halving"``, ``"stratified"``, samples) have :math:`u_c = m_c v_c`; merged ones (``"kmeans_merge"``) are
    means of keys with sums of values; ``"kmeans_nystrom"`` solves for masses and values, which may then be negative, so
    that answers are clipped to the range of the values. All but ``"balance_kv"``, ``"subgen"`` and Nystrom weights keep
    the total mass exactly.

    Which tokens are chosen has no gradient; the keys and values of the chosen have.

    Args:
        q: queries ``[T, D]``.
        k: keys ``[S, D]``.
        v: values ``[S, Dv]``.
        key: typed PRNG key.
        coreset_size: the number M of tokens; with as many as real keys the answer is exact.
        algorithm: a name in `approx_attention.coresets.ALGORITHMS`, or one of its classes with settings of your own.
        query_radius: :math:`\rho`, the largest norm of a query in scaled space (`query_radius`); by default that of the
            centred keys.
        is_causal: query t sees keys j <= t: those of its block and the block before exactly, earlier ones by coreset.
        streaming: how the coreset grows causally, see `running_coreset`: folded, which merges clusters and takes no
            algorithm and no radius, or counted.
        sinks: how many of the first tokens the causal form keeps exactly, beside the coreset.
        block_size: tokens per block of the causal form.
        kv_mask: true where a key is real, ``[S]``. A query that sees no key gives 0.
        scale: factor s of the logits, ``1/sqrt(D)`` by default.
        return_state: return the `AttentionState`, with log-normalisers, in the accumulation dtype.

    Returns:
        Outputs ``[T, Dv]`` in the dtype of ``v``, or the state.

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
        Liberty, Andoni and Kleiner (2026), "Nearly optimal attention coresets", for the problem and its bounds; Karnin
        and Liberty (2019) for halving; the default is k-means with Nystrom weights, as in WildCat (2026) with other
        landmarks.
    """
    dtype, head_dim = v.dtype, q.shape[-1]
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
    return state if return_state else state.out.astype(dtype)


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
    return_state: bool = False,
) -> Any:
    r"""The coreset twin of Scatterbrain: exact on nearby blocks, a coreset for each of the others.

    With the support N(t), the keys of the block of query t and of the blocks just before and after it, and coresets
    :math:`C_b` of M tokens :math:`(c, m_c, u_c)` for each block b,

    .. math:: \mathrm{out}_t = \frac{\sum_{j \in N(t)} e^{s\, q_t \cdot k_j} v_j
              + \sum_{b \not\subset N(t)} \sum_{c \in C_b} e^{s\, q_t \cdot c}\, u_c}
              {\sum_{j \in N(t)} e^{s\, q_t \cdot k_j}
              + \sum_{b \not\subset N(t)} \sum_{c \in C_b} e^{s\, q_t \cdot c}\, m_c}.

    The cost is that of exact attention over three blocks and over M tokens of every block: T S M / ``window_size``.
    Unlike causal `coreset`, which folds all earlier blocks into one coreset, its causal form summarises each once.

    Args:
        q: queries ``[T, D]``; query t stands at the position of key t, counted over real keys.
        k: keys ``[S, D]``.
        v: values ``[S, Dv]``.
        key: typed PRNG key.
        coreset_size: the number M of tokens for each block; with as many as a block holds the answer is exact.
        algorithm: as in `coreset`; masses that are positive keep the weights positive.
        window_size: tokens per block.
        is_causal: query t sees keys j <= t: those of its block and the block before exactly, earlier ones by coresets.
        kv_mask: true where a key is real, ``[S]``. A query that sees no key gives 0.
        scale: factor s of the logits, ``1/sqrt(D)`` by default.
        return_state: return the `AttentionState`, with log-normalisers, in the accumulation dtype.

    Returns:
        Outputs ``[T, Dv]`` in the dtype of ``v``, or the state.

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
        Chen et al. (2021), "Scatterbrain", section 4, with a coreset in place of its features.
    """
    dtype = v.dtype
    window_size = check_count("window_size", window_size)
    coreset_size = check_count("coreset_size", coreset_size)
    _algorithm(algorithm)
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
    return state if return_state else state.out.astype(dtype)


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

    Args:
        k: keys ``[S, D]`` in scaled space (`fold_scale`).
        v: values ``[S, Dv]``.
        key: typed PRNG key.
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


def compress(
    tokens: WeightedKV,
    key: Array | None = None,
    *,
    coreset_size: int = 256,
    algorithm: str | Algorithm = "kmeans_nystrom",
    query_radius: float | Array | None = None,
) -> WeightedKV:
    """A coreset of tokens that have masses already, such as two coresets merged.

    Args:
        tokens: a `WeightedKV` without negative masses; if it carries a scale, so does the result.
        key: typed PRNG key.
        coreset_size: the number M of tokens; with no more tokens than that they come back as they are.
        algorithm: as in `coreset`.
        query_radius: the largest norm of a query in scaled space, by default that of the centred keys.

    Returns:
        A `WeightedKV` of at most M tokens.

    Raises:
        TypeError: what is no `WeightedKV`.
        ValueError: an unknown algorithm, a count below 1, signed masses, no key.

    Example:
        >>> import jax
        >>> from approx_attention import WeightedKV, compress, merge
        >>> k, v = (jax.random.normal(jax.random.key(i), (64, 4)) for i in range(2))
        >>> halves = (WeightedKV.of_tokens(k[part], v[part]) for part in (slice(0, 32), slice(32, 64)))
        >>> first, second = (compress(half, jax.random.key(2), coreset_size=8, algorithm="uniform") for half in halves)
        >>> both = compress(merge(first, second), jax.random.key(3), coreset_size=8, algorithm="uniform")
        >>> both.k.shape, float(both.mass.sum())
        ((8, 4), 64.0)
    """
    if not isinstance(tokens, WeightedKV):
        raise TypeError(f"compress takes a WeightedKV, got {type(tokens).__name__}")
    coreset_size = check_count("coreset_size", coreset_size)
    chosen = _algorithm(algorithm)
    if query_radius is not None:
        check_number("query_radius", query_radius)
        check_not_negative("query_radius", query_radius)
        # An integer of Python may be too large for what is compiled.
        query_radius = float(query_radius) if isinstance(query_radius, int) else query_radius
    if tokens.value_range is not None:
        raise ValueError("tokens with signed masses are not supported: compress what they were made of")
    drawn = check_key("coreset", key)
    if coreset_size >= tokens.mass.shape[0]:
        return tokens
    small = _compressed(chosen, coreset_size, tokens.in_scaled_space(), query_radius, drawn)
    return dataclasses.replace(small, scale=tokens.scale)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compressed(
    algorithm: Algorithm, size: int, tokens: WeightedKV, query_radius: float | Array | None, key: Array
) -> WeightedKV:
    """A coreset by an algorithm: one program, because a call that is not compiled would be hundreds."""
    dtype = accumulation_dtype(tokens.k, tokens.value_sum)
    middle, centred = _centred(jax.tree.map(lambda x: x.astype(dtype), tokens))
    radius = jnp.sqrt(jnp.max(squared_norm(centred.k)))
    ratio = jnp.ones_like(radius)
    if query_radius is not None:
        ratio = jnp.asarray(query_radius, radius.dtype) / jnp.where(radius > 0, radius, 1)
    small = algorithm(centred, size, lax.stop_gradient(ratio), key)
    return dataclasses.replace(small, k=small.k + middle[None, :])


def query_radius(
    q: Float[Array, "T D"], *, scale: float | Array | None = None, window: int = 32, margin: float = 1.1
) -> Float[Array, ""]:
    """An estimate of the norm of queries to come, in scaled space: the largest of the last ones, and a little more.

    Args:
        q: queries ``[T, D]``.
        scale: factor of the logits, ``1/sqrt(D)`` by default.
        window: how many of the last queries are looked at.
        margin: factor on the largest norm.

    Returns:
        The radius, to be passed as ``query_radius``.

    Raises:
        ValueError: shapes that do not fit, a window below 1, a margin that is not positive and finite.
        TypeError: queries that are not floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention import query_radius
        >>> round(float(query_radius(jnp.ones((8, 4)))), 3)  # norm 2, times the root of the scale 1/2, and a tenth more
        1.556
    """
    check_number("margin", margin)
    check_positive("margin", margin)
    check_rows("q", q, "[T, D]")
    q, *_ = head_inputs(q[-check_count("window", window) :], q[:1], q[:1], scale=scale, kv_mask=None)
    return jnp.asarray(margin, q.dtype) * jnp.sqrt(jnp.max(squared_norm(q)))


def running_coreset(
    head_dim: int,
    key: Array | None = None,
    *,
    coreset_size: int = 256,
    algorithm: str | Algorithm = "kmeans_nystrom",
    query_radius: float | Array | None = None,
    streaming: Literal["fold", "counter"] = "fold",
    sinks: int = 4,
    max_length: int = 65536,
) -> RunningSummary:
    """The coreset of a growing prefix.

    Folding merges every further block into the clusters so far, with any algorithm. Nystrom weights could be solved
    for again, because they are linear in (mass * value, mass) and only the choice of landmarks needs masses without a
    sign; this is not implemented. The counter applies the algorithm: of two coresets of one level it makes one of the
    next, as a binary counter carries, so that it holds up to ``coreset_size`` tokens for each of
    ``log2(max_length / coreset_size)`` levels; a prefix that is longer is folded into the last.

    Args:
        head_dim: the number D of channels of queries and keys.
        key: typed PRNG key.
        coreset_size: the number M of tokens, of each level if it is a counter.
        algorithm: of the counter: one whose masses are not negative.
        query_radius: of the counter, as in `coreset`.
        streaming: ``"fold"`` or ``"counter"``.
        sinks: how many of the first real tokens are kept exactly, beside the coreset.
        max_length: the length that the counter's levels are made for.

    Returns:
        The `RunningSummary`.

    Raises:
        ValueError: an unknown algorithm, counts below 1, no key, an algorithm or a radius that folding does not follow.
    """
    head_dim, coreset_size = check_counts(head_dim=head_dim, coreset_size=coreset_size)
    sinks = check_count("sinks", sinks, least=0)
    max_length = check_count("max_length", max_length)
    check_choice("streaming", streaming, ("fold", "counter"))
    chosen = _algorithm(algorithm)
    drawn = check_key("coreset", key)
    if query_radius is not None:
        check_not_negative("query_radius", query_radius)
    if streaming == "fold":
        merges = [ALGORITHMS[name] for name in ("kmeans_nystrom", "kmeans_merge")]
        if chosen not in merges or query_radius is not None:
            raise ValueError(
                "streaming='fold' merges clusters whatever the queries: leave algorithm and query_radius at their "
                f"defaults, or use streaming='counter'; got {shown(algorithm)} and {shown(query_radius)}"
            )
        return _after_sinks(sinks, _folding(drawn, coreset_size))
    levels = max(1, (-(-max_length // coreset_size) - 1).bit_length() + 1)
    reduce = _Reduce(coreset_size, algorithm, query_radius, levels)
    return _after_sinks(sinks, RunningSummary(reduce.init, lambda *args: reduce.append(drawn, *args), reduce.read))


class _Sunk(NamedTuple):
    """The first real tokens, of mass 0 until they have come, and the summary of those after them."""

    first: WeightedKV
    rest: Any


def _after_sinks(sinks: int, running: RunningSummary) -> RunningSummary:
    if sinks == 0:
        return running

    def init(head_dim: int, value_dim: int, dtype: Any) -> _Sunk:
        return _Sunk(WeightedKV.empty(sinks, head_dim, value_dim, dtype), running.init(head_dim, value_dim, dtype))

    def append(held: _Sunk, start: Array, k: Array, v: Array, kv_mask: Array) -> _Sunk:
        number = jnp.sum(held.first.mass > 0) + jnp.cumsum(kv_mask) - 1
        is_first = kv_mask & (number < sinks)
        place = jnp.where(is_first, number, sinks)
        tokens = WeightedKV.of_tokens(k, v, kv_mask)
        first = jax.tree.map(lambda room, x: room.at[place].set(x, mode="drop"), held.first, tokens)
        return _Sunk(first, running.append(held.rest, start, k, v, kv_mask & ~is_first))

    return RunningSummary(init, append, read=lambda held: merge(held.first, running.read(held.rest)))


def _folding(key: Array, coreset_size: int) -> RunningSummary:
    def init(head_dim: int, value_dim: int, dtype: Any) -> WeightedKV:
        return WeightedKV.empty(coreset_size, head_dim, value_dim, dtype)

    def append(held: WeightedKV, start: Array, k: Array, v: Array, kv_mask: Array) -> WeightedKV:
        tokens = merge(held, WeightedKV.of_tokens(k, v, kv_mask))
        middle, centred = _centred(tokens)
        places = spread_places(centred, coreset_size, jax.random.fold_in(key, start))
        clusters = k_means(centred, places, steps=2)
        return dataclasses.replace(clusters, k=clusters.k + middle[None, :])

    return RunningSummary(init, append, read=lambda held: held)


class _Levels(NamedTuple):
    """Coresets ``[levels, M, ...]`` of ever more tokens, the empty ones without mass, and the one being filled."""

    levels: WeightedKV
    filling: WeightedKV
    filled: Array


@dataclasses.dataclass(frozen=True)
class _Reduce:
    """Merge and reduce, as a binary counter counts."""

    coreset_size: int
    algorithm: str | Algorithm
    query_radius: float | Array | None
    levels: int

    def init(self, head_dim: int, value_dim: int, dtype: Any) -> _Levels:
        room = WeightedKV.empty(self.coreset_size, head_dim, value_dim, dtype)
        levels = jax.tree.map(lambda x: jnp.zeros((self.levels, *x.shape), x.dtype), room)
        return _Levels(levels, room, jnp.zeros((), jnp.int32))

    def append(self, key: Array, held: _Levels, start: Array, k: Array, v: Array, kv_mask: Array) -> _Levels:
        block = WeightedKV.of_tokens(k, v, kv_mask)
        size, length = self.coreset_size, k.shape[0]
        key = jax.random.fold_in(key, start)
        if length > size:
            block, length = self._compress(block, key), size
        # The block joins those that are being filled; when it no longer fits, these are carried over first.
        full = held.filled + length > size
        levels = lax.cond(full, lambda: self._carry(held.levels, held.filling, key), lambda: held.levels)
        at = jnp.where(full, 0, held.filled)

        def put(room: Array, x: Array) -> Array:
            return lax.dynamic_update_slice_in_dim(jnp.where(full, 0, room), x, at, 0)

        return _Levels(levels, jax.tree.map(put, held.filling, block), at + length)

    def _carry(self, levels: WeightedKV, carried: WeightedKV, key: Array) -> WeightedKV:
        def occupied(number: Array) -> Array:
            return jnp.any(levels.mass[number] > 0)

        def step(state: tuple[Array, WeightedKV, WeightedKV]) -> tuple[Array, WeightedKV, WeightedKV]:
            number, levels, carried = state
            both = merge(jax.tree.map(lambda x: x[number], levels), carried)
            carried = self._compress(both, jax.random.fold_in(key, number))
            levels = jax.tree.map(lambda x: x.at[number].set(0), levels)
            return number + 1, levels, carried

        last = self.levels - 1
        number, levels, carried = lax.fori_loop(
            0,
            self.levels,
            lambda _, state: lax.cond((state[0] <= last) & occupied(state[0]), step, lambda s: s, state),
            (jnp.zeros((), jnp.int32), levels, carried),
        )
        number = jnp.minimum(number, last)
        return jax.tree.map(lambda x, new: x.at[number].set(new), levels, carried)

    def read(self, held: _Levels) -> WeightedKV:
        return merge(out_of_blocks(held.levels), held.filling)

    def _compress(self, tokens: WeightedKV, key: Array) -> WeightedKV:
        options: Any = {"algorithm": self.algorithm, "query_radius": self.query_radius}
        small = compress(tokens, key, coreset_size=self.coreset_size, **options)
        if small.value_range is not None:
            raise ValueError(
                f"algorithm {self.algorithm!r} makes signed masses, which a counter does not support; "
                "use one that does not, such as 'halving', 'stratified' or 'kmeans_merge'"
            )
        missing = self.coreset_size - small.mass.shape[0]
        return jax.tree.map(lambda x: pad_rows(x, missing), small)


def _centred(tokens: WeightedKV) -> tuple[Array, WeightedKV]:
    """The mean key, and the tokens without it: no answer changes, and exponents stay small."""
    total = jnp.sum(tokens.mass)
    middle = tokens.mass @ tokens.k / jnp.where(total > 0, total, 1)
    k = jnp.where(tokens.mass[:, None] > 0, tokens.k - middle[None, :], 0)
    return middle, dataclasses.replace(tokens, k=k)


def _algorithm(algorithm: str | Algorithm) -> Algorithm:
    if isinstance(algorithm, str):
        if algorithm not in ALGORITHMS:
            raise ValueError(unknown("algorithm", algorithm, ALGORITHMS))
        return ALGORITHMS[algorithm]
    if not callable(algorithm):
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, or a function, got {shown(algorithm)}")
    if type(algorithm).__hash__ is None:
        raise ValueError(f"algorithm must be hashable, as functions and frozen dataclasses are, got {shown(algorithm)}")
    return algorithm
