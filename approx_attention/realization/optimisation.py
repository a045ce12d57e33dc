"""Constructions by gradient descent: queries of maximum margin for random keys, and learned keys and queries."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from approx_attention.realization.factors import (
    Factors,
    Sampling,
    interpolate,
    interpolating_queries,
    off_support,
    random_keys,
    support_inverse,
)
from approx_attention.sparse import SparsePattern


def separate(pattern: SparsePattern, log_weights: Array, sampling: Sampling) -> Factors:
    r"""Maximum margin: queries with logits 1 on their supports and the smallest maximum off them, by gradient descent.

    .. math:: \min_N \sum_i \alpha^{-1} \log \sum_{j \notin S_i} e^{\alpha x_i \cdot k_j}, \qquad
              x_i = N_i + K_S^+ (1 - K_S N_i).
    """
    # Initialised with the solution of ``"wls"``; N is free, and the repair keeps the supports exact at every step.
    start = interpolate(pattern, log_weights, sampling, orthogonal=True)
    inverses = jax.vmap(support_inverse, (None, 0, 0))(start.keys, pattern.indices, pattern.valid)
    off = off_support(pattern, sampling.is_causal)

    def queries(free: Array) -> Array:
        return free + _repair(free, start.keys, inverses, pattern)

    def loss(free: Array, sharpness: Array) -> Array:
        logits = jnp.where(off, sharpness * (queries(free) @ start.keys.T), -jnp.inf)
        peaks = jax.nn.logsumexp(logits, axis=1)
        return jnp.sum(jnp.where(jnp.any(off, axis=1), peaks, 0)) / sharpness

    free = _descend(loss, start.separating, sampling.num_steps)
    return start._replace(separating=queries(free))


def _repair(free: Array, keys: Array, inverses: Array, pattern: SparsePattern) -> Array:
    """The shortest correction that brings the logits of queries on their supports to 1."""

    def row(free: Array, inverse: Array, indices: Array, valid: Array) -> Array:
        missing = jnp.where(valid, 1 - keys[indices] @ free, 0)
        return inverse @ missing

    return jax.vmap(row)(free, inverses, pattern.indices, pattern.valid)


def learn(pattern: SparsePattern, log_weights: Array, sampling: Sampling) -> Factors:
    r"""Keys and queries by gradient descent on the largest logit off the supports, with logits 1 on the supports.

    .. math:: \min_{K, N} \frac1\alpha \log \sum_{j \notin S_i} e^{\alpha (x_i \cdot k_j - 1)}
              + \frac{20}{T} \sum_{i, j} \max(-x_i \cdot k_j - 1, 0)^2.
    """
    # Keys may become linearly dependent in training: a ridge keeps their Gram matrix regular; the final solution has
    # none.
    ridge = 1e-6
    off = off_support(pattern, sampling.is_causal)
    used = sampling.used[None, :]

    def queries(free: Array, keys: Array, ridge: float) -> Array:
        inverse = functools.partial(support_inverse, ridge=ridge)
        inverses = jax.vmap(inverse, (None, 0, 0))(keys, pattern.indices, pattern.valid)
        return free + _repair(free, keys, inverses, pattern)

    def loss(parameters: tuple[Array, Array], sharpness: Array) -> Array:
        free, keys = (jnp.where(used, x, 0) for x in parameters)
        logits = queries(free, keys, ridge) @ keys.T
        largest = jax.nn.logsumexp(jnp.where(off, sharpness * (logits - 1), -jnp.inf)) / sharpness
        # The penalty keeps logits above about -1, because the margin is relative to the largest logit.
        return largest + 20 / pattern.num_queries * jnp.sum(jnp.where(off, jax.nn.relu(-logits - 1) ** 2, 0))

    keys = random_keys(sampling, pattern.num_queries, orthogonal=False)
    free, keys = (jnp.where(used, x, 0) for x in _descend(loss, (jnp.zeros_like(keys), keys), sampling.num_steps))
    _, weighting = interpolating_queries(keys, pattern, log_weights)
    return Factors(queries(free, keys, 0.0), weighting, keys)


def _descend(loss: Callable[[Any, Array], Array], start: Any, num_steps: int, rate: float = 0.05) -> Any:
    """Adam with a cosine schedule, while the sharpness of the smoothed maximum in the loss grows from 5 to 100.

    A soft maximum first moves many logits; the sharp one at the end differs from the maximum by at most log(T^2) / 100.
    Implemented here, so that the package does not depend on an optimiser library.
    """

    def step(state: tuple[Any, Any, Any], number: Array) -> tuple[tuple[Any, Any, Any], None]:
        parameters, first, second = state
        progress = number / num_steps
        slopes = jax.grad(loss)(parameters, 5 * 20**progress)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, slopes)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, slopes)
        share = rate * (1 + jnp.cos(jnp.pi * progress)) / 2 / (1 - 0.9 ** (number + 1))
        root = jnp.sqrt(1 - 0.999 ** (number + 1))
        parameters = jax.tree.map(
            lambda x, m, v: x - share * m / (jnp.sqrt(v) / root + 1e-8), parameters, first, second
        )
        return (parameters, first, second), None

    zeros = jax.tree.map(jnp.zeros_like, start)
    numbers = jnp.arange(num_steps, dtype=jax.tree.leaves(start)[0].dtype)
    return lax.scan(step, (start, zeros, zeros), numbers)[0][0]
