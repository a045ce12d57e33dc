"""Channels that sparse patterns need: as tokens, keys a row, precision or the largest logit grow."""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Iterable
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from approx_attention import dimension_bound
from experiments.config import Count, Positive, Seeded, Several
from experiments.fits import line, slope
from experiments.results import Frame, Record
from experiments.show import Scales, curves, having, lookup, parts, pivot, slopes, whole
from experiments.sparse_patterns.search import Target, least_channels

# Bounds that are drawn with the measurements.
UPPER = ("johnson_lindenstrauss", "projection_heuristic", "orthogonal_heuristic", "least_squares_exact")
GROWING = {"precision": "precisions", "budget": "budgets", "keys": "keys_per_row", "tokens": "lengths"}
AXES = {
    "precision": "log((1 + eps2) / eps1) / log(1 + eps2)",
    "budget": "largest logit allowed",
    "keys": "keys a row",
    "tokens": "tokens",
}


@dataclasses.dataclass(frozen=True)
class Config(Seeded):
    """Patterns, the constructions, and the one quantity that grows.

    Attributes:
        target: ``random`` patterns with k keys in rows and columns; the k largest logits of each query of a causal
            head, ``sharp_head`` or ``diffuse_head`` of the sample, or ``random_head`` with random logits.
        keys_per_row: k.
        precisions: pairs of eps1 and eps2.
        budgets: largest logits that are accepted; any without them.
        trials: samples, over which the median is taken.
        num_steps: gradient steps of the methods that take any.
    """

    methods: Several[str]
    target: Target = "random"
    lengths: Several[Count] = dataclasses.field(default_factory=lambda: [256])
    keys_per_row: Several[Count] = dataclasses.field(default_factory=lambda: [1])
    precisions: Several[tuple[Positive, Positive]] = dataclasses.field(default_factory=lambda: [(0.5, 1.0)])
    budgets: list[Positive] = dataclasses.field(default_factory=list)
    trials: Count = 5
    num_steps: Count = 300

    def __post_init__(self) -> None:
        if sum(len(getattr(self, of)) > 1 for of in GROWING.values()) > 1:
            raise ValueError(f"only one of {', '.join(GROWING.values())} can grow in one run")


def run(config: Config, directory: pathlib.Path, console: Console) -> list[Record]:
    """The least channels of each method at each step, the bounds, and lines through them.

    With tokens that grow ``slope`` is in channels for each doubling, and ``over_theory`` divides it by that of least
    squares; else it is the exponent.
    """
    records: list[Record] = []
    points: dict[str, dict[float, list[float]]] = {}
    ratios: list[float] = []
    by = grows(config)
    every = itertools.product(config.lengths, config.keys_per_row, config.precisions, config.budgets or [None])
    for length, k, eps, budget in every:
        shape = length, k, *eps
        precision = 1 - math.log(eps[0]) / math.log1p(eps[1])
        step: dict[str, Any] = {"tokens": length, "keys": k, "precision": precision, "budget": budget}
        bounds = {kind: dimension_bound(*shape, kind=kind).dim for kind in UPPER if k > 1 or "heuristic" not in kind}
        options: dict[str, Any] = {}
        if budget is not None:
            bounds = {"packing": dimension_bound(*shape, kind="packing", max_logit=budget).dim}
            options = {"max_logit": budget, "max_dim": 2 * length}
        for method in config.methods:
            trials = least_channels(config, length, k, eps, method, **options)
            median = sorted(trials)[len(trials) // 2]
            console.print(f"{method}, {by} {step[by]}: {median} channels")
            records.append({"curve": method, "is_bound": False, **step, "channels": median, "trials": trials})
            points.setdefault(method, {})[step[by]] = trials
            ratios += [median / bounds["packing"]] if budget else []
        for kind, dim in bounds.items():
            records.append({"curve": kind, "is_bound": True, **step, "channels": dim})
            points.setdefault(kind, {})[step[by]] = [dim]
    if by == "tokens":
        # The channels for each doubling that the theory of least squares has.
        theory = 4 * math.log(2) / math.log1p(1 / config.keys_per_row[0])
        records += [{"curve": curve, **line_in_log2(of, theory)} for curve, of in points.items()]
        records.append({"theory": theory})
    else:
        medians = {curve: {x: sorted(dims)[len(dims) // 2] for x, dims in of.items()} for curve, of in points.items()}
        records += [{"curve": curve, **slope(of)} for curve, of in medians.items()]
    return [*records, {"least_over_bound": min(ratios)}] if ratios else records


def grows(config: Config) -> str:
    """The column of the quantity that grows."""
    return next((name for name, of in GROWING.items() if len(getattr(config, of)) > 1), "tokens")


def line_in_log2(curve: dict[float, list[float]], theory: float) -> Record:
    """Channels for each doubling of the length over all trials, with interval, R^2, and the share of the theory's."""
    points = [(math.log2(n), dim) for n, dims in curve.items() for dim in dims if math.isfinite(dim)]
    found, half, r2 = line([n for n, _ in points], [dim for _, dim in points])
    return {"slope": found, "slope_half_width": half, "r2": r2, "over_theory": found / theory}


def table(records: Frame) -> Iterable[str]:
    """Least channels by the quantity that grows, and their slopes."""
    for _, own in parts(records):
        found = having(own, "channels")
        by = _growing(found)
        more = {"for each doubling" if by == "tokens" else "exponent": slopes(own, "curve")["slope"]}
        title = f"least channels, by {AXES[by]}"
        if by == "tokens":
            more["R²"] = lookup(own, "curve", "r2")["r2"]
            title += f"; {own['theory'].dropna().iloc[0]:.3g} for each doubling by theory of least squares"
        yield from tables(found, by, "channels", title, more=more)


def figure(records: Frame) -> Figure:
    """Least channels by the quantity that grows."""
    found = having(records, "channels")
    grown = {name: _growing(own) for name, own in parts(found)}
    by = next(iter(grown.values()))
    if by == "precision":  # no round numbers, some of them close to each other
        return drawn(found, by, "channels", (AXES[by], "channels"), ("linear", "log"), ticks=None)
    scales: Scales = ("log", "linear" if by in ("tokens", "keys") else "log")
    return drawn(found, by, "channels", (AXES[by], "channels"), scales)


def _growing(records: Frame) -> str:
    return next((name for name in GROWING if name in records and records[name].nunique() > 1), "tokens")


def tables(records: Frame, x: str, y: str, title: str, **more: Any) -> Iterable[str]:
    """What was measured by curve, and below it the bounds, by configuration."""
    for name, own in parts(records):
        yield f"`{name}`: {title}"
        yield pivot(own.sort_values(x, kind="stable"), "curve", x, y, cell=whole, quoted=False, **more)


def drawn(records: Frame, x: str, y: str, labels: tuple[str, str], scales: Scales, **more: Any) -> Figure:
    """What was measured, with marks, and the bounds as dotted lines where they are in reach."""
    finite = records[records[y].map(math.isfinite)]
    if scales[1] == "log":
        # A logarithm leaves out what is 0 throughout.
        finite = finite[finite[y] > 0]
    else:
        reach = 1.25 * finite[~finite["is_bound"].astype(bool)].groupby("configuration")[y].max()
        finite = finite[finite[y] <= finite["configuration"].map(reach)]
    bounds = list(dict.fromkeys(records[records["is_bound"].astype(bool)]["curve"]))
    return curves(finite, x=x, y=y, by="curve", labels=labels, scales=scales, dotted=bounds, size=(4.8, 4.2), **more)
