"""Channels that permutations need, to many tokens: the log law without a search over patterns (E8)."""

import dataclasses
import functools
import math
import pathlib
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from rich.console import Console

from approx_attention import dimension_bound
from approx_attention.core import in_blocks, in_float32
from experiments.config import Count, Seeded, Several
from experiments.results import Record
from experiments.sparse_patterns import least_channels
from experiments.sparse_patterns.least_channels import line_in_log2

# More than any sample needs up to 100,000 tokens.
WIDTH = 64
table, figure = least_channels.table, least_channels.figure


@dataclasses.dataclass(frozen=True)
class Config(Seeded):
    """Numbers of tokens, and samples of keys of each.

    Attributes:
        method: as in `approx_attention.realize_sparse_pattern`.
    """

    lengths: Several[Count]
    method: Literal["projection", "wls"] = "projection"
    trials: Count = 4


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


def run(config: Config, directory: pathlib.Path, console: Console) -> list[Record]:
    """The least channels of each sample by bisection, the proved bound, and lines in log2 of the length."""
    records: list[Record] = []
    points: dict[str, dict[float, list[float]]] = {config.method: {}, "least_squares_exact": {}}
    for n in config.lengths:
        trials: list[float] = []
        for trial in range(config.trials):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), n), trial)
            keys = jax.random.normal(key, (n, WIDTH))
            low, high = 0, WIDTH + 1
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if accepted(keys, middle, method=config.method) else (middle, high)
            trials.append(math.inf if high > WIDTH else high)
        bound = dimension_bound(n, 1, 0.5, 1.0, kind="least_squares_exact").dim
        console.print(f"{config.method}, {n} tokens: {trials} channels, bound {bound}")
        median = sorted(trials)[len(trials) // 2]
        points[config.method][n], points["least_squares_exact"][n] = trials, [bound]
        step: Record = {"tokens": n, "keys": 1}
        records.append({"curve": config.method, "is_bound": False, **step, "channels": median, "trials": trials})
        records.append({"curve": "least_squares_exact", "is_bound": True, **step, "channels": bound})
    theory = 4.0  # 4 log 2 / log(1 + 1/k) for k = 1
    records += [{"curve": curve, **line_in_log2(of, theory)} for curve, of in points.items()]
    return [*records, {"theory": theory}]
