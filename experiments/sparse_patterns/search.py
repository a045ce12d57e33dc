"""The least number of channels with which a construction realises sparse patterns."""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from approx_attention import SparsePattern
from approx_attention.core import in_blocks, in_float32
from approx_attention.evaluation import load_sample
from approx_attention.realization import minimal_dimension

Target = Literal["random", "random_head", "sharp_head", "diffuse_head"]
# Channels of a sample for permutations, more than any needs up to 100,000 tokens.
WIDTH = 64


def least_channels(
    config: Any, length: int, keys: int, eps: tuple[float, float], method: str, **options: Any
) -> list[float]:
    """The least channels of each trial, infinite where no number was enough."""
    target: Any = getattr(config, "target", "random")
    key = jax.random.fold_in(jax.random.key(config.seed), length)
    if target == "random" and keys == 1 and method in ("projection", "wls") and not options:
        return [_of_permutations(length, jax.random.fold_in(key, trial), method) for trial in range(config.trials)]
    pattern: Any = functools.partial(SparsePattern.random, num_tokens=length, keys_per_row=keys)
    if target != "random":
        pattern, options = top_keys(target, length, keys, config.seed), {**options, "is_causal": True}
    options |= {"trials": config.trials, "num_steps": config.num_steps}
    found = minimal_dimension(pattern, *eps, key=key, method=method, **options)
    return [int(dim) if math.isfinite(dim) else math.inf for dim in found.per_trial]


def top_keys(target: Target, length: int, keys: int, seed: int) -> SparsePattern:
    """The keys with the largest logits of each query of a causal head, among the last tokens of the sample."""
    if target == "random_head":
        logits = jax.random.normal(jax.random.key(seed), (length, length))
    else:
        q, k, _ = (x[0 if target == "sharp_head" else 1, -length:, 0].astype(jnp.float32) for x in load_sample())
        logits = q @ k.T
    visible = jnp.tril(jnp.ones((length, length), bool))
    least = jax.lax.top_k(jnp.where(visible, logits, -jnp.inf), keys)[0][:, -1:]
    return SparsePattern.from_dense(visible & (logits >= least))


def _of_permutations(length: int, key: Array, method: str) -> float:
    """By bisection over prefixes of one sample, which is much faster than a search with certificates."""
    keys = jax.random.normal(key, (length, WIDTH))
    low, high = 0, WIDTH + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if accepted(keys, middle, method=method) else (middle, high)
    return math.inf if high > WIDTH else high


@functools.partial(jax.jit, static_argnames="method")
@in_float32()
def accepted(keys: Array, num_channels: Array | int, *, method: str = "projection") -> Array:
    """Whether a prefix of the channels of keys ``[n, d]`` realises a permutation, to any two precisions.

    Query i is a multiple of key pi(i), or of that key in the metric of least squares, and there are no ratios between
    keys of a row to preserve: every key must have its largest product with itself. So all permutations need the same.
    """
    used = jnp.arange(keys.shape[1]) < num_channels
    keys = jnp.where(used[None, :], keys, 0)
    if method == "wls":
        spread = keys.T @ keys / keys.shape[0] + jnp.diag(jnp.where(used, 0.0, 1.0))
        keys = jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(spread), keys.T, lower=True).T

    def largest_with_itself(block: tuple[Array, Array]) -> Array:
        rows, own = block
        products = own @ keys.T
        itself = jnp.sum(own * own, axis=1)
        other = jnp.arange(keys.shape[0])[None, :] != rows[:, None]
        # Rows beyond the last token are zeros.
        return jnp.all((jnp.max(jnp.where(other, products, -jnp.inf), axis=1) < itself) | (itself == 0))

    size = min(256, keys.shape[0])
    rows = jnp.arange(keys.shape[0])
    return jnp.all(jax.lax.map(largest_with_itself, (in_blocks(rows, size), in_blocks(keys, size))))
