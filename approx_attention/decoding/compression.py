"""KV-cache compression to a token budget, by coresets, eviction heuristics or attention matching."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float

from approx_attention.core import (
    HIDDEN,
    QuantizedKV,
    RunningSummary,
    WeightedKV,
    check_bits,
    check_count,
    check_counts,
    check_floating,
    check_key,
    check_length,
    check_not_negative,
    head_inputs,
    logit_scale,
    merge,
    pad_rows,
    quantize,
    require_scaled_space,
    shown,
    squared_norm,
    unknown,
)
from approx_attention.coresets import ALGORITHMS, Algorithm, compress, refitted, rescaled, running_coreset
from approx_attention.decoding.budgets import token_budget
from approx_attention.decoding.decoder import Cache
from approx_attention.decoding.heuristics import HEURISTICS, SNAP_QUERIES, Heuristic, Queries, check_queries
from approx_attention.decoding.matching import MATCHING, AttentionMatching


class _Budget(NamedTuple):
    """A token budget: the total, the number that heuristics may use, and the numbers of sinks and recent tokens."""

    budget: int
    size: int | Array | None
    sinks: int
    recent: int

    def checked(self) -> Self:
        """The budget as ints. Raises for counts that are out of range."""
        budget, sinks = check_count("budget", self.budget), check_count("sinks", self.sinks, least=0)
        recent = check_count("recent", self.recent, least=0)
        if self.size is not None:
            check_length("size", self.size, budget)
        return type(self)(budget, self.size, sinks, recent)


def compress_tokens(
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    budget: int | None = None,
    num_bytes: int | None = None,
    size: int | Array | None = None,
    policy: str | Algorithm | AttentionMatching = "guarded",
    queries: Float[Array, "T *G D"] | None = None,
    sinks: int = 4,
    recent: int = 32,
    mass_correction: bool | Literal["fitted"] = True,
    query_radius: float | Array | None = None,
    kv_mask: Bool[Array, " S"] | None = None,
    scale: float | Array | None = None,
) -> WeightedKV:
    """Compress the keys and values of one head to a token budget; the first and last tokens stay exact.

    - A coreset represents all tokens.
    - A heuristic keeps the tokens with the largest scores and evicts the others, whose mass is lost. With
      ``mass_correction`` the kept tokens between the first and the last get this mass.
    - Attention matching keeps tokens like a heuristic, and solves for masses and values that preserve the outputs of
      given queries.

    Shared key heads are compressed once, not once per query head.

    Args:
        k: keys ``[S, D]`` as used by attention, with rotary positions applied.
        v: values ``[S, Dv]``.
        key: typed PRNG key; not needed for heuristics.
        budget: the total number of kept tokens; with ``budget >= S`` and no ``size`` nothing is lost.
        num_bytes: bytes of the kept tokens (`token_budget`), instead of ``budget``; they include the range of the
            values, which some policies store.
        size: the number of tokens of this head if heads share a budget (`shared_sizes`), from 0 to ``budget``; for
            heuristics and attention matching only. A traced size is clipped to this range. The remaining rows have no
            mass. The first and the last tokens are always kept.
        policy: an algorithm of `approx_attention.coresets`; ``"attention_matching"`` (an `AttentionMatching` of the
            last 512 queries); or a heuristic, which scores keys by

            - ``"streaming_llm"``: position, keeping the last tokens,
            - ``"knorm"``: small norms,
            - ``"keydiff"``: distance from the mean key,
            - ``"h2o"``: attention received from all queries,
            - ``"snapkv"``: attention received from the last 32 queries, averaged over 5 keys,
            - ``"tova"``: attention received from the last query,
            - ``"expected_attention"``: attention received from Gaussian queries with the mean and covariance of the
              given ones, times the norm of the value,
            - ``"kvzip"``: the largest attention received from a query of a second pass, in which the model repeats its
              context.
        queries: the queries of the last T positions ``[T, D]``, or ``[T, G, D]`` for all G query heads that share the
            keys, in the form used by attention. The last five heuristics and matching need them. They should resemble
            later queries. Every policy estimates the radius of later queries from them, and ``"guarded"`` measures
            errors on the last 32. For ``"kvzip"`` they are the queries of the second pass, after all keys, in any
            number. With rotary positions, the Gaussian of ``"expected_attention"`` is that of rotated queries; the
            authors average the rotation over later positions, for which you can pass queries rotated to them.
        sinks: the number of initial tokens that are kept exactly.
        recent: the number of last tokens that are kept exactly.
        mass_correction: for heuristics only: give the mass of evicted tokens to the kept ones, in proportion to their
            masses; with ``"fitted"``, give kept tokens the masses that fit all tokens best (`FittedMasses`).
        query_radius: as in `coreset`, in scaled space.
        kv_mask: true where a key is real ``[S]``. Sinks and recent tokens are the first and last real ones. Queries of
            all S positions are real where their keys are; fewer queries, and those of a second pass, are all real.
        scale: factor of the logits, ``1/sqrt(D)`` by default.

    Returns:
        A `WeightedKV` of ``min(budget, S)`` tokens that carries the scale, so `attend` takes unscaled queries. Call
        ``in_scaled_space()`` for queries of `fold_scale`, and `quantize` to store it in 8 or 4 bits.

    Raises:
        ValueError: a budget below ``sinks + recent + 1``, both a budget and a number of bytes, an unknown policy,
            missing queries or more queries than keys, a size for an algorithm or out of range, a negative or infinite
            radius, no PRNG key for an algorithm.
        TypeError: tensors that are not floating point, counts that are not integers.

    Example:
        >>> import functools, jax
        >>> from approx_attention import attend, compress_tokens, exact
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (256, 8)) for i in range(3))
        >>> small = jax.jit(functools.partial(compress_tokens, budget=64))(k, v, jax.random.key(3))
        >>> out = attend(q, small).out
        >>> bool(abs(out - exact(q, k, v)).max() < 0.5)
        True

    Reference:
        The algorithms: as in `coreset`. The heuristics: ``"streaming_llm"`` :cite:p:`xiao2023sinks`;
        ``"knorm"`` :cite:p:`devoto2024simple`; ``"keydiff"`` :cite:p:`park2025keydiff`; ``"h2o"``
        :cite:p:`zhang2023h2o`; ``"snapkv"`` :cite:p:`li2024snapkv`; ``"tova"`` :cite:p:`oren2024tova`;
        ``"expected_attention"`` :cite:p:`devoto2025expected`; ``"kvzip"`` :cite:p:`kim2025kvzip`.
        ``"attention_matching"``: :cite:p:`zweiger2026matching`.
    """
    _check_policy(policy, size)
    for name, x in (("k", k), ("v", v)):
        check_floating(name, x)
    scale = logit_scale(scale, k.shape[-1])
    if queries is not None:
        check_queries(queries, k, None if _come_later(policy) else k.shape[0])
    rows = k[:1] if queries is None else queries.reshape(-1, queries.shape[-1])
    rows, k, v = head_inputs(rows, k, v, scale=scale, kv_mask=kv_mask)
    budget = tokens_in(budget, num_bytes, k, v)
    small = _in_budget(
        WeightedKV.of_tokens(k, v, kv_mask),
        None if queries is None else _asked(rows.reshape(queries.shape), k, policy, kv_mask),
        key,
        limits=_Budget(budget, size, sinks, recent),
        real=kv_mask,
        policy=policy,
        mass_correction=mass_correction,
        query_radius=query_radius,
    )
    return dataclasses.replace(small, scale=jnp.asarray(scale, k.dtype))


def _check_policy(policy: Any, size: int | Array | None) -> None:
    if _ranking(policy) is not None:
        return
    known = [*ALGORITHMS, *HEURISTICS, *MATCHING]
    if isinstance(policy, str) and policy not in ALGORITHMS:
        raise ValueError(unknown("policy", policy, known))
    if not isinstance(policy, str) and not callable(policy):
        raise ValueError(f"policy must be one of {', '.join(known)}, or an algorithm, got {shown(policy)}")
    if size is not None:
        raise ValueError(
            f"size is only supported by policies that rank keys: {', '.join([*HEURISTICS, *MATCHING])}; got policy "
            f"{shown(policy)}"
        )


def _ranking(policy: Any) -> Heuristic | AttentionMatching | None:
    """The ranking of a policy that keeps the best keys; None for an algorithm."""
    if isinstance(policy, str):
        return HEURISTICS.get(policy) or MATCHING.get(policy)
    return policy if isinstance(policy, AttentionMatching) else None


def _come_later(policy: Any) -> bool:
    """Whether the queries of a policy come after all keys, in any number."""
    ranking = _ranking(policy)
    return ranking is not None and ranking.later


def _asked(queries: Array, k: Array, policy: Any, real: Array | None) -> Queries:
    """The queries, with the numbers of keys that they see after padding has moved to the front."""
    num_keys = k.shape[0]
    if _come_later(policy):
        return Queries.later(queries, num_keys)
    asked = Queries.last(queries, num_keys)
    if real is None or queries.shape[0] != num_keys:
        return asked
    # Queries of all positions move with their keys; fewer queries are those of the last real keys.
    order = jnp.argsort(real, stable=True)
    rows = jnp.where(real[:, None, None], asked.rows, 0)[order]
    return Queries(rows, jnp.where(real[order], asked.seen, 0))


def _asked_after(cache: Cache, queries: Array, policy: Any) -> Queries:
    """The last queries of a cache; the tokens of its exact blocks come after the compressed ones."""
    prefix = cache.past.prefix
    num_keys = prefix.k.shape[0]
    if _come_later(policy):
        return Queries.later(queries, num_keys)
    near = jnp.sum(cache.past.before.kv_mask, dtype=jnp.int32) + jnp.sum(cache.current.kv_mask, dtype=jnp.int32)
    asked = Queries.last(queries, num_keys, after=near)
    # Real keys are moved to the end; rows before the first real key are not queries.
    first = num_keys - jnp.sum(prefix.mass > 0, dtype=jnp.int32)
    return Queries(asked.rows, jnp.where(asked.seen > first, asked.seen, 0))


def tokens_in(budget: int | None, num_bytes: int | None, k: Array, v: Array, bits: int | None = None) -> int:
    """The budget in tokens, given either as their number or as bytes.

    Args:
        budget: the number of tokens, or None.
        num_bytes: the number of bytes, or None. The range of the values is stored too and takes part of them.
        k: keys ``[S, D]``, of which shape and dtype count.
        v: values ``[S, Dv]``, likewise.
        bits: bits per channel of quantised tokens; None for full precision.

    Returns:
        The number of tokens; a given ``budget`` is not checked.

    Raises:
        ValueError: both or neither are given, or the bytes do not suffice for a token.
        TypeError: bytes that are not an integer.
    """
    if (budget is None) == (num_bytes is None):
        given = "neither" if budget is None else f"budget={shown(budget)} and num_bytes={shown(num_bytes)}"
        raise ValueError(f"pass either budget or num_bytes, got {given}")
    if num_bytes is None:
        assert budget is not None
        return budget
    dtype = jnp.promote_types(k.dtype, v.dtype)
    num_bytes = check_count("num_bytes", num_bytes, most=None)
    # The range of the values, needed for signed masses, is stored too.
    rest = max(1, num_bytes - 2 * v.shape[1] * dtype.itemsize)
    return token_budget(rest, k.shape[1], v.shape[1], dtype=dtype, bits=bits)


def _in_budget(
    tokens: WeightedKV,
    queries: Queries | None,
    key: Array | None,
    *,
    limits: _Budget,
    real: Array | None,
    policy: str | Algorithm | AttentionMatching,
    mass_correction: bool | Literal["fitted"],
    query_radius: float | Array | None,
) -> WeightedKV:
    """`compress_tokens` for weighted tokens in scaled space; tokens that are not ``real`` have mass 0."""
    budget, size, sinks, recent = limits.checked()
    num_keys, mass_correction = tokens.mass.shape[0], _checked_correction(mass_correction)
    if query_radius is not None:
        check_not_negative("query_radius", query_radius)
    budget = min(budget, num_keys)
    if budget == num_keys and (size is None or num_keys <= sinks + recent):
        return tokens
    start = jnp.zeros((), jnp.int32)
    if real is not None:
        # Padding moves to the front, so that the last tokens are real.
        order = jnp.argsort(real, stable=True)
        tokens, start = jax.tree.map(lambda x: x[order], tokens), num_keys - jnp.sum(real, dtype=jnp.int32)
    middle = budget - sinks - recent
    if middle < 1:
        raise ValueError(f"budget must be more than sinks + recent = {sinks + recent}, got {budget}")
    end = num_keys - recent
    # With few real tokens, the first ones may be among the last; they count once, as recent ones.
    first_place = start + jnp.arange(sinks, dtype=jnp.int32)
    is_first = jnp.zeros(num_keys, bool).at[first_place].set(True)
    first, last = _at(tokens, jnp.minimum(first_place, end - 1), first_place < end), _at(tokens, slice(end, None))
    between = _at(tokens, slice(0, end), ~is_first[:end]) if real is not None else _at(tokens, slice(sinks, end))
    fixed = merge(first, last)
    ranking = _ranking(policy)
    if ranking is None:
        assert not isinstance(policy, AttentionMatching)
        if query_radius is None and queries is not None:
            query_radius = _later_radius(queries)
        known = None if queries is None else queries.recent(SNAP_QUERIES).flat[0]
        options: Any = {"algorithm": policy, "query_radius": query_radius, "queries": known}
        kept = compress(between, key, coreset_size=middle, **options)
        return merge(fixed, kept)
    if ranking.needs_queries and queries is None:
        raise ValueError(f"policy {shown(policy)} scores keys by the attention of queries; pass queries")
    # All tokens are scored, including sinks and recent ones, because attention weights are shares over all tokens.
    score = ranking.score(tokens, Queries.last(tokens.k[:1], num_keys) if queries is None else queries)
    # A ranking has no derivative; tokens without mass rank last, after those with score -inf.
    score = jnp.maximum(lax.stop_gradient(score)[end - between.mass.shape[0] : end], HIDDEN)
    score = jnp.where(between.mass > 0, score, -jnp.inf)
    kept = _kept_at(between, lax.top_k(score, middle)[1], size if size is None else size - sinks - recent)
    if isinstance(ranking, AttentionMatching):
        assert queries is not None
        kept = ranking.fitted(between, fixed, kept, queries)
    elif mass_correction == "fitted":
        if query_radius is None and queries is not None:
            query_radius = _later_radius(queries)
        kept = refitted(between, kept, query_radius=query_radius)
    elif mass_correction:
        kept = rescaled(kept, between)
    return merge(fixed, kept)


def _checked_correction(mass_correction: Any) -> bool | Literal["fitted"]:
    if isinstance(mass_correction, str) and mass_correction == "fitted":
        return "fitted"
    if not isinstance(mass_correction, bool | np.bool_):
        raise TypeError(
            f"mass_correction must be True, False or 'fitted', known when tracing, got {shown(mass_correction)}"
        )
    return bool(mass_correction)


def _later_radius(queries: Queries) -> Array:
    """As `coresets.query_radius`: 1.1 times the largest norm of a recent query, because later ones are unknown."""
    return 1.1 * jnp.sqrt(jnp.max(squared_norm(queries.recent(SNAP_QUERIES).rows)))


def _at(tokens: WeightedKV, place: Array | slice, present: Array | None = None) -> WeightedKV:
    """The tokens at the given places; tokens that are not ``present`` get mass 0."""
    k, value_sum, mass = tokens.k[place], tokens.value_sum[place], tokens.mass[place]
    if present is not None:
        value_sum, mass = jnp.where(present[:, None], value_sum, 0), jnp.where(present, mass, 0)
    return WeightedKV(k, value_sum, mass)


def _kept_at(tokens: WeightedKV, ranked: Array, size: int | Array | None) -> WeightedKV:
    """The tokens at ``ranked`` places, the best first; with a size, further tokens get mass 0 at static shapes."""
    if size is None:
        return jax.tree.map(lambda x: x[ranked], tokens)
    return _at(tokens, ranked, jnp.arange(ranked.shape[0], dtype=jnp.int32) < size)


def _rounding(bits: int | None) -> Callable[[WeightedKV], Any]:
    """The function that quantises the tokens of a compressed prefix."""
    return (lambda tokens: tokens) if bits is None else functools.partial(quantize, bits=check_bits("bits", bits))


class Compressed(NamedTuple):
    """A prefix that was compressed once, and a coreset of later tokens.

    Attributes:
        fixed: the tokens of the compressed prefix, possibly quantised.
        since: the folded coreset of all later tokens.
    """

    fixed: WeightedKV | QuantizedKV
    since: WeightedKV


def running_compressed(
    head_dim: int, key: Array | None = None, *, budget: int, coreset_size: int = 256, bits: int | None = None
) -> RunningSummary:
    """The running summary of a compressed prefix (`compress_cache`) and a folded coreset of all later tokens.

    Args:
        head_dim: the number D of channels of queries and keys.
        key: typed PRNG key.
        budget: number of tokens of the compressed prefix.
        coreset_size: number of tokens of the coreset of later tokens, except the last two blocks, which stay exact.
        bits: 8 or 4 bits per channel of the compressed prefix. The coreset is not quantised: it changes at every block,
            and rounding errors would add up.

    Returns:
        The `RunningSummary`, for a `Decoder`.

    Raises:
        ValueError: counts below 1, other bits, no key.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention.decoding import running_compressed
        >>> running = running_compressed(4, jax.random.key(0), budget=16, coreset_size=8)
        >>> jax.eval_shape(lambda: running.read(running.init(4, jnp.float32)).mass).shape
        (24,)
    """
    head_dim, budget = check_counts(head_dim=head_dim, budget=budget)
    narrow = _rounding(bits)
    folding = running_coreset(head_dim, check_key("running_compressed", key), coreset_size=coreset_size, sinks=0)

    def init(value_dim: int, dtype: Any) -> Compressed:
        empty = WeightedKV.empty(budget, head_dim, value_dim, dtype)
        # With a range from the start: `compress_cache` may make signed masses, and all states of a cache must have one
        # structure.
        fixed = dataclasses.replace(empty, value_range=empty.values_from_to)
        return Compressed(narrow(fixed), folding.init(value_dim, dtype))

    def append(held: Compressed, start: Array, k: Array, v: Array, kv_mask: Array) -> Compressed:
        return held._replace(since=folding.append(held.since, start, k, v, kv_mask))

    def read(held: Compressed) -> WeightedKV:
        fixed = held.fixed.dequantized() if isinstance(held.fixed, QuantizedKV) else held.fixed
        return merge(fixed, held.since)

    return RunningSummary(init, append, read)


def compress_cache(
    cache: Cache,
    key: Array | None = None,
    *,
    budget: int | None = None,
    num_bytes: int | None = None,
    size: int | Array | None = None,
    coreset_size: int = 256,
    policy: str | Algorithm | AttentionMatching = "guarded",
    queries: Float[Array, "T *G D"] | None = None,
    sinks: int = 4,
    mass_correction: bool | Literal["fitted"] = True,
    query_radius: float | Array | None = None,
    bits: int | None = None,
) -> Cache:
    """Compress the older tokens of an exact `Decoder`'s cache; its last one or two blocks stay exact.

    The result is a cache for ``Decoder(running=running_compressed(D, key, budget=budget, coreset_size=coreset_size))``,
    with the same ``bits``, if any.

    Tokens are weighted by their masses, so the tokens of the cache may already represent several tokens
    (``running_coreset`` without sinks, ``running_block_linformer``). Sinks, and policies that use positions, then
    follow the order of the cache.

    Args:
        cache: cache of a decoder with ``running_exact``, or with another summary of tokens without negative masses.
        key: typed PRNG key.
        budget: number of tokens for everything older than the exact blocks.
        num_bytes: bytes of these tokens instead of ``budget``, as in `compress_tokens`; the next decoder then needs
            the budget that `token_budget` returns.
        size: the number of tokens of this head, as in `compress_tokens`.
        coreset_size: as in `running_compressed`.
        policy: as in `compress_tokens`.
        queries: the last queries in scaled space, including those of the exact blocks, for policies that need them.
        sinks: the number of initial tokens that are kept exactly.
        mass_correction: as in `compress_tokens`.
        query_radius: as in `coreset`.
        bits: 8 or 4 bits per channel of the compressed tokens (`quantize`); ``dtype`` of the cache by default.

    Returns:
        The compressed cache.

    Raises:
        TypeError: a cache without tokens, or with signed masses.
        ValueError: as in `compress_tokens`, counts below 1, a cache whose tokens carry a scale.

    Example:
        >>> import functools, jax
        >>> from approx_attention import Decoder, compress_cache
        >>> from approx_attention.decoding import running_compressed
        >>> from approx_attention.methods import running_exact
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (100, 4)) for i in range(3))
        >>> sizes, key = dict(head_dim=4, value_dim=4, block_size=10), jax.random.key(3)
        >>> decoder = Decoder(running=running_exact(4, max_length=100), **sizes)
        >>> _, cache = jax.jit(decoder.prefill)(decoder.init(), q, k, v)
        >>> cache = jax.jit(functools.partial(compress_cache, budget=16, coreset_size=8))(cache, key)
        >>> decoder = Decoder(running=running_compressed(4, key, budget=16, coreset_size=8), **sizes)
        >>> cache = jax.jit(decoder.append)(cache, k[:1], v[:1])
        >>> jax.jit(decoder.attend)(cache, q[:1]).shape, int(cache.length)
        ((1, 4), 101)

    Reference:
        As in `compress_tokens`.
    """
    _check_policy(policy, size)
    narrow = _rounding(bits)
    coreset_size = check_count("coreset_size", coreset_size)
    if not isinstance(cache, Cache):
        raise TypeError(f"compress_cache needs the Cache of a Decoder, got {type(cache).__name__}")
    prefix = require_scaled_space("compress_cache", cache.past.prefix)
    if not isinstance(prefix, WeightedKV) or prefix.value_range is not None:
        given = "tokens of signed masses" if isinstance(prefix, WeightedKV) else type(prefix).__name__
        raise TypeError(f"compress_cache needs the cache of a decoder with running_exact, got {given}")
    budget = check_count("budget", tokens_in(budget, num_bytes, prefix.k, prefix.value_sum, bits))
    if queries is not None:
        check_queries(queries, prefix.k, None)
        queries = queries.astype(prefix.k.dtype)
    small = _in_budget(
        prefix,
        None if queries is None else _asked_after(cache, queries, policy),
        key,
        limits=_Budget(budget, size, sinks, 0),
        real=prefix.mass > 0,
        policy=policy,
        mass_correction=mass_correction,
        query_radius=query_radius,
    )
    missing = budget - small.mass.shape[0]
    k, value_sum, mass = (pad_rows(x, missing) for x in (small.k, small.value_sum, small.mass))
    fixed = narrow(WeightedKV(k, value_sum, mass, small.values_from_to))
    empty = WeightedKV.empty(coreset_size, prefix.k.shape[1], prefix.value_sum.shape[1], prefix.k.dtype)
    return cache._replace(past=cache.past._replace(prefix=Compressed(fixed, empty)))
