"""Error of coresets over all queries of bounded norm, against their size, the radius and the dimension."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure
from rich.console import Console

from approx_attention import WeightedKV, attend, summarize_coreset, summarize_mean_value
from approx_attention.core import in_blocks, pad_rows
from approx_attention.coresets import ALGORITHMS, Algorithm, Halving, running_coreset
from approx_attention.evaluation import sup_error
from experiments.config import Count, NonNegative, Positive, Seeded, Several
from experiments.coresets import instances
from experiments.fits import slope
from experiments.results import Frame, Record
from experiments.show import curves, having, parts, pivot, slopes

Instance = Literal[
    "clustered", "sphere", "low_rank", "outliers", "gaussian", "heavy_tailed", "two_points", "lower_bound"
]
GROWING = {"radius": "radii", "head_dim": "head_dims", "size": "sizes"}
MEAN = "mean of the values"
# What the guard chooses among and is compared with.
RIVALS = ("kmeans_merge", "kmeans_nystrom", "nystrom_rpc", "uniform")
BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Config(Seeded):
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


def run(config: Config, directory: pathlib.Path, console: Console) -> list[Record]:
    """Sup error and root mean square error of each algorithm, and exponents in what grows."""
    records: list[Record] = []
    errors: dict[str, dict[float, float]] = {}
    for head_dim in config.head_dims:
        for radius in config.radii:
            k, v = instances.draw(config.instance, config.num_keys, head_dim, config.value_dim, radius, config.seed)
            distinct = k.shape[0] // 8 if config.instance == "lower_bound" else 1
            trivial = float(_search(k, v, summarize_mean_value(k, v), radius))
            for size in config.sizes:
                step: Record = {"size": size, "radius": radius, "head_dim": head_dim}
                records.append({"algorithm": MEAN, **step, "error": trivial})
                for name in config.algorithms:
                    keys = jax.random.split(jax.random.key(config.seed), config.draws)
                    found = [
                        _summary(k, v, key, radius, size=max(1, round(size * distinct)), algorithm=algorithm_of(name))
                        for key in keys
                    ]
                    error, typical = (
                        float(np.mean([of(k, v, small, radius) for small in found])) for of in (_search, _typical)
                    )
                    records.append({"algorithm": name, **step, "error": error, "typical": typical})
                    # The error is to grow as e^(exponent * radius), and as a power of the dimension or the size.
                    at = {"radius": math.exp(radius), "head_dim": head_dim, "size": size}[grows(config)]
                    errors.setdefault(name, {})[at] = error
                if {"guarded", *RIVALS} <= set(config.algorithms):
                    own, *others = (list(errors[name].values())[-1] for name in ("guarded", *RIVALS))
                    records.append({**step, "guarded_over_best": own / min(others)})
    records += [{"algorithm": name, **slope(by)} for name, by in errors.items() if len(by) > 2]
    return records


def grows(config: Config) -> str:
    """The column of what grows."""
    return next((name for name, of in GROWING.items() if len(getattr(config, of)) > 1), "size")


def _growing(records: Frame) -> str:
    """The column of what grows in the records of one configuration."""
    errors = having(records, "algorithm", "error")
    return next((name for name in GROWING if errors[name].nunique() > 1), "size")


def table(records: Frame) -> Iterable[str]:
    """Greatest errors by what grows, and exponents, by configuration."""
    for name, own in parts(records):
        by, errors = _growing(own), having(own, "algorithm", "error")
        first = errors[by].iloc[0]
        smallest = errors[errors["error"] < 1e-5]["algorithm"]

        def typical(algorithm: str, of: Frame, by: str = by, first: Any = first) -> str:
            here = of[of[by] == first]
            return f"{here['typical'].mean():.2g}" if "typical" in here and here["typical"].notna().any() else ""

        def exponent(algorithm: str, of: Frame, own: Any = own, smallest: Any = smallest) -> str:
            # Where the error falls to that of rounding there is no exponent.
            return "" if algorithm in set(smallest) else slopes(own, "algorithm")["slope"](algorithm, of)

        yield f"`{name}`: greatest error over queries of that norm, by {by.replace('_', ' ')}"
        more = {f"typical at {first:g}": typical, "exponent": exponent}
        yield pivot(errors, "algorithm", by, "error", more=more)


def figure(records: Frame) -> Figure:
    """Greatest errors by what grows, a panel for each configuration."""
    errors = having(records, "algorithm", "error")
    grown = {name: _growing(own) for name, own in parts(errors)}
    if all(own[grown[name]].nunique() == 1 for name, own in parts(errors)):
        return _at_one_size(errors)
    at = [row[grown[row["configuration"]]] for _, row in errors.iterrows()]

    def scale(axes: Any, name: Any, _: Frame) -> None:
        by = grown[name]
        axes.set(xlabel={"size": "tokens kept", "radius": "norm of the queries", "head_dim": "dimension"}[by])
        axes.set_xscale("linear" if by == "radius" else "log")
        steps = sorted({x for x, row in zip(at, errors["configuration"], strict=True) if row == name})
        axes.set_xticks(steps, [f"{step:g}" for step in steps])
        axes.minorticks_off()

    return curves(
        errors.assign(at=at),
        x="at",
        y="error",
        by="algorithm",
        labels=("", "greatest error over all queries"),
        least=1e-5,  # what is exact but for rounding
        dotted=[MEAN],
        each=scale,
    )


def _at_one_size(errors: Frame) -> Figure:
    """Greatest errors where nothing grows: the configurations side by side."""
    names = list(dict.fromkeys(errors["configuration"]))
    return curves(
        errors.assign(at=[names.index(name) for name in errors["configuration"]], all="all"),
        x="at",
        y="error",
        by="algorithm",
        panel="all",
        labels=("", "greatest error over all queries"),
        scales=("linear", "log"),
        ticks=lambda at: names[int(at)],
        dotted=[MEAN],
        size=(9.0, 4.0),
    )
