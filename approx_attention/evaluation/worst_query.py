"""The query with the largest error of a summary."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, PRNGKeyArray

from approx_attention.core import Summary, WeightedKV, attend, in_float32, require_scaled_space, zero_padding

# Number of radii at which the search for the worst query starts, in equal ratios down to at least a sixteenth.
NUM_SPHERES = 5


class SupError(NamedTuple):
    """The largest error found over a ball of queries.

    Attributes:
        error: norm of the difference, over the largest norm of a value.
        query: the query ``[D]``, in scaled space, at which it was found.
    """

    error: Array
    query: Array


@functools.partial(jax.jit, static_argnames=("num_random", "num_keys", "num_starts", "num_steps"))
@in_float32()
def sup_error(
    k: Float[Array, "S D"],
    v: Float[Array, "S Dv"],
    summary: Summary,
    radius: float | Array,
    *,
    kv_mask: Bool[Array, " S"] | None = None,
    key: PRNGKeyArray | None = None,
    num_random: int = 1024,
    num_keys: int = 512,
    num_starts: int = 24,
    num_steps: int = 60,
) -> SupError:
    r"""Search a ball of queries for the one with the largest error of a summary.

    .. math:: \max_{\|q\| \le \rho}
              \frac{\|\mathrm{attend}(q, (K, V)) - \mathrm{attend}(q, \mathrm{summary})\|_2}{\max_j \|v_j\|_2}

    The search tries random directions, directions of keys and their opposites on several spheres, from radius
    :math:`\rho` down to a radius at which logits differ by at most 1, because the error may be larger for soft weights
    than for sharp ones. Projected gradient ascent starts from the worst directions of each sphere. The result is a
    lower bound of the supremum, closer than random queries; increase starts and steps to check for convergence.

    Args:
        k: keys ``[S, D]`` in scaled space (`fold_scale`).
        v: values ``[S, Dv]``.
        summary: their summary in scaled space; if it carries a scale, pass ``summary.in_scaled_space()``.
        radius: the radius :math:`\rho` of the ball of scaled queries.
        kv_mask: true where a key is real, ``[S]``.
        key: typed PRNG key of the search; ``jax.random.key(0)`` by default.
        num_random: number of random directions.
        num_keys: number of keys whose directions are tried.
        num_starts: number of worst directions of each sphere from which ascent starts.
        num_steps: number of ascent steps.

    Returns:
        The `SupError`.

    Example:
        >>> import jax
        >>> from approx_attention import summarize_mean_pool
        >>> from approx_attention.evaluation import sup_error
        >>> k, v = (jax.random.normal(jax.random.key(i), (64, 4)) for i in range(2))
        >>> coarse, fine = (sup_error(k, v, summarize_mean_pool(k, v, num_landmarks=m), 1.0).error for m in (8, 64))
        >>> bool(fine < 1e-5 < coarse)
        True
    """
    summary = require_scaled_space("sup_error", summary)
    key_random, key_chosen = jax.random.split(jax.random.key(0) if key is None else key)
    k, v = zero_padding(k, v, kv_mask)
    tokens = WeightedKV.of_tokens(k, v, kv_mask)
    largest_value = jnp.sqrt(jnp.max(jnp.sum(v * v, axis=-1)))

    def errors(q: Array) -> Array:
        difference = attend(q, tokens).out - attend(q, summary).out
        # The tiny constant keeps the gradient finite if the error is exactly 0.
        return jnp.sqrt(jnp.sum(difference * difference, axis=-1) + 1e-30)

    def onto_ball(q: Array) -> Array:
        norm = jnp.linalg.norm(q, axis=-1, keepdims=True)
        return q * jnp.minimum(1, radius / jnp.maximum(norm, jnp.finfo(q.dtype).tiny))

    directions = jax.random.normal(key_random, (num_random, k.shape[-1]), k.dtype)
    some = jax.random.permutation(key_chosen, k.shape[0])[:num_keys]
    directions = jnp.concatenate([directions, k[some], -k[some]])
    # A padded key is zero, and its direction stays zero.
    directions = directions / jnp.maximum(jnp.linalg.norm(directions, axis=-1, keepdims=True), 1e-12)
    gradient = jax.grad(lambda q: jnp.sum(errors(q)))

    def from_sphere(sphere: Array) -> SupError:
        queries = onto_ball(directions * sphere)
        start_errors, worst = lax.top_k(errors(queries), min(num_starts, queries.shape[0]))

        def climb(carry: tuple[Array, Array, Array], step: Array) -> tuple[tuple[Array, Array, Array], None]:
            q, best_error, best_query = carry
            slope = gradient(q)
            # Steps shrink as a cosine from 0.31 of the radius to 0.01: first to leave flat regions, then to converge.
            length = sphere * (0.15 * (1 + jnp.cos(jnp.pi * step / num_steps)) + 0.01)
            q = onto_ball(q + length * slope / jnp.maximum(jnp.linalg.norm(slope, axis=-1, keepdims=True), 1e-20))
            error = errors(q)
            better = error > best_error
            return (q, jnp.where(better, error, best_error), jnp.where(better[:, None], q, best_query)), None

        starts = queries[worst]
        (_, best_error, best_query), _ = lax.scan(
            climb, (starts, start_errors, starts), jnp.arange(num_steps, dtype=k.dtype)
        )
        found = jnp.argmax(best_error)
        return SupError(best_error[found], best_query[found])

    # Softmax is invariant to a common shift of logits, so keys are centred.
    middle = jnp.sum(k, axis=0) / jnp.maximum(jnp.sum(tokens.mass), 1)
    away = jnp.sqrt(jnp.max(jnp.where(tokens.mass > 0, jnp.sum((k - middle[None, :]) ** 2, axis=-1), 0)))
    # Half of the largest difference of logits is at most radius * away.
    smallest = jnp.minimum(1 / 16, 0.5 / jnp.maximum(radius * away, 1e-20))
    spheres = radius * smallest ** jnp.linspace(0, 1, NUM_SPHERES, dtype=k.dtype)
    found = lax.map(from_sphere, spheres)
    best = jnp.argmax(found.error)
    return SupError(found.error[best] / jnp.where(largest_value > 0, largest_value, 1), found.query[best])
