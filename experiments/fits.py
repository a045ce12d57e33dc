"""Lines and exponents fitted to measurements."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.results import Value


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Slope of a line by least squares, half of its 95 % interval, and R²; NaN below 3 different ``x``."""
    if len(set(x)) < 3:
        return math.nan, math.nan, math.nan
    from scipy import stats

    found: Any = stats.linregress(x, y)
    half = float(found.stderr * stats.t.ppf(0.975, len(x) - 2))
    return float(found.slope), half, float(found.rvalue) ** 2


def slope(points: Mapping[Any, float], name: str = "slope") -> dict[str, Value]:
    """Slope of the logs of a figure by a size, least squares, and half of its 95 % interval; NaN below 3 points."""
    found, half, _ = line(np.log(list(points)).tolist(), np.log(list(points.values())).tolist())
    return {name: found, f"{name}_half_width": half}
