"""Coresets of weighted tokens by any algorithm."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from approx_attention.core import (
    WeightedKV,
    accumulation_dtype,
    check_count,
    check_key,
    check_not_negative,
    check_number,
    check_positive,
    check_rows,
    head_inputs,
    require_scaled_space,
    shown,
    squared_norm,
    unknown,
)
from approx_attention.coresets.algorithms import ALGORITHMS, Algorithm
from approx_attention.coresets.masses import with_fitted_masses
from approx_attention.coresets.sampling import rescaled


def compress(
    tokens: WeightedKV,
    key: Array | None = None,
    *,
    coreset_size: int = 256,
    algorithm: str | Algorithm = "guarded",
    query_radius: float | Array | None = None,
    queries: Float[Array, "T D"] | None = None,
) -> WeightedKV:
    """Make a coreset of tokens with masses, such as two merged coresets.

    Args:
        tokens: a `WeightedKV` without negative masses; if it carries a scale, so does the result.
        key: typed PRNG key.
        coreset_size: the number M of tokens; M or fewer tokens are returned unchanged.
        algorithm: as in `coreset`.
        query_radius: the largest norm of a query in scaled space, by default that of the centred keys.
        queries: a few queries in scaled space that are similar to later ones; used by ``"guarded"`` only.

    Returns:
        A `WeightedKV` of at most M tokens.

    Raises:
        TypeError: not a `WeightedKV`.
        ValueError: an unknown algorithm, a count below 1, signed masses, no key.

    Example:
        >>> import jax
        >>> from approx_attention import WeightedKV, merge
        >>> from approx_attention.coresets import compress
        >>> k, v = (jax.random.normal(jax.random.key(i), (64, 4)) for i in range(2))
        >>> halves = (WeightedKV.of_tokens(k[part], v[part]) for part in (slice(0, 32), slice(32, 64)))
        >>> first, second = (compress(half, jax.random.key(2), coreset_size=8, algorithm="uniform") for half in halves)
        >>> both = compress(merge(first, second), jax.random.key(3), coreset_size=8, algorithm="uniform")
        >>> both.k.shape, float(both.mass.sum())
        ((8, 4), 64.0)
    """
    if not isinstance(tokens, WeightedKV):
        raise TypeError(f"compress needs a WeightedKV, got {type(tokens).__name__}")
    coreset_size = check_count("coreset_size", coreset_size)
    chosen = algorithm_of(algorithm)
    query_radius = _checked_radius(query_radius)
    if queries is not None:
        check_rows("queries", queries, "[T, D]")
        if queries.shape[1] != tokens.k.shape[1]:
            raise ValueError(f"queries must be [T, D] with D = {tokens.k.shape[1]}, got shape {queries.shape}")
        queries = queries.astype(accumulation_dtype(queries))
    if tokens.value_range is not None:
        raise ValueError("tokens with signed masses are not supported; compress the original tokens")
    drawn = check_key("coreset", key)
    if coreset_size >= tokens.mass.shape[0]:
        return tokens
    small = _compressed(chosen, coreset_size, tokens.in_scaled_space(), query_radius, queries, drawn)
    return dataclasses.replace(small, scale=tokens.scale)


def refitted(tokens: WeightedKV, held: WeightedKV, *, query_radius: float | Array | None = None) -> WeightedKV:
    """Refit the masses of kept tokens to all tokens, as in `FittedMasses`.

    Args:
        tokens: a `WeightedKV` in scaled space, without negative masses.
        held: the kept tokens, a subset of ``tokens``. Before the comparison their masses are scaled to the total mass.
        query_radius: as in `compress`.

    Returns:
        The kept keys and values with new masses.

    Raises:
        TypeError: not a `WeightedKV`, a radius that is not one number.
        ValueError: summaries that carry a scale or have signed masses, a radius that is negative or not finite.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from approx_attention import WeightedKV
        >>> from approx_attention.coresets import refitted
        >>> k = jnp.array([[0.0], [0.0], [1.0]])  # one of two equal tokens is kept
        >>> tokens, held = (WeightedKV.of_tokens(x, x) for x in (k, k[1:]))
        >>> refitted(tokens, held).mass.round(2).tolist()
        [2.0, 1.0]
    """
    for x in (tokens, held):
        if not isinstance(x, WeightedKV):
            raise TypeError(f"refitted needs a WeightedKV, got {type(x).__name__}")
        require_scaled_space("refitted", x)
    return _refitted(tokens, held, _checked_radius(query_radius))


def _checked_radius(query_radius: float | Array | None) -> float | Array | None:
    if query_radius is None:
        return None
    check_number("query_radius", query_radius)
    check_not_negative("query_radius", query_radius)
    # A Python integer may exceed int32.
    return float(query_radius) if isinstance(query_radius, int) else query_radius


@jax.jit
def _refitted(tokens: WeightedKV, held: WeightedKV, query_radius: float | Array | None) -> WeightedKV:
    middle, centred = centred_tokens(tokens)
    held = rescaled(held, tokens)
    moved = dataclasses.replace(held, k=jnp.where(held.mass[:, None] > 0, held.k - middle[None, :], 0))
    # Any key serves for probes, so that heuristics need none.
    fitted = with_fitted_masses(centred, moved, ratio_of_radii(centred, query_radius), jax.random.key(0))
    return dataclasses.replace(fitted, k=held.k)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compressed(
    algorithm: Algorithm,
    size: int,
    tokens: WeightedKV,
    query_radius: float | Array | None,
    queries: Array | None,
    key: Array,
) -> WeightedKV:
    """A coreset by an algorithm, compiled as one program; otherwise a call would dispatch hundreds of operations."""
    dtype = accumulation_dtype(tokens.k, tokens.value_sum)
    middle, centred = centred_tokens(jax.tree.map(lambda x: x.astype(dtype), tokens))
    known = {"queries": queries} if queries is not None and getattr(algorithm, "reads_queries", False) else {}
    small = algorithm(centred, size, ratio_of_radii(centred, query_radius), key, **known)
    return dataclasses.replace(small, k=small.k + middle[None, :])


def ratio_of_radii(centred: WeightedKV, query_radius: float | Array | None) -> Array:
    """The radius of the queries over that of the keys, without gradient.

    Args:
        centred: tokens with centred keys.
        query_radius: the largest norm of later queries in scaled space; None if it is unknown.

    Returns:
        One number; 1 if the radius is unknown. If all keys are 0 it is the radius of the queries.
    """
    radius = lax.stop_gradient(jnp.sqrt(jnp.max(squared_norm(centred.k))))
    if query_radius is None:
        return jnp.ones_like(radius)
    return lax.stop_gradient(jnp.asarray(query_radius, radius.dtype)) / jnp.where(radius > 0, radius, 1)


def query_radius(
    q: Float[Array, "T D"], *, scale: float | Array | None = None, window: int = 32, margin: float = 1.1
) -> Float[Array, ""]:
    """Estimate the largest norm of later queries in scaled space, by that of recent queries times a margin.

    Args:
        q: queries ``[T, D]``.
        scale: factor of the logits, ``1/sqrt(D)`` by default.
        window: the number of recent queries.
        margin: factor of the largest norm.

    Returns:
        The radius, for the argument ``query_radius``.

    Raises:
        ValueError: shapes that do not match, a window below 1, a margin that is not positive and finite.
        TypeError: queries that are not floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> from approx_attention.coresets import query_radius
        >>> round(float(query_radius(jnp.ones((8, 4)))), 3)  # norm 2, times the root of the scale 1/2, times 1.1
        1.556
    """
    check_number("margin", margin)
    check_positive("margin", margin)
    check_rows("q", q, "[T, D]")
    q, *_ = head_inputs(q[-check_count("window", window) :], q[:1], q[:1], scale=scale, kv_mask=None)
    return jnp.asarray(margin, q.dtype) * jnp.sqrt(jnp.max(squared_norm(q)))


def centred_tokens(tokens: WeightedKV) -> tuple[Array, WeightedKV]:
    """The mean key, and tokens with centred keys: softmax is invariant to the shift, and exponents stay small."""
    total = jnp.sum(tokens.mass)
    present = tokens.mass[:, None] > 0  # the key of an absent token may hold anything
    middle = tokens.mass @ jnp.where(present, tokens.k, 0) / jnp.where(total > 0, total, 1)
    k = jnp.where(present, tokens.k - middle[None, :], 0)
    return middle, dataclasses.replace(tokens, k=k)


def algorithm_of(algorithm: str | Algorithm) -> Algorithm:
    """The algorithm with this name, or a hashable function unchanged.

    Args:
        algorithm: a name in `ALGORITHMS`, or a function with the arguments of every algorithm.

    Raises:
        ValueError: an unknown name, not a function, or a function without a hash.
    """
    if isinstance(algorithm, str):
        if algorithm not in ALGORITHMS:
            raise ValueError(unknown("algorithm", algorithm, ALGORITHMS))
        return ALGORITHMS[algorithm]
    if not callable(algorithm):
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, or a function, got {shown(algorithm)}")
    if type(algorithm).__hash__ is None:
        raise ValueError(f"algorithm must be hashable (a function or frozen dataclass), got {shown(algorithm)}")
    return algorithm
