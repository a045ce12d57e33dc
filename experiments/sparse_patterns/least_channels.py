"""The least number of channels of a construction, and how studies show curves and their bounds."""

import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
from matplotlib.figure import Figure

from approx_attention import SparsePattern
from approx_attention.realization import MinimalDimension, minimal_dimension
from experiments.results import Frame
from experiments.show import Scales, curves, parts, pivot, whole


def search(config: Any, length: int, method: str, trials: int, **options: Any) -> MinimalDimension:
    """The least channels with which a method realises random patterns."""
    pattern = functools.partial(SparsePattern.random, num_tokens=length, keys_per_row=config.keys_per_row)
    key = jax.random.fold_in(jax.random.key(config.seed), length)
    return minimal_dimension(pattern, config.eps1, config.eps2, key=key, method=method, trials=trials, **options)


def number(dim: float) -> float:
    """As a count; infinite where no number of channels was enough."""
    return int(dim) if math.isfinite(dim) else math.inf


def tables(records: Frame, x: str, y: str, title: str, **more: Any) -> Iterable[str]:
    """What was measured by curve, and below it the bounds, by configuration."""
    for name, own in parts(records):
        yield f"`{name}`: {title}"
        yield pivot(own.sort_values(x, kind="stable"), "curve", x, y, cell=whole, quoted=False, **more)


def drawn(records: Frame, x: str, y: str, labels: tuple[str, str], scales: Scales) -> Figure:
    """What was measured, with marks, and the bounds as dotted lines where they are in reach."""
    finite = records[records[y].map(math.isfinite)]
    if scales[1] == "log":
        # A logarithm leaves out what is 0 throughout.
        finite = finite[finite[y] > 0]
    else:
        reach = 1.25 * finite[~finite["is_bound"].astype(bool)].groupby("configuration")[y].max()
        finite = finite[finite[y] <= finite["configuration"].map(reach)]
    bounds = list(dict.fromkeys(records[records["is_bound"].astype(bool)]["curve"]))
    return curves(finite, x=x, y=y, by="curve", labels=labels, scales=scales, dotted=bounds, size=(4.8, 4.2))
