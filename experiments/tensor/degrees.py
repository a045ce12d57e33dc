"""The least degree whose weights are right to a tolerance, and what rank that makes as sequences grow."""

import dataclasses
import functools
import itertools
import math
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from rich.console import Console

from approx_attention.tensor import MAX_DEGREE, exp_coefficients, minimax_error, ratio_range, taken_by, weight_bound
from experiments.config import ConfigError, Count, Positive, Seeded, Several


@dataclasses.dataclass(frozen=True)
class LeastDegreesConfig(Seeded):
    """Bounds of logits, tolerances of the total variation of weights, and kinds of coefficients."""

    bounds: Several[Positive]
    tolerances: Several[Positive]
    kinds: Several[Literal["taylor", "chebyshev", "minimax"]]


@dataclasses.dataclass(frozen=True)
class PhaseConfig(Seeded):
    """Lengths n, and the bound of logits as multiples of ln n, where the theory puts the threshold.

    The theory's logits are means over log n channels, so entries up to B make logits of order m up to B^m. Weights are
    asked to be right to 1/n.
    """

    lengths: Several[Count]
    multiples: Several[Positive]
    orders: Several[Count]


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


def run_degrees(config: LeastDegreesConfig, directory: pathlib.Path, console: Console) -> dict[str, Any]:
    """Least degrees by kind, tolerance and bound, with the slopes of the lines through them."""
    degrees = {
        kind: {
            f"{tolerance:g}": {f"{bound:g}": least_degree(kind, bound, tolerance) for bound in config.bounds}
            for tolerance in config.tolerances
        }
        for kind in config.kinds
    }
    per_unit = {
        kind: {tolerance: _line(by_bound) for tolerance, by_bound in by_tolerance.items()}
        for kind, by_tolerance in degrees.items()
    }
    return {"degrees": degrees, "degrees_per_unit": per_unit}


def _line(by_bound: Mapping[str, int]) -> float:
    """The slope of degrees against the bound, where logits are beyond 1."""
    beyond = {float(bound): degree for bound, degree in by_bound.items() if float(bound) >= 1}
    return float(np.polyfit(list(beyond), list(beyond.values()), 1)[0])


def run_phase(config: PhaseConfig, directory: pathlib.Path, console: Console) -> dict[str, Any]:
    """The exponent of the rank in n against the bound over ln n, and the entries that each order allows.

    ``crossing`` is the multiple of ln n at which the exponent passes 1, 1.5 and 2: from 2 on, third order takes no less
    than cubic time. ``spread`` is how far exponents of different lengths lie apart at most, for multiples of .2 and
    more.
    """
    curves: dict[str, dict[str, Any]] = {}
    for length in config.lengths:
        channels, log_length = round(math.log2(length)), math.log(length)
        points = {}
        for multiple in config.multiples:
            degree = least_degree("minimax", multiple * log_length, 1 / length)
            rank = math.comb(channels + degree, degree)
            points[f"{multiple:g}"] = {
                "bound": multiple * log_length,
                "degree": degree,
                "rank": rank,
                "exponent": math.log(rank) / log_length,
                "entries": {str(m): (multiple * log_length) ** (1 / m) for m in config.orders},
            }
        curves[str(length)] = points
        console.print(f"n={length}: exponents {[round(point['exponent'], 2) for point in points.values()]}")
    spreads = [
        max(curve[f"{multiple:g}"]["exponent"] for curve in curves.values())
        - min(curve[f"{multiple:g}"]["exponent"] for curve in curves.values())
        for multiple in config.multiples
        if multiple >= 0.2
    ]
    crossing = {
        f"{exponent:g}": {n: _crossing(curve, exponent) for n, curve in curves.items()} for exponent in (1, 1.5, 2)
    }
    entries = {
        str(m): {
            n: None if at is None else (at * math.log(int(n))) ** (1 / m) for n, at in crossing["1.5"].items()
        }
        for m in config.orders
    }  # fmt: skip
    return {
        "curves": curves,
        "crossing": crossing,
        "entries_at_crossing": entries,
        "spread": max(spreads),
    }


def _crossing(curve: Mapping[str, Any], exponent: float) -> float | None:
    """Where a curve first reaches an exponent, between the points beside it."""
    points = [(float(multiple), point["exponent"]) for multiple, point in curve.items()]
    for (before, low), (after, high) in itertools.pairwise(points):
        if low < exponent <= high:
            return before + (after - before) * (exponent - low) / (high - low)
    return None
