"""KV-cache compression: a prefilled cache in a budget of tokens, by coresets or by the heuristics they compete with."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jaxtyping import Bool, Float

from approx_attention.core import (
    HIDDEN,
    RunningSummary,
    WeightedKV,
    check_count,
    check_counts,
    check_flag,
    check_floating,
    check_key,
    check_length,
    check_not_negative,
    check_number,
    floating_dtype,
    head_inputs,
    in_blocks,
    logit_scale,
    merge,
    pad_rows,
    require_scaled_space,
    scaled_queries,
    shown,
    squared_norm,
    unknown,
)
from approx_attention.coresets import ALGORITHMS, Algorithm, compress, running_coreset
from approx_attention.decoding.decoder import Cache

# What SnapKV looks at: the attention of so many last queries, averaged over so many neighbouring keys.
SNAP_QUERIES, SNAP_POOL = 32, 5


def compress_tokens(
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    key: Array | None = None,
    *,
    budget: int,
    size: int | Array | None = None,
    policy: str | Algorithm = "kmeans_nystrom",
    queries: Float[Array, "T D"] | None = None,
    sinks: int = 4,
    recent: int = 32,
    mass_correction: bool = True,
    query_radius: float | Array | None = None,
    kv_mask: Bool[Array, " S"] | None = None,
    scale: float | Array | None = None,
) -> WeightedKV:
    """The keys and values of one head in a budget of tokens: the first and the last exactly, the others compressed.

    A coreset stands for all tokens. A heuristic keeps those with the greatest score and forgets the others, whose mass
    is then missing; with ``mass_correction`` the kept ones between the first and the last share it equally. Shared key
    heads are compressed once, not once per query head.

    Args:
        k: keys ``[S, D]`` as they are attended to, positions included.
        v: values ``[S, Dv]``.
        key: typed PRNG key; heuristics need none.
        budget: how many tokens are kept in all; with ``budget >= S`` and no ``size`` nothing is lost.
        size: heuristics only: how many of them this head may use, from 0 to ``budget`` (cut to that where it is
            traced), where heads share a budget (`shared_sizes`); the room that it leaves is empty. The first and the
            last tokens are kept in any case.
        policy: an algorithm of `approx_attention.coresets`, or a heuristic: ``"streaming_llm"`` (the last tokens),
            ``"knorm"`` (small keys), ``"keydiff"`` (keys unlike the mean key), ``"h2o"`` (attention received from all
            queries), ``"snapkv"`` (from the last 32, averaged over 5 keys) or ``"tova"`` (from the last).
        queries: the queries of the last T positions ``[T, D]``, for the last three, and as an estimate of the radius.
        sinks: how many of the first tokens are kept exactly.
        recent: how many of the last tokens are kept exactly.
        mass_correction: heuristics only: the kept stand for the forgotten too.
        query_radius: as in `coreset`, in scaled space.
        kv_mask: true where a key is real ``[S]``; sinks and recent tokens are the first and last real ones, and queries
            of all S positions are real where their keys are.
        scale: factor of the logits, ``1/sqrt(D)`` by default.

    Returns:
        A `WeightedKV` of ``budget`` tokens (or S, if that is less), which carries the scale: `attend` takes queries as
        they are. ``in_scaled_space()`` makes of it one for queries of `fold_scale`.

    Raises:
        ValueError: a budget below ``sinks + recent + 1``, an unknown policy, queries that are needed and not given or
            more than keys, a size for a policy that is no heuristic or out of range, a radius that is negative or not
            finite, no key for an algorithm.
        TypeError: tensors that are not floating point, counts that are no integers.

    Example:
        >>> import jax
        >>> from approx_attention import attend, compress_tokens, exact
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (256, 8)) for i in range(3))
        >>> small = compress_tokens(k, v, jax.random.key(3), budget=64)
        >>> out = attend(q, small).out
        >>> bool(abs(out - exact(q, k, v)).max() < 0.5)
        True

    Reference:
        The algorithms: as in `coreset`. The heuristics: ``"streaming_llm"`` :cite:p:`xiao2023sinks`;
        ``"knorm"`` :cite:p:`devoto2024simple`; ``"keydiff"`` :cite:p:`park2025keydiff`; ``"h2o"``
        :cite:p:`zhang2023h2o`; ``"snapkv"`` :cite:p:`li2024snapkv`; ``"tova"`` :cite:p:`oren2024tova`.
    """
    _check_policy(policy, size)
    for name, x in (("k", k), ("v", v)):
        check_floating(name, x)
    if queries is not None:
        _check_queries(queries, k)
    scale = logit_scale(scale, k.shape[-1])
    asked, k, v = head_inputs(k[:1] if queries is None else queries, k, v, scale=scale, kv_mask=kv_mask)
    small = _in_budget(
        WeightedKV.of_tokens(k, v, kv_mask),
        None if queries is None else asked,
        key,
        real=kv_mask,
        budget=budget,
        size=size,
        policy=policy,
        sinks=sinks,
        recent=recent,
        mass_correction=mass_correction,
        query_radius=query_radius,
    )
    return dataclasses.replace(small, scale=jnp.asarray(scale, k.dtype))


def _check_queries(queries: Any, k: Array) -> None:
    check_floating("queries", queries)
    if queries.ndim != 2 or queries.shape[1:] != k.shape[1:] or not 0 < queries.shape[0] <= k.shape[0]:
        raise ValueError(
            f"queries must be [T, D] = [1 to {k.shape[0]}, {k.shape[-1]}], those of the last keys; got shape "
            f"{queries.shape}"
        )


def _check_policy(policy: str | Algorithm, size: int | Array | None) -> None:
    if isinstance(policy, str) and policy in HEURISTICS:
        return
    if isinstance(policy, str) and policy not in ALGORITHMS:
        raise ValueError(unknown("policy", policy, [*ALGORITHMS, *HEURISTICS]))
    if not isinstance(policy, str) and not callable(policy):
        raise ValueError(
            f"policy must be one of {', '.join([*ALGORITHMS, *HEURISTICS])}, or an algorithm, got {shown(policy)}"
        )
    if size is not None:
        raise ValueError(
            f"size is for heuristics, which drop what they rank last: {', '.join(HEURISTICS)}; got policy "
            f"{shown(policy)}"
        )


def _in_budget(
    tokens: WeightedKV,
    queries: Array | None,
    key: Array | None,
    *,
    real: Array | None,
    budget: int,
    size: int | Array | None,
    policy: str | Algorithm,
    sinks: int,
    recent: int,
    mass_correction: bool,
    query_radius: float | Array | None,
) -> WeightedKV:
    """`compress_tokens` of tokens in scaled space with masses of their own, where not ``real`` of mass 0."""
    num_keys, budget = tokens.mass.shape[0], check_count("budget", budget)
    sinks, recent = check_count("sinks", sinks, least=0), check_count("recent", recent, least=0)
    mass_correction = check_flag("mass_correction", mass_correction)
    if size is not None:
        check_length("size", size, budget)
    if query_radius is not None:
        check_not_negative("query_radius", query_radius)
    budget = min(budget, num_keys)
    if budget == num_keys and (size is None or num_keys <= sinks + recent):
        return tokens
    start = jnp.zeros((), jnp.int32)
    if real is not None:
        # Padding first, so that the last tokens are real.
        order = jnp.argsort(real, stable=True)
        tokens, start = jax.tree.map(lambda x: x[order], tokens), num_keys - jnp.sum(real, dtype=jnp.int32)
        if queries is not None and queries.shape[0] == num_keys:
            queries = jnp.where(real[:, None], queries, 0)[order]
    middle = budget - sinks - recent
    if middle < 1:
        raise ValueError(f"budget must be more than sinks + recent = {sinks + recent}, got {budget}")
    end = num_keys - recent
    # Where there are few real tokens, the first may be among the last.
    first_place = start + jnp.arange(sinks, dtype=jnp.int32)
    is_first = jnp.zeros(num_keys, bool).at[first_place].set(True)
    first, last = _at(tokens, jnp.minimum(first_place, end - 1), first_place < end), _at(tokens, slice(end, None))
    between = _at(tokens, slice(0, end), ~is_first[:end]) if real is not None else _at(tokens, slice(sinks, end))
    if isinstance(policy, str) and policy in HEURISTICS:
        heuristic = HEURISTICS[policy]
        if heuristic.needs_queries and queries is None:
            raise ValueError(f"policy {policy!r} scores keys by the attention of queries: pass queries")
        score = heuristic.score(tokens, tokens.k[:1] if queries is None else queries)[end - between.mass.shape[0] : end]
        score = jnp.where(between.mass > 0, lax.stop_gradient(score), HIDDEN)
        kept = _kept_at(between, lax.top_k(score, middle)[1], size if size is None else size - sinks - recent)
        if mass_correction:
            kept = _with_mass_of(between, kept)
    else:
        if query_radius is None and queries is not None:
            query_radius = 1.1 * jnp.sqrt(jnp.max(squared_norm(queries[-SNAP_QUERIES:])))
        kept = compress(between, key, coreset_size=middle, algorithm=policy, query_radius=query_radius)
    return merge(merge(first, last), kept)


def _at(tokens: WeightedKV, place: Array | slice, present: Array | None = None) -> WeightedKV:
    k, value_sum, mass = tokens.k[place], tokens.value_sum[place], tokens.mass[place]
    if present is not None:
        value_sum, mass = jnp.where(present[:, None], value_sum, 0), jnp.where(present, mass, 0)
    return WeightedKV(k, value_sum, mass)


def _kept_at(tokens: WeightedKV, ranked: Array, size: int | Array | None) -> WeightedKV:
    if size is None:
        return jax.tree.map(lambda x: x[ranked], tokens)
    return _at(tokens, ranked, jnp.arange(ranked.shape[0], dtype=jnp.int32) < size)


def _with_mass_of(tokens: WeightedKV, kept: WeightedKV) -> WeightedKV:
    held = jnp.sum(kept.mass)
    factor = jnp.sum(tokens.mass) / jnp.where(held > 0, held, 1)
    return dataclasses.replace(kept, value_sum=kept.value_sum * factor, mass=kept.mass * factor)


# Heuristics: the score of each key, from (tokens [S], queries [T, D] of the last T positions).


def attention_received(tokens: WeightedKV, queries: Array) -> Array:
    r"""The attention weights that every key gets from causal queries at the last positions, summed.

    .. math:: \mathrm{received}_j = \sum_{t \ge j} \frac{m_j e^{q_t \cdot k_j}}{\sum_{i \le t} m_i e^{q_t \cdot k_i}}

    Args:
        tokens: S tokens, the hidden ones of mass 0.
        queries: the queries of the last T positions ``[T, D]``, in the space of the keys that the tokens were made from
            (scaled space, unless they carry a scale).

    Returns:
        Sums ``[S]``, which add up to the number of queries that see a key.

    Raises:
        TypeError: what is no `WeightedKV`, queries that are not floating point.
        ValueError: queries that are not ``[T, D]`` with at most S rows.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention import WeightedKV
        >>> from approx_attention.decoding import attention_received
        >>> tokens = WeightedKV.of_tokens(jnp.zeros((4, 2)), jnp.zeros((4, 1)))
        >>> attention_received(tokens, jnp.ones((2, 2))).round(2).tolist()  # a third of one, a quarter of the other
        [0.58, 0.58, 0.58, 0.25]

    Reference:
        :cite:p:`zhang2023h2o`; of a window of the last queries: :cite:p:`li2024snapkv`.
    """
    if not isinstance(tokens, WeightedKV):
        raise TypeError(f"attention_received takes a WeightedKV, got {type(tokens).__name__}")
    _check_queries(queries, tokens.k)
    num_keys, num_queries = tokens.k.shape[0], queries.shape[0]
    number = jnp.arange(num_keys, dtype=jnp.int32)
    position = jnp.arange(num_queries, dtype=jnp.int32) + (num_keys - num_queries)
    queries = scaled_queries(queries.astype(tokens.k.dtype), tokens)

    def of_block(rows: tuple[Array, Array]) -> Array:
        q, place = rows
        seen = (number[None, :] <= place[:, None]) & (tokens.mass > 0)[None, :]
        logits = q @ tokens.k.T + tokens.log_mass[None, :]
        return jnp.where(seen, jax.nn.softmax(jnp.where(seen, logits, HIDDEN), axis=-1), 0)

    block = min(num_queries, max(1, 2**22 // num_keys))
    # What fills the last block stands before the first token, and sees none.
    rows = in_blocks(queries, block), in_blocks(position + 1, block) - 1
    none = jnp.zeros(num_keys, tokens.k.dtype)
    return lax.scan(lambda total, rows: (total + jnp.sum(of_block(rows), axis=0), None), none, rows)[0]


def _recency(tokens: WeightedKV, queries: Array) -> Array:
    return jnp.arange(tokens.k.shape[0]).astype(tokens.k.dtype)


def _small_norm(tokens: WeightedKV, queries: Array) -> Array:
    return -squared_norm(tokens.k)[:, 0]


def _unlike_the_mean(tokens: WeightedKV, queries: Array) -> Array:
    norm = jnp.sqrt(squared_norm(tokens.k))
    unit = tokens.k / jnp.where(norm > 0, norm, 1)
    return -(unit @ (tokens.mass @ unit))


def _snap(tokens: WeightedKV, queries: Array) -> Array:
    received = attention_received(tokens, queries[-SNAP_QUERIES:])
    return jnp.convolve(received, jnp.full((SNAP_POOL,), 1 / SNAP_POOL, received.dtype), mode="same")


@dataclasses.dataclass(frozen=True)
class Heuristic:
    """A score of keys, and whether it looks at queries."""

    score: Callable[[WeightedKV, Array], Array]
    needs_queries: bool = False


HEURISTICS: Mapping[str, Heuristic] = {
    "streaming_llm": Heuristic(_recency),
    "knorm": Heuristic(_small_norm),
    "keydiff": Heuristic(_unlike_the_mean),
    "h2o": Heuristic(attention_received, True),
    "snapkv": Heuristic(_snap, True),
    "tova": Heuristic(lambda tokens, queries: attention_received(tokens, queries[-1:]), True),
}


# many heads and layers


def token_budget(num_bytes: int, head_dim: int, value_dim: int, *, dtype: Any = jnp.float32) -> int:
    """How many weighted tokens of one head fit into so many bytes.

    Args:
        num_bytes: the bytes.
        head_dim: channels D of keys.
        value_dim: channels Dv of values.
        dtype: of the tokens.

    Returns:
        The number of tokens, each of which takes D + Dv numbers and its mass.

    Raises:
        ValueError: not even one does, or counts below 1.
        TypeError: counts that are no integers, a dtype that is not floating point.

    Example:
        >>> from approx_attention.decoding import token_budget
        >>> token_budget(2**20, 64, 64)  # 129 numbers of 4 bytes each
        2032
    """
    head_dim = check_count("head_dim", head_dim)
    value_dim = check_count("value_dim", value_dim)
    num_bytes = check_count("num_bytes", num_bytes, most=None)
    per_token = (head_dim + value_dim + 1) * floating_dtype("dtype", dtype).itemsize
    if num_bytes < per_token:
        raise ValueError(f"a weighted token takes {per_token} bytes, more than the budget of {num_bytes}")
    return num_bytes // per_token


def pyramid_budgets(num_layers: int, budget: int, *, steepness: float = 20.0, least: int = 40) -> list[int]:
    r"""Budgets that fall linearly from the first layer to the last and are ``budget`` on average.

    .. math:: b_l = b_0 + (b_{L-1} - b_0) \frac{l}{L - 1}, \qquad b_{L-1} = b / \beta, \quad b_0 = 2 b - b_{L-1}

    Args:
        num_layers: layers.
        budget: mean tokens per layer.
        steepness: :math:`\beta`, the mean over the last layer's budget.
        least: no layer gets fewer, unless the mean is less; the default has room for sinks and recent tokens.

    Returns:
        One budget per layer, in tokens; their sum is ``num_layers * budget`` up to rounding.

    Raises:
        ValueError: counts or a steepness below 1, a least budget below 0.

    Example:
        >>> from approx_attention.decoding import pyramid_budgets
        >>> pyramid_budgets(5, 100)
        [160, 130, 100, 70, 40]

    Reference:
        :cite:p:`cai2024pyramidkv`.
    """
    least = check_count("least", least, least=0)
    num_layers = check_count("num_layers", num_layers)
    budget = check_count("budget", budget)
    check_number("steepness", steepness)
    if not 1 <= steepness < math.inf:
        raise ValueError(f"steepness must be at least 1 and finite, got {steepness}")
    last = min(budget, max(least, round(budget / steepness)))
    first = 2 * budget - last
    if num_layers == 1:
        return [budget]
    return [round(first + (last - first) * layer / (num_layers - 1)) for layer in range(num_layers)]


def shared_sizes(scores: Float[Array, "H S"], budget: int, *, least: int = 0, most: int | None = None) -> Array:
    """How many keys each head keeps if all heads together keep ``H * budget`` with the greatest scores.

    Args:
        scores: of the keys of every head ``[H, S]``, comparable between heads, such as shares of attention; where they
            are traced, NaN counts as the least.
        budget: mean tokens per head.
        least: no head gets fewer, such as the sinks, the recent tokens and one more of `compress_tokens`.
        most: no head gets more, by default twice the mean; nor, of course, more than it has.

    Returns:
        Sizes ``[H]``, int32; their sum is at most ``H * budget``.

    Raises:
        ValueError: a budget that is not between ``least`` and ``most``, scores that are not ``[H, S]`` or NaN.
        TypeError: scores that are not floating point.

    Example:
        >>> import functools, jax
        >>> from approx_attention import WeightedKV, compress_tokens, fold_scale
        >>> from approx_attention.decoding import attention_received, shared_sizes
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (2, 256, 8)) for i in range(3))
        >>> scaled_q, scaled_k = fold_scale(q[:, -32:], k)
        >>> score = jax.vmap(lambda k, v, q: attention_received(WeightedKV.of_tokens(k, v), q))
        >>> sizes = shared_sizes(score(scaled_k, v, scaled_q), 64, least=37)
        >>> compress = functools.partial(compress_tokens, budget=128, policy="h2o")
        >>> small = jax.vmap(lambda k, v, q, size: compress(k, v, queries=q, size=size))(k, v, q, sizes)
        >>> bool(((small.mass > 0).sum(1) == sizes).all())
        True

    Reference:
        :cite:p:`feng2024adakv`.
    """
    check_floating("scores", scores)
    if scores.ndim != 2 or 0 in scores.shape:
        raise ValueError(f"scores must be [H, S] of at least one head and key, got shape {scores.shape}")
    if not isinstance(scores, Tracer) and np.isnan(np.asarray(scores)).any():
        raise ValueError(f"scores must be numbers, got {np.isnan(np.asarray(scores)).sum()} NaN")
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    num_heads, num_keys = scores.shape
    budget = check_count("budget", budget)
    least = check_count("least", least, least=0)
    most = 2 * budget if most is None else check_count("most", most)
    if not least <= budget <= most:
        raise ValueError(f"budget must be from least = {least} to most = {most} tokens per head, got {budget}")
    least, budget, most = (min(count, num_keys) for count in (least, budget, most))
    total = num_heads * (budget - least)
    # The first of every head are settled; all compete for the rest.
    best = lax.top_k(scores, most)[0][:, least:]
    chosen = lax.top_k(best.reshape(-1), total)[1]
    return least + jax.ops.segment_sum(jnp.ones_like(chosen), chosen // max(1, most - least), num_heads)


# continuing to decode


class Compressed(NamedTuple):
    """A prefix that was compressed once, and the fold of what has come since."""

    fixed: WeightedKV
    since: WeightedKV


def running_compressed(
    head_dim: int, key: Array | None = None, *, budget: int, coreset_size: int = 256
) -> RunningSummary:
    """A fixed prefix of ``budget`` tokens, as `compress_cache` leaves it, and a folded coreset of all that follows.

    Args:
        head_dim: the number D of channels of queries and keys.
        key: typed PRNG key.
        budget: tokens of the compressed prefix.
        coreset_size: tokens that stand for what follows it, but for the last two blocks.

    Returns:
        The `RunningSummary`, for a `Decoder`.

    Raises:
        ValueError: counts below 1, no key.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention.decoding import running_compressed
        >>> running = running_compressed(4, jax.random.key(0), budget=16, coreset_size=8)
        >>> running.read(running.init(4, jnp.float32)).mass.shape
        (24,)
    """
    head_dim, budget = check_counts(head_dim=head_dim, budget=budget)
    folding = running_coreset(head_dim, check_key("running_compressed", key), coreset_size=coreset_size, sinks=0)

    def init(value_dim: int, dtype: Any) -> Compressed:
        empty = WeightedKV.empty(budget, head_dim, value_dim, dtype)
        fixed = dataclasses.replace(empty, value_range=empty.values_from_to)
        return Compressed(fixed, folding.init(value_dim, dtype))

    def append(held: Compressed, start: Array, k: Array, v: Array, kv_mask: Array) -> Compressed:
        return held._replace(since=folding.append(held.since, start, k, v, kv_mask))

    return RunningSummary(init, append, read=lambda held: merge(held.fixed, held.since))


def compress_cache(
    cache: Cache,
    key: Array | None = None,
    *,
    budget: int,
    size: int | Array | None = None,
    coreset_size: int = 256,
    policy: str | Algorithm = "kmeans_nystrom",
    queries: Float[Array, "T D"] | None = None,
    sinks: int = 4,
    mass_correction: bool = True,
    query_radius: float | Array | None = None,
) -> Cache:
    """The cache of an exact `Decoder` with its older tokens in a budget; its last one or two blocks stay exact.

    The result is a cache of ``Decoder(running=running_compressed(D, key, budget=budget, coreset_size=coreset_size))``,
    which goes on from there.

    Tokens count by their masses. So a cache can be compressed whose tokens stand for several already
    (``running_coreset`` without sinks, ``running_block_linformer``); sinks, and policies that look at places, then take
    them in the order in which they are held.

    Args:
        cache: of a decoder with ``running_exact``, or with another that holds tokens whose masses are not negative.
        key: typed PRNG key.
        budget: tokens for all that is older than the exact blocks; `token_budget` says how many fit into some bytes.
        size: how many of them this head may use, as in `compress_tokens`.
        coreset_size: as in `running_compressed`.
        policy: as in `compress_tokens`.
        queries: the last queries, in scaled space, for the policies that look at them.
        sinks: how many of the first tokens are kept exactly.
        mass_correction: as in `compress_tokens`.
        query_radius: as in `coreset`.

    Returns:
        The compressed cache.

    Raises:
        TypeError: a cache that does not hold tokens, or holds signed masses.
        ValueError: as in `compress_tokens`, counts below 1, a cache whose tokens carry a scale.

    Example:
        >>> import jax
        >>> from approx_attention import Decoder, compress_cache
        >>> from approx_attention.decoding import running_compressed
        >>> from approx_attention.methods import running_exact
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (100, 4)) for i in range(3))
        >>> sizes, key = dict(head_dim=4, value_dim=4, block_size=10), jax.random.key(3)
        >>> decoder = Decoder(running=running_exact(4, max_length=100), **sizes)
        >>> _, cache = decoder.prefill(decoder.init(), q, k, v)
        >>> cache = compress_cache(cache, key, budget=16, coreset_size=8)
        >>> decoder = Decoder(running=running_compressed(4, key, budget=16, coreset_size=8), **sizes)
        >>> cache = decoder.append(cache, k[:1], v[:1])
        >>> decoder.attend(cache, q[:1]).shape, int(cache.length)
        ((1, 4), 101)

    Reference:
        As in `compress_tokens`.
    """
    _check_policy(policy, size)
    budget, coreset_size = check_count("budget", budget), check_count("coreset_size", coreset_size)
    if not isinstance(cache, Cache):
        raise TypeError(f"compress_cache takes the Cache of a Decoder, got {type(cache).__name__}")
    prefix = require_scaled_space("compress_cache", cache.past.prefix)
    if not isinstance(prefix, WeightedKV) or prefix.value_range is not None:
        given = "tokens of signed masses" if isinstance(prefix, WeightedKV) else type(prefix).__name__
        raise TypeError(f"compress_cache takes the cache of a decoder with running_exact, got {given}")
    if queries is not None:
        _check_queries(queries, prefix.k)
        queries = head_inputs(queries, prefix.k, prefix.value_sum, scale=1.0)[0]
    small = _in_budget(
        prefix,
        queries,
        key,
        real=prefix.mass > 0,
        budget=budget,
        size=size,
        policy=policy,
        sinks=sinks,
        recent=0,
        mass_correction=mass_correction,
        query_radius=query_radius,
    )
    missing = budget - small.mass.shape[0]
    k, value_sum, mass = (pad_rows(x, missing) for x in (small.k, small.value_sum, small.mass))
    fixed = WeightedKV(k, value_sum, mass, small.values_from_to)
    empty = WeightedKV.empty(coreset_size, prefix.k.shape[1], prefix.value_sum.shape[1], prefix.k.dtype)
    return cache._replace(past=cache.past._replace(prefix=Compressed(fixed, empty)))
