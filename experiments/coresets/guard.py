"""The default coreset, the algorithms that it chooses among, and streams: error over all queries of bounded norm."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from rich.console import Console

from approx_attention import WeightedKV, attend, summarize_coreset, summarize_mean_value
from approx_attention.core import in_blocks
from approx_attention.coresets import Algorithm, algorithm_of, running_coreset
from approx_attention.evaluation import sup_error
from experiments.config import Count, NonNegative, Seeded, Several
from experiments.coresets import instances
from experiments.results import Frame, Record
from experiments.show import curves, having, pivot

MEAN = "mean of the values"
# The algorithms that the guard is compared with.
RIVALS = ("kmeans_merge", "kmeans_nystrom", "nystrom_rpc", "uniform")
BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Config(Seeded):
    """An instance, and the algorithms.

    Attributes:
        instance: see `experiments.coresets.instances`.
        algorithms: names of algorithms; ``stream-fold`` and ``stream-refit`` are coresets that grow with the tokens,
            128 at a time.
        size: of the coresets.
        radius: of the queries.
    """

    algorithms: Several[str]
    size: Count
    instance: instances.Instance = "clustered"
    radius: NonNegative = 2.0
    head_dim: Count = 32
    num_keys: Count = 4096
    value_dim: Count = 32

    def __post_init__(self) -> None:
        for name in self.algorithms:
            _named(name)


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


STREAMS: dict[str, Algorithm] = {"stream-fold": Streamed("fold"), "stream-refit": Streamed("refit")}


def _named(name: str) -> Algorithm:
    return STREAMS.get(name) or algorithm_of(name)


_search = jax.jit(lambda k, v, summary, radius: sup_error(k, v, summary, radius).error)


@jax.jit
def _typical(k, v, summary, radius):
    q = jax.random.normal(jax.random.key(1), (512, k.shape[1]), k.dtype)
    q = radius * q / jnp.linalg.norm(q, axis=1, keepdims=True)
    difference = attend(q, WeightedKV.of_tokens(k, v)).out - attend(q, summary).out
    return jnp.sqrt(jnp.mean(jnp.sum(difference**2, axis=1)))


def run(config: Config, directory: pathlib.Path, console: Console) -> list[Record]:
    """Sup error and root mean square error of each algorithm, and the guard over the best of its rivals."""
    radius, step = config.radius, {"size": config.size, "radius": config.radius, "head_dim": config.head_dim}
    k, v = instances.draw(config.instance, config.num_keys, config.head_dim, config.value_dim, radius, config.seed)
    trivial = float(_search(k, v, summarize_mean_value(k, v), radius))
    records: list[Record] = [{"algorithm": MEAN, **step, "error": trivial}]
    key = jax.random.split(jax.random.key(config.seed), 1)[0]
    errors: dict[str, float] = {}
    for name in config.algorithms:
        options = {"coreset_size": config.size, "algorithm": _named(name), "query_radius": radius}
        small = jax.jit(functools.partial(summarize_coreset, **options))(k, v, key)
        errors[name], typical = (float(of(k, v, small, radius)) for of in (_search, _typical))
        records.append({"algorithm": name, **step, "error": errors[name], "typical": typical})
    if {"guarded", *RIVALS} <= set(errors):
        records.append({**step, "guarded_over_best": errors["guarded"] / min(errors[name] for name in RIVALS)})
    return records


def table(records: Frame) -> Iterable[str]:
    """Greatest errors by configuration, and those of random queries."""
    yield "greatest error over queries of bounded norm, by configuration"
    yield pivot(having(records, "algorithm", "error"), "algorithm", "configuration", "error")
    yield "root mean square error over random queries of that norm, by configuration"
    yield pivot(having(records, "algorithm", "typical"), "algorithm", "configuration", "typical")


# Greatest errors, the configurations side by side.
figure = functools.partial(
    curves,
    x="configuration",
    y="error",
    by="algorithm",
    panel=None,
    labels=("", "greatest error over all queries"),
    scales=("linear", "log"),
    dotted=[MEAN],
    size=(9.0, 4.0),
)
