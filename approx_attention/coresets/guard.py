"""The best of several coresets of the same tokens, by their errors on probe queries."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from approx_attention.core import WeightedKV, attend, in_float32, squared_norm
from approx_attention.coresets.clustering import random_places
from approx_attention.coresets.halving import NORMALIZER_SHARE, value_unit

# Number of probes of each kind; together they cost as much as 192 exact outputs.
PROBES = 64


@in_float32()  # errors are differences of nearly equal outputs
def best_of(
    candidates: Sequence[WeightedKV],
    tokens: WeightedKV,
    ratio: Array,
    key: Array,
    *,
    queries: Array | None = None,
    doubts: Sequence[float] | None = None,
) -> WeightedKV:
    r"""Choose the candidate with the smallest maximal error on probes, which are queries of the largest norm.

    .. math:: \|\mathrm{out}'(q) - \mathrm{out}(q)\|^2 + c\, \overline{\|v\|^2}\, (Z'(q) / Z(q) - 1)^2

    The normaliser Z has the same weight as in the kernel of halving; it decides the share of a coreset when merged with
    exact tokens. No bound is known for Nystrom weights: with few landmarks for the radius of the queries they can be
    far worse than a merge, whose outputs are averages of values. The best landmarks also depend on the data.

    Args:
        candidates: coresets of one size.
        tokens: the original tokens with centred keys; masses may be signed.
        ratio: the radius of the queries over that of the keys.
        key: typed PRNG key of the probes.
        queries: known queries ``[T, D]`` in place of the probes.
        doubts: a factor of the error of each candidate, 1 by default.

    Returns:
        One of the candidates, with a range of the values if any candidate has one. The choice has no gradient.
    """
    held, compared = lax.stop_gradient((tokens, list(candidates)))
    if queries is None:
        q, asked = _probes(held, ratio, key)
    else:
        q, asked = lax.stop_gradient(queries), jnp.ones(queries.shape[0], bool)
    truth = attend(q, held)
    unit = NORMALIZER_SHARE * value_unit(dataclasses.replace(held, mass=jnp.abs(held.mass))) ** 2

    def largest_error(candidate: WeightedKV) -> Array:
        state = attend(q, candidate)
        # A normaliser that is not positive has the logarithm -inf, and its error is all of Z.
        of_normalizer = jnp.expm1(jnp.where(asked, state.lse - truth.lse, 0))
        square = jnp.sum((state.out - truth.out) ** 2, axis=1) + unit * of_normalizer**2
        return jnp.max(square, where=asked, initial=0)

    errors = jnp.stack([largest_error(x) for x in compared])
    weighted = errors * jnp.square(jnp.asarray(doubts or [1.0] * len(compared), errors.dtype))
    # NaN compares as false, so that a failed solution loses.
    best = jnp.argmin(jnp.where(weighted >= 0, weighted, jnp.inf))
    if any(x.value_range is not None for x in candidates):
        # All candidates get the range that signed masses need, so that they have one structure.
        candidates = [dataclasses.replace(x, value_range=tokens.values_from_to) for x in candidates]
    return jax.tree.map(lambda *x: jnp.stack(x)[best], *candidates)


def _probes(tokens: WeightedKV, ratio: Array, key: Array) -> tuple[Array, Array]:
    """Directions with large errors: along and against keys, random ones and the longest, and random directions.

    Along a key that key has the most weight, against it all other keys have. A coreset may miss the longest keys.
    """
    key_places, key_directions = jax.random.split(key)
    mass, size = jnp.abs(tokens.mass), squared_norm(tokens.k)[:, 0]
    count = min(PROBES, mass.shape[0])
    places = jnp.concatenate(
        [random_places(mass, count, key_places), lax.top_k(jnp.where(mass > 0, size, -1), count)[1]]
    )
    # Repeated cyclically within each kind, whose number may depend on padding.
    side = jnp.tile(jnp.where(jnp.arange(count) % 2 == 0, 1, -1), 2)[:, None]
    others = jax.random.normal(key_directions, (PROBES, tokens.k.shape[1]), tokens.k.dtype)
    directions = jnp.concatenate([side * tokens.k[places], others])
    norm = jnp.sqrt(squared_norm(directions))
    radius = ratio * jnp.sqrt(jnp.max(size))
    asked = jnp.concatenate([mass[places] > 0, jnp.ones(PROBES, bool)])
    return radius * directions / jnp.where(norm > 0, norm, 1), asked
