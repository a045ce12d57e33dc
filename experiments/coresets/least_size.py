"""The least size of a coreset whose greatest error over all queries is at most eps, by bisection."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax import Array
from matplotlib.figure import Figure
from rich.console import Console

from approx_attention import WeightedKV, summarize_mean_value
from approx_attention.core import pad_rows
from approx_attention.coresets import algorithm_of, compress
from approx_attention.evaluation import sup_error
from experiments.config import Count, NonNegative, Positive, Seeded, Several
from experiments.coresets import instances
from experiments.fits import slope
from experiments.results import Frame, Record
from experiments.show import curves, having, parts, pivot, reached, significant, slopes

GROWING = {"precision": "precisions", "radius": "radii", "head_dim": "head_dims", "num_keys": "lengths"}
AXES = {"precision": "eps", "radius": "norm of the queries", "head_dim": "dimension", "num_keys": "tokens"}


@dataclasses.dataclass(frozen=True)
class Config(Seeded):
    """An instance, the algorithms, and the one quantity that grows.

    Attributes:
        instance: see `experiments.coresets.instances`.
        algorithms: names in `approx_attention.coresets.ALGORITHMS`.
        precisions: eps, in units of the largest value; of ``lower_bound`` in units of 1 / (4 sqrt(d / 2)), the error
            that the theorem promises to a coreset that is too small.
        radii: of the queries.
        head_dims: channels of keys.
        lengths: numbers of tokens; two instances have a fixed number.
        smallest: the smallest size tried; of ``lower_bound`` in units of its distinct keys.
        in_turn: names of algorithms whose coreset of each size is made of that of twice the size.
    """

    algorithms: Several[str]
    instance: instances.Instance = "half_space"
    precisions: Several[Positive] = dataclasses.field(default_factory=lambda: [0.1])
    radii: Several[NonNegative] = dataclasses.field(default_factory=lambda: [2.0])
    head_dims: Several[Count] = dataclasses.field(default_factory=lambda: [8])
    lengths: Several[Count] = dataclasses.field(default_factory=lambda: [8192])
    value_dim: Count = 1
    smallest: Positive = 8
    in_turn: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        if sum(len(getattr(self, of)) > 1 for of in GROWING.values()) > 1:
            raise ValueError(f"only one of {', '.join(GROWING.values())} can grow in one run")
        for name in self.algorithms:
            algorithm_of(name)


@functools.partial(jax.jit, static_argnames="room")
def padded(small: WeightedKV, room: int) -> WeightedKV:
    """One shape for all sizes, so that the search for the worst query is compiled once."""
    k, value_sum, mass = (pad_rows(x, room - x.shape[0]) for x in (small.k, small.value_sum, small.mass))
    return WeightedKV(k, value_sum, mass, small.value_range)


@jax.jit
def _greatest_error(k: Array, v: Array, small: WeightedKV, radius: float) -> Array:
    # Half of the default starts and fewer directions: the same error to three digits, in a third of the time.
    options: Any = {"num_random": 256, "num_keys": 128, "num_starts": 16, "num_steps": 40}
    return sup_error(k, v, small, radius, **options).error


def least_size(error: Callable[[int], float], sizes: list[int], eps: float) -> float:
    """Where the error, falling in the size, crosses eps: bisection over sizes, then a line in the logarithms of both.

    Infinite where the largest size is not enough; the smallest size where it already is.
    """
    low, high = -1, len(sizes)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if error(sizes[middle]) <= eps else (middle, high)
    if high == len(sizes):
        return math.inf
    if low < 0:
        return float(sizes[0])
    above, below = math.log(error(sizes[low]) / eps), math.log(eps / max(error(sizes[high]), 1e-6))
    return sizes[low] * (sizes[high] / sizes[low]) ** (above / (above + below))


def run(config: Config, directory: pathlib.Path, console: Console) -> list[Record]:
    """The least size of each algorithm at each step, and its exponent in the quantity that grows.

    ``constant`` is the least size over sqrt(d) e^radius / eps, the size of the theorem.
    """
    records: list[Record] = []
    found: dict[str, dict[float, float]] = {name: {} for name in config.algorithms}
    of_distinct: dict[str, list[float]] = {name: [] for name in config.algorithms}
    for head_dim, radius, length in (
        (d, radius, n) for d in config.head_dims for radius in config.radii for n in config.lengths
    ):
        k, v = instances.draw(config.instance, length, head_dim, config.value_dim, radius, config.seed)
        unit, eps_unit = 1, 1.0
        if config.instance == "lower_bound":
            unit, eps_unit = k.shape[0] // instances.COPIES, 1 / (4 * math.sqrt(head_dim / 2))
            records.append({"radius": radius, "distinct_share": len(np.unique(np.asarray(k), axis=0)) / k.shape[0]})
        largest = k.shape[0] // 2
        steps = range(int(math.log2(largest / (config.smallest * unit))) + 1)
        sizes = [round(config.smallest * unit * 2**step) for step in steps]
        mean_error = float(_greatest_error(k, v, summarize_mean_value(k, v), radius))
        for name in config.algorithms:

            @functools.cache
            def coreset(size: int, name: str = name, k: Array = k, v: Array = v, radius: float = radius) -> WeightedKV:
                tokens = WeightedKV.of_tokens(k, v)
                if name in config.in_turn and 2 * size < k.shape[0]:
                    tokens = coreset(2 * size)
                options: Any = {"coreset_size": size, "algorithm": name, "query_radius": radius}
                return compress(tokens, jax.random.key(config.seed), **options)

            @functools.cache
            def error(size: int, k: Array = k, v: Array = v, radius: float = radius, of: Any = coreset) -> float:
                return float(_greatest_error(k, v, padded(of(size), k.shape[0] // 2), radius))

            for precision in config.precisions:
                least = least_size(error, sizes, eps_unit * precision)
                step: Record = {"precision": precision, "radius": radius, "head_dim": head_dim, "num_keys": k.shape[0]}
                eps_over_mean = eps_unit * precision / mean_error
                constant = least * eps_unit * precision / (math.sqrt(head_dim) * math.exp(radius))
                records.append(
                    {"algorithm": name, **step, "least": least, "constant": constant, "eps_over_mean": eps_over_mean}
                )
                # The size is to grow as e^(exponent * radius), and as a power of what else grows.
                at = {"precision": precision, "radius": math.exp(radius), "head_dim": head_dim, "num_keys": length}
                found[name][at[grows(config)]] = least
                of_distinct[name].append(least / unit)
            console.print(f"{name}, {head_dim} channels, radius {radius:g}, {length} tokens: {least:.4g} tokens kept")
    for name, by in found.items():
        records.append({"algorithm": name, **slope({at: m for at, m in by.items() if math.isfinite(m)})})
    if config.instance == "lower_bound":
        records += [{"algorithm": name, "most_of_distinct": max(of)} for name, of in of_distinct.items()]
        records.append({"least_of_distinct": min(min(of) for of in of_distinct.values())})
    return records


def grows(config: Config) -> str:
    """The column of the quantity that grows."""
    return next((name for name, of in GROWING.items() if len(getattr(config, of)) > 1), "precision")


def _growing(records: Frame) -> str:
    """The column of the quantity that grows in the records of one configuration."""
    return next((name for name in GROWING if records[name].nunique() > 1), "precision")


def table(records: Frame) -> Iterable[str]:
    """Least sizes by the quantity that grows, with their exponents and constants."""
    for name, own in parts(records):
        least = having(own, "algorithm", "least")
        by = _growing(least)
        constants = {
            "size / (sqrt(d) e^radius / eps)": lambda algorithm, of: (
                significant(finite) if (finite := list(of["constant"][of["constant"].map(math.isfinite)])) else ""
            )
        }
        yield f"`{name}`: least size, by {AXES[by]}"
        more = {**constants, "exponent": slopes(own, "algorithm")["slope"]}
        yield pivot(least, "algorithm", by, "least", cell=reached, more=more)


def figure(records: Frame) -> Figure:
    """Least sizes by the quantity that grows, a panel for each configuration."""
    least = having(records, "algorithm", "least")
    least = least[least["least"].map(math.isfinite)]
    grown = {name: _growing(own) for name, own in parts(least)}
    at = [row[grown[row["configuration"]]] for _, row in least.iterrows()]

    def scale(axes: Any, name: Any, own: Frame) -> None:
        axes.set(xlabel=AXES[grown[name]], xscale="linear" if grown[name] == "radius" else "log")
        steps = sorted(set(own["at"]))
        axes.set_xticks(steps, [f"{step:g}" for step in steps])
        axes.set_xticks([], minor=True)

    return curves(
        least.assign(at=at), x="at", y="least", by="algorithm", labels=("", "least size"), columns=4, each=scale
    )
