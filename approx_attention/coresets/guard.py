"""The best of several coresets of the same tokens, by their errors on queries that probe them."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from approx_attention.core import WeightedKV, attend, squared_norm
from approx_attention.coresets.clustering import random_places

# Probes of each kind: together they cost as much as 192 exact outputs.
PROBES = 64


def best_of(
    candidates: Sequence[WeightedKV],
    tokens: WeightedKV,
    ratio: Array,
    key: Array,
    *,
    queries: Array | None = None,
    doubts: Sequence[float] | None = None,
) -> WeightedKV:
    r"""The candidate with the least largest error on probes, which are queries on the sphere of the largest norm.

    No bound is known for weights that were solved for: where landmarks are few for the radius of the queries they can
    be far worse than a merge, whose outputs are averages of values. And which landmarks are best depends on the data.

    Args:
        candidates: coresets of one size.
        tokens: what they stand for, with centred keys; masses may be signed.
        ratio: the radius of the queries over that of the keys.
        key: typed PRNG key of the probes.
        queries: queries ``[T, D]`` that are known, asked too.
        doubts: a factor on the error of each candidate, 1 by default.

    Returns:
        One of the candidates, with the range of the values where one of them has it. The choice has no gradient.
    """
    held, compared = lax.stop_gradient((tokens, list(candidates)))
    q, asked = _probes(held, ratio, key)
    if queries is not None:
        q = jnp.concatenate([q, lax.stop_gradient(queries)])
        asked = jnp.concatenate([asked, jnp.ones(queries.shape[0], bool)])
    truth = attend(q, held).out
    errors = [jnp.max(jnp.sum((attend(q, x).out - truth) ** 2, axis=1), where=asked, initial=0) for x in compared]
    weighted = jnp.stack(errors) * jnp.square(jnp.asarray(doubts or [1.0] * len(errors), truth.dtype))
    # NaN compares as false, so that a failed solution loses.
    best = jnp.argmin(jnp.where(weighted >= 0, weighted, jnp.inf))
    if any(x.value_range is not None for x in candidates):
        # One structure: all of them get the range that signed masses need.
        candidates = [dataclasses.replace(x, value_range=tokens.values_from_to) for x in candidates]
    return jax.tree.map(lambda *x: jnp.stack(x)[best], *candidates)


def _probes(tokens: WeightedKV, ratio: Array, key: Array) -> tuple[Array, Array]:
    """Directions in which errors are large: along keys and against them, those at random and the longest, and others.

    Along a key it matters most, and against it all others do. The longest keys are those that a coreset may miss.
    """
    key_places, key_directions = jax.random.split(key)
    mass, size = jnp.abs(tokens.mass), squared_norm(tokens.k)[:, 0]
    count = min(PROBES, mass.shape[0])
    places = jnp.concatenate(
        [random_places(mass, count, key_places), lax.top_k(jnp.where(mass > 0, size, -1), count)[1]]
    )
    side = jnp.where(jnp.arange(2 * count) % 2 == 0, 1, -1)[:, None]
    others = jax.random.normal(key_directions, (PROBES, tokens.k.shape[1]), tokens.k.dtype)
    directions = jnp.concatenate([side * tokens.k[places], others])
    norm = jnp.sqrt(squared_norm(directions))
    radius = ratio * jnp.sqrt(jnp.max(size))
    asked = jnp.concatenate([mass[places] > 0, jnp.ones(PROBES, bool)])
    return radius * directions / jnp.where(norm > 0, norm, 1), asked
