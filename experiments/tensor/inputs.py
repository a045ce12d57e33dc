"""Tensors of third-order attention whose logits are as large as is asked, and errors in the units of what matters."""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from approx_attention.evaluation import output_error, skill


class Tensors(NamedTuple):
    """Queries ``[T, D]`` and two sets of keys and values; the scale is 1."""

    q: Array
    k: tuple[Array, Array]
    v: tuple[Array, Array]

    @property
    def channel_bounds(self) -> Array:
        """The largest magnitude of each channel's term of a logit, ``[D]``."""
        largest = [jnp.max(jnp.abs(x), axis=0) for x in (self.q, *self.k)]
        return largest[0] * largest[1] * largest[2]

    @property
    def largest_logit(self) -> Array:
        """The largest magnitude of a logit, over all pairs of keys."""
        return jnp.max(lax.map(lambda q: jnp.max(jnp.abs((q * self.k[0]) @ self.k[1].T)), self.q))

    @property
    def value_range(self) -> Array:
        """The range of the products of values in each channel, ``[Dv]``."""
        first, second = self.v
        ends = [f(first, axis=0) * g(second, axis=0) for f in (jnp.min, jnp.max) for g in (jnp.min, jnp.max)]
        return jnp.max(jnp.stack(ends), axis=0) - jnp.min(jnp.stack(ends), axis=0)


def clustered(
    key: Array,
    length: int,
    head_dim: int,
    bound: float,
    *,
    clusters: int = 8,
    noise: float = 0.3,
    decay: float = 1.0,
    order: Literal["mixed", "segments"] = "mixed",
    bound_by: Literal["largest", "channels"] = "largest",
    dtype: Any = jnp.float32,
) -> Tensors:
    """Tokens of clusters: a query scores high with pairs of keys both of which are of the query's cluster.

    Independent tensors would be no test: uniform weights answer them to a part in a thousand.

    Args:
        key: typed PRNG key.
        length: the number of queries, and of keys of each set.
        head_dim: the number of channels, of values too.
        bound: the largest logit.
        clusters: how many there are.
        noise: of tokens around the centre of their cluster, whose entries are signs.
        decay: factor from each channel of the queries and keys to the next.
        order: ``mixed``, or each cluster in a separate segment.
        bound_by: whether the bound is that of the largest logit, or of the sum of the largest terms of each channel.
        dtype: float32 or float64.
    """
    keys = jax.random.split(key, 9)
    signs = [jax.random.rademacher(k, (clusters, head_dim), dtype) for k in keys[:2]]
    centres = [signs[0] * signs[1], *signs, *(jax.random.normal(k, (clusters, head_dim), dtype) for k in keys[2:4])]
    member = jnp.arange(length, dtype=jnp.int32) * clusters // length
    if order == "mixed":
        member = jax.random.permutation(keys[4], member)
    around = jax.random.split(keys[5], len(centres))
    parts = [
        centre[member] + noise * jax.random.normal(k, (length, head_dim), dtype)
        for k, centre in zip(around, centres, strict=True)
    ]
    channels = decay ** (jnp.arange(head_dim, dtype=dtype) / 3)
    drawn = Tensors(parts[0] * channels, (parts[1] * channels, parts[2] * channels), (parts[3], parts[4]))
    largest = drawn.largest_logit if bound_by == "largest" else jnp.sum(drawn.channel_bounds)
    # The same for all three factors, whose powers are then of one size.
    factor = (bound / largest) ** (1 / 3)
    return Tensors(factor * drawn.q, (factor * drawn.k[0], factor * drawn.k[1]), drawn.v)


def error_and_skill(out: Array, expected: Array, uniform: Array) -> tuple[float, float]:
    """Norms of the error over those of the exact output, and over those of its difference from uniform weights.

    The second is what an approximation is worth: uniform weights, which look at nothing, have a skill error of 1.
    """
    return float(output_error(out, expected).relative), float(skill(out, expected, uniform))


def small_logits(length: int, head_dim: int, seed: int) -> tuple[Any, Any, Any]:
    """Gaussian queries, and two sets of keys and of values, with small logits."""
    x = jax.random.normal(jax.random.key(seed), (5, length, head_dim)) / math.sqrt(head_dim)
    return x[0], (x[1], x[2]), (x[3], x[4])
