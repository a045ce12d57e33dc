"""Exponents fitted to measurements."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.results import Value


def slope(points: Mapping[Any, float], name: str = "slope") -> dict[str, Value]:
    """Slope of the logs of a figure by a size, least squares, and half of its 95 % interval; NaN below 3 points."""
    if len(points) < 3:
        return {name: math.nan, f"{name}_half_width": math.nan}
    from scipy import stats

    line: Any = stats.linregress(np.log(list(points)), np.log(list(points.values())))
    half = float(line.stderr * stats.t.ppf(0.975, len(points) - 2))
    return {name: float(line.slope), f"{name}_half_width": half}
