"""Error of coresets over all queries of bounded norm, against their size, the radius and the dimension."""

import dataclasses
import functools
import math
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from rich.console import Console

from approx_attention import WeightedKV, attend, summarize_coreset, summarize_mean_value
from approx_attention.core import in_blocks, pad_rows
from approx_attention.coresets import ALGORITHMS, Algorithm, Halving, running_coreset
from approx_attention.evaluation import sup_error
from experiments.config import Count, NonNegative, Positive, Seeded, Several
from experiments.coresets import instances
from experiments.harness.long_context import slope

Instance = Literal[
    "clustered", "sphere", "low_rank", "outliers", "gaussian", "heavy_tailed", "two_points", "lower_bound"
]
# What the guard chooses among and is compared with.
RIVALS = ("kmeans_merge", "kmeans_nystrom", "nystrom_rpc", "uniform")
BLOCK = 128


@dataclasses.dataclass(frozen=True)
class CoresetErrorConfig(Seeded):
    """An instance, the algorithms, and what grows.

    Attributes:
        instance: see `experiments.coresets.instances`.
        algorithms: names of algorithms; ``halving-RULE-ORDER-BLOCK`` is halving with these settings,
            ``stream-fold`` and ``stream-refit`` coresets that grow with the tokens, 128 at a time.
        sizes: of the coresets; of the instance ``lower_bound`` parts of its distinct keys.
        radii: of the queries; with one radius the error is reported by size, else by radius at the only size.
        head_dims: likewise.
        draws: of the coreset, whose errors are averaged.
    """

    algorithms: Several[str]
    sizes: Several[Positive]
    instance: Instance = "clustered"
    radii: Several[NonNegative] = dataclasses.field(default_factory=lambda: [2.0])
    head_dims: Several[Count] = dataclasses.field(default_factory=lambda: [32])
    num_keys: Count = 4096
    value_dim: Count = 32
    draws: Count = 1

    def __post_init__(self) -> None:
        if sum(len(x) > 1 for x in (self.sizes, self.radii, self.head_dims)) > 1:
            raise ValueError("only one of sizes, radii and head_dims can grow in one run")
        for name in self.algorithms:
            algorithm_of(name)


@dataclasses.dataclass(frozen=True)
class Streamed:
    """A running coreset of the tokens in their order."""

    streaming: Literal["fold", "refit"]

    def __call__(self, tokens: WeightedKV, size: int, ratio: Array, key: Array) -> WeightedKV:
        """The coreset after the last token; one that refits takes the radius of the queries into account."""
        radius = ratio * jnp.max(jnp.linalg.norm(tokens.k, axis=1)) if self.streaming == "refit" else None
        running = running_coreset(
            tokens.k.shape[1], key, coreset_size=size, streaming=self.streaming, query_radius=radius, sinks=0
        )
        blocks = [in_blocks(x, BLOCK) for x in (tokens.k, tokens.value_sum, tokens.mass > 0)]
        starts = BLOCK * jnp.arange(blocks[0].shape[0], dtype=jnp.int32)
        start = running.init(tokens.value_sum.shape[1], tokens.k.dtype)
        held = jax.lax.scan(lambda held, x: (running.append(held, *x), None), start, (starts, *blocks))[0]
        small = running.read(held)
        assert isinstance(small, WeightedKV)
        return small


def algorithm_of(name: str) -> str | Algorithm:
    """The algorithm of that name."""
    if name in ALGORITHMS:
        return name
    if name in ("stream-fold", "stream-refit"):
        return Streamed("fold" if name == "stream-fold" else "refit")
    try:
        kind, rule, order, block = name.split("-")
        if kind != "halving" or order not in ("tree", "random") or rule not in ("search", "greedy", "walk", "thinning"):
            raise ValueError
        return Halving(rule=rule, order=order, block=int(block))
    except ValueError:
        raise ValueError(
            f"{name!r} is no algorithm; known are {', '.join(ALGORITHMS)}, stream-fold, stream-refit and "
            "halving-RULE-ORDER-BLOCK"
        ) from None


@functools.partial(jax.jit, static_argnames=("size", "algorithm"))
def _summary(k, v, key, radius, *, size, algorithm):
    small = summarize_coreset(k, v, key, coreset_size=size, algorithm=algorithm, query_radius=radius)
    # One shape for all sizes, so that the search is compiled once.
    room = k.shape[0] - small.mass.shape[0]
    k, value_sum, mass = (pad_rows(x, room) for x in (small.k, small.value_sum, small.mass))
    return WeightedKV(k, value_sum, mass, small.value_range)


_search = jax.jit(lambda k, v, summary, radius: sup_error(k, v, summary, radius).error)


@jax.jit
def _typical(k, v, summary, radius):
    q = jax.random.normal(jax.random.key(1), (512, k.shape[1]), k.dtype)
    q = radius * q / jnp.linalg.norm(q, axis=1, keepdims=True)
    difference = attend(q, WeightedKV.of_tokens(k, v)).out - attend(q, summary).out
    return jnp.sqrt(jnp.mean(jnp.sum(difference**2, axis=1)))


def run(config: CoresetErrorConfig, directory: pathlib.Path, console: Console) -> dict[str, Any]:
    """Sup error and root mean square error by what grows, and slopes of their logs."""
    grows = next((name for name in ("radii", "head_dims") if len(getattr(config, name)) > 1), "sizes")
    result: dict[str, Any] = {"grows": grows, "methods": {}, "mean_value": {}}
    for head_dim in config.head_dims:
        for radius in config.radii:
            k, v = instances.draw(config.instance, config.num_keys, head_dim, config.value_dim, radius, config.seed)
            distinct = k.shape[0] // 8 if config.instance == "lower_bound" else 1
            trivial = float(_search(k, v, summarize_mean_value(k, v), radius))
            for size in config.sizes:
                step = {"radii": radius, "head_dims": head_dim, "sizes": size}[grows]
                result["mean_value"][f"{step:g}"] = trivial
                for name in config.algorithms:
                    keys = jax.random.split(jax.random.key(config.seed), config.draws)
                    found = [
                        _summary(k, v, key, radius, size=max(1, round(size * distinct)), algorithm=algorithm_of(name))
                        for key in keys
                    ]
                    entry = result["methods"].setdefault(name, {"error": {}, "typical": {}})
                    entry["error"][f"{step:g}"] = float(np.mean([_search(k, v, s, radius) for s in found]))
                    entry["typical"][f"{step:g}"] = float(np.mean([_typical(k, v, s, radius) for s in found]))
    if {"guarded", *RIVALS} <= set(result["methods"]):
        errors = {name: entry["error"] for name, entry in result["methods"].items()}
        result["guarded_over_best"] = {
            step: error / min(errors[name][step] for name in RIVALS) for step, error in errors["guarded"].items()
        }
    for entry in result["methods"].values():
        steps = [float(step) for step in entry["error"]]
        if len(steps) < 3:
            continue
        errors = dict(zip(steps, entry["error"].values(), strict=True))
        if grows == "radii":
            # The error is to grow as e^(exponent * radius).
            entry["slope"] = slope({math.exp(step): error for step, error in errors.items()})
        else:
            entry["slope"] = slope(errors)
    return result
