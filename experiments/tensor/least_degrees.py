"""The least degree whose weights are right to a tolerance."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from approx_attention.tensor import MAX_DEGREE, exp_coefficients, minimax_error, ratio_range, taken_by, weight_bound
from experiments.config import ConfigError, Positive, Seeded, Several
from experiments.results import Frame, Record
from experiments.show import curves, having, lookup, parts, pivot, whole


@dataclasses.dataclass(frozen=True)
class Config(Seeded):
    """Bounds of logits, tolerances of the total variation of weights, and kinds of coefficients."""

    bounds: Several[Positive]
    tolerances: Several[Positive]
    kinds: Several[Literal["taylor", "chebyshev", "minimax"]]


@functools.cache
def weight_error(kind: str, degree: int, bound: float) -> float:
    """The largest total variation of weights by a polynomial, for logits up to a bound, but for rounding."""
    if kind == "minimax":
        error = minimax_error(degree, bound)
        return weight_bound(1 - error, 1 + error)
    coefficients = exp_coefficients(kind, degree, **taken_by(kind, bound=bound))
    return weight_bound(*ratio_range(coefficients, bound))


def least_degree(kind: str, bound: float, tolerance: float) -> int:
    """The least degree, odd or even, whose weights are right to a tolerance."""
    for degree in range(MAX_DEGREE + 1):
        if weight_error(kind, degree, bound) <= tolerance:
            return degree
    raise ConfigError(f"no degree up to {MAX_DEGREE} of {kind} is right to {tolerance} for logits up to {bound}")


def run(config: Config, directory: pathlib.Path, console: Console) -> list[Record]:
    """Least degrees by kind, tolerance and bound, with the slopes of the lines through them."""
    records: list[Record] = []
    for kind in config.kinds:
        for tolerance in config.tolerances:
            degrees = {bound: least_degree(kind, bound, tolerance) for bound in config.bounds}
            at: Record = {"kind": kind, "tolerance": tolerance}
            records += [{**at, "bound": bound, "degree": degree} for bound, degree in degrees.items()]
            records.append({**at, "degrees_per_unit": _line(degrees)})
    return records


def _line(degrees: Mapping[float, int]) -> float:
    """The slope of degrees against the bound, where logits are beyond 1."""
    beyond = {bound: degree for bound, degree in degrees.items() if bound >= 1}
    return float(np.polyfit(list(beyond), list(beyond.values()), 1)[0])


def table(records: Frame) -> Iterable[str]:
    """Least degrees by the largest logit, a table for each tolerance."""
    for tolerance, own in parts(records, "tolerance"):
        yield f"Least degree whose weights are right to {tolerance:g}, by the largest logit"
        more = {"degrees per unit from 1 on": lookup(own, "kind", "degrees_per_unit", _two)["degrees per unit"]}
        yield pivot(having(own, "bound"), "kind", "bound", "degree", cell=whole, more=more, quoted=False)


def _two(figures: list[float]) -> str:
    return f"{figures[0]:.2f}"


def figure(records: Frame) -> Figure:
    """Least degrees by the largest logit, at a loose tolerance and at the tightest."""
    found = having(records, "bound")
    tolerances = list(dict.fromkeys(found["tolerance"]))
    shown = found[found["tolerance"].isin([tolerances[len(tolerances) // 4], tolerances[-1]])]
    return curves(
        shown,
        x="bound",
        y="degree",
        by="kind",
        panel="tolerance",
        labels=("largest logit", "least degree"),
        scales=("linear", "linear"),
        ticks=None,
        titles=lambda tolerance: f"weights right to {tolerance:g}",
    )
