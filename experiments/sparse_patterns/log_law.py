"""Channels that random sparse patterns need as the number of tokens grows."""

import dataclasses
import math
import pathlib
from collections.abc import Iterable
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from approx_attention import dimension_bound
from experiments.config import Count, Positive, Seeded, Several
from experiments.results import Frame, Record
from experiments.show import having, lookup, parts, slopes
from experiments.sparse_patterns.least_channels import drawn, number, search, tables

# The bounds that are drawn with what was measured.
UPPER = ("johnson_lindenstrauss", "projection_heuristic", "orthogonal_heuristic", "least_squares_exact")


@dataclasses.dataclass(frozen=True)
class Config(Seeded):
    """Random k-sparse patterns of growing length.

    Attributes:
        keys_per_row: k, in rows and columns.
        trials: over how many draws the median is taken.
    """

    lengths: Several[Count]
    methods: Several[str]
    keys_per_row: Count = 2
    eps1: Positive = 0.5
    eps2: Positive = 1.0
    trials: Count = 5


def run(config: Config, directory: pathlib.Path, console: Console) -> list[Record]:
    """The least channels of each method at each length, the bounds, and lines through them in log2 of the length."""
    records: list[Record] = []
    points: dict[str, dict[int, float]] = {}

    def add(curve: str, length: int, channels: float, is_bound: bool, trials: list[float] | None = None) -> None:
        points.setdefault(curve, {})[length] = channels
        records.append({"curve": curve, "is_bound": is_bound, "tokens": length, "channels": channels, "trials": trials})

    for method in config.methods:
        for length in config.lengths:
            found = search(config, length, method, config.trials)
            console.print(f"{method}, {length} tokens: {found.dim:g} channels")
            add(method, length, number(found.dim), False, [number(dim) for dim in found.per_trial])
    k = config.keys_per_row
    for kind in UPPER:
        if k > 1 or not kind.endswith("heuristic"):
            for n in config.lengths:
                add(kind, n, dimension_bound(n, k, config.eps1, config.eps2, kind=kind).dim, True)
    # The channels for each doubling that the theory of least squares has.
    theory = 4 * math.log(2) / math.log1p(1 / k)
    records += [{"curve": curve, **_line_in_log2(by, theory)} for curve, by in points.items()]
    return [*records, {"theory": theory}]


def _line_in_log2(curve: dict[int, float], theory: float) -> Record:
    """Channels for each doubling of the length, with half of the 95 % interval, R^2, and the share of the theory's."""
    from scipy import stats

    points = [(math.log2(n), dim) for n, dim in curve.items() if math.isfinite(dim)]
    if len(points) < 3:
        return dict.fromkeys(("slope", "slope_half_width", "r2", "over_theory"), math.nan)
    doublings, dims = zip(*points, strict=True)
    line: Any = stats.linregress(doublings, dims)
    return {
        "slope": float(line.slope),
        "slope_half_width": float(stats.t.ppf(0.975, len(points) - 2) * line.stderr),
        "r2": float(line.rvalue) ** 2,
        "over_theory": float(line.slope) / theory,
    }


def table(records: Frame) -> Iterable[str]:
    """Least channels by the number of tokens, and channels for each doubling."""
    found = having(records, "tokens")
    for name, own in parts(records):
        theory = own["theory"].dropna().iloc[0]
        title = f"least channels, by tokens; {theory:.3g} for each doubling by theory of least squares"
        more = {
            "for each doubling": slopes(own, "curve")["slope"],
            "R²": lookup(own, "curve", "r2")["r2"],
        }
        yield from tables(found[found["configuration"] == name], "tokens", "channels", title, more=more)


def figure(records: Frame) -> Figure:
    """Least channels by the number of tokens."""
    return drawn(having(records, "tokens"), "tokens", "channels", ("tokens", "channels"), ("log", "linear"))
