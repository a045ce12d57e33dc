"""Keys in buckets by the signs of random projections, and the keys that a query meets there."""

from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import Array, lax

from approx_attention.core import check_count, check_floating, check_key, count_real, draw_of_size

# All buckets of every round have an entry in a table, and there should not be many more of them than keys.
MOST_HASHES = 24


class Planes(NamedTuple):
    """The random directions whose signs assign queries and keys to buckets.

    Attributes:
        directions: ``[N, b, D]``, for b signs in each of N rounds.
        used: the number of signs per round that are used, or None for all of them.
    """

    directions: Array
    used: Array | None

    @classmethod
    def of(
        cls,
        method: str,
        key: Array | None,
        k: Array,
        per_bucket: int,
        *,
        num_rounds: Any,
        num_hashes: Any,
        projection: Array | None,
        kv_mask: Array | None,
    ) -> Self:
        """The given projection, or by default a random one with buckets of ``per_bucket`` keys on average.

        Args:
            method: the name of the method in error messages.
            key: typed PRNG key; not needed with a projection.
            k: keys ``[S, D]``.
            per_bucket: the largest number of keys of a bucket that a query sees.
            num_rounds: the number N of rounds.
            num_hashes: the number b of signs; None for the smallest number with which buckets have at most
                ``per_bucket`` real keys on average.
            projection: the directions ``[N, b, D]``, or None.
            kv_mask: true where a key is real ``[S]``.

        Raises:
            ValueError: a projection of another shape, a bad count, more than 24 signs, neither key nor projection.
            TypeError: a projection that is not floating point.
        """
        (num_keys, head_dim), used = k.shape, None
        num_rounds = check_count("num_rounds", num_rounds)
        if num_hashes is not None:
            num_hashes = check_count("num_hashes", num_hashes, least=0)
        if projection is not None:
            check_floating("projection", projection)
            if projection.ndim != 3 or projection.shape[2] != head_dim:
                raise ValueError(f"projection must be [N, b, D] with D = {head_dim}, got shape {projection.shape}")
            num_hashes = projection.shape[1]
        elif num_hashes is None:
            # Shapes follow the number of all keys; with padding, only the first signs are used, as many as the real
            # keys alone would have.
            num_hashes = (-(-num_keys // per_bucket) - 1).bit_length()
            if kv_mask is not None:
                buckets = -(-jnp.maximum(count_real(kv_mask), 1) // per_bucket)
                used = jnp.sum(2 ** jnp.arange(num_hashes, dtype=jnp.int32) < buckets, dtype=jnp.int32)
        if num_hashes > MOST_HASHES:
            raise ValueError(f"num_hashes must be at most {MOST_HASHES}, got {num_hashes}: there are 2^b buckets")
        if projection is None:
            shape = num_rounds, num_hashes, head_dim
            projection = jax.random.normal(check_key(method, key), shape, k.dtype)
            # The random numbers that this number of signs would have: padding changes none of them.
            projection = projection if used is None else draw_of_size(projection, used)
        return cls(projection.astype(k.dtype), used)


class Buckets(NamedTuple):
    """Keys ``[S, D]`` sorted by bucket and then by position, for each round.

    Attributes:
        planes: the random directions.
        order: positions of the keys, sorted by bucket ``[N, S]``.
        bounds: the start of each bucket in this order ``[N, 2^b + 1]``.
    """

    planes: Planes
    order: Array
    bounds: Array

    @classmethod
    def of(cls, k: Array, planes: Planes, kv_mask: Array | None) -> Self:
        """Sort the real keys into buckets, without gradient.

        Args:
            k: keys ``[S, D]``.
            planes: the random directions.
            kv_mask: true where a key is real ``[S]``; None if all are.
        """
        directions, k = lax.stop_gradient((planes.directions, k))
        num_hashes = directions.shape[1]
        powers, _ = _powers(planes)

        def sort(directions: Array) -> tuple[Array, Array]:
            bucket = (k @ directions.T > 0).astype(jnp.int32) @ powers
            if kv_mask is not None:
                # Behind all buckets, where no query looks.
                bucket = jnp.where(kv_mask, bucket, 2**num_hashes)
            order = jnp.argsort(bucket, stable=True).astype(jnp.int32)
            every = jnp.arange(2**num_hashes + 1, dtype=jnp.int32)
            return order, jnp.searchsorted(bucket[order], every).astype(jnp.int32)

        return cls(Planes(directions, planes.used), *jax.vmap(sort)(directions))

    def met(self, q: Array, place: Array, count: int, is_causal: bool) -> Array:
        """The keys that queries find in their buckets, and in the buckets behind the nearest plane.

        Args:
            q: queries ``[n, D]``.
            place: positions of the queries ``[n]``.
            count: the largest number of keys that a query takes from a bucket: if causal the last ones up to its
                position, else those around it.
            is_causal: leave out later keys.

        Returns:
            Positions of keys ``[n, 2 N count]``, with possible repetitions; S stands for no key.
        """
        num_keys, num_hashes = self.order.shape[1], self.planes.directions.shape[1]
        powers, is_used = _powers(self.planes)

        def meet(directions: Array, order: Array, bounds: Array) -> Array:
            side = q @ directions.T
            buckets = ((side > 0).astype(jnp.int32) @ powers)[:, None]
            if num_hashes:
                # The neighbour behind the nearest plane, the likeliest bucket of a key that is close but hashed apart.
                margin = jnp.abs(side) if is_used is None else jnp.where(is_used[None, :], jnp.abs(side), jnp.inf)
                unsure = powers[jnp.argmin(margin, axis=1)]
                buckets = jnp.concatenate([buckets, buckets ^ unsure[:, None]], axis=1)
            start, end = bounds[buckets], bounds[buckets + 1]
            after = _first_beyond(order, start, end, place[:, None])
            # Of a crowded bucket the last keys up to the query's place, or those around it, shifted to stay inside.
            if is_causal:
                start, end = jnp.maximum(start, after - count), after
            else:
                start = jnp.clip(after - (count + 1) // 2, start, jnp.maximum(start, end - count))
                end = jnp.minimum(end, start + count)
            number = start[:, :, None] + jnp.arange(count, dtype=jnp.int32)[None, None, :]
            met = jnp.where(number < end[:, :, None], order[jnp.minimum(number, num_keys - 1)], num_keys)
            return met.reshape(q.shape[0], -1)

        return jax.vmap(meet, out_axes=1)(self.planes.directions, self.order, self.bounds).reshape(q.shape[0], -1)


def _powers(planes: Planes) -> tuple[Array, Array | None]:
    """The weight of each sign in the number of a bucket, and the mask of the signs in use."""
    number = jnp.arange(planes.directions.shape[1], dtype=jnp.int32)
    if planes.used is None:
        return 2**number, None
    is_used = number < planes.used
    return jnp.where(is_used, 2**number, 0), is_used


def _first_beyond(order: Array, start: Array, end: Array, bound: Array) -> Array:
    """The first i in [start, end) with ``order[i] > bound``, or end, by bisection; ``order`` rises within a bucket."""
    # `jnp.searchsorted` takes one sorted array, not a part of it per query.

    def halve(_: Array | int, interval: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = interval
        middle = (low + high) // 2
        is_below = (order[jnp.minimum(middle, order.shape[0] - 1)] <= bound) & (low < high)
        return jnp.where(is_below, middle + 1, low), jnp.where(is_below | (low == high), high, middle)

    return lax.fori_loop(0, order.shape[0].bit_length(), halve, (start, end))[0]
