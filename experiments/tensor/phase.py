"""The rank that the least degree makes as sequences grow: where the polynomial method stops to pay."""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console

from approx_attention.evaluation import light_grid, method_styles
from experiments.config import Count, Positive, Seeded, Several
from experiments.results import Frame, Record
from experiments.show import having, pivot
from experiments.tensor.least_degrees import least_degree

# The powers of n that ranks are compared with; entries are given at the middle one.
POWERS = (1, 1.5, 2)


@dataclasses.dataclass(frozen=True)
class Config(Seeded):
    """Lengths n, and the bound of logits as multiples of ln n, where the theory puts the threshold.

    The theory's logits are means over log n channels, so entries up to B make logits of order m up to B^m. Weights are
    asked to be right to 1/n.
    """

    lengths: Several[Count]
    multiples: Several[Positive]
    orders: Several[Count]


def run(config: Config, directory: pathlib.Path, console: Console) -> list[Record]:
    """The exponent of the rank in n against the bound over ln n, and the entries that each order allows.

    ``crossing`` is the multiple of ln n at which the exponent passes 1, 1.5 and 2: from 2 on, third order takes no less
    than cubic time. ``spread`` is how far exponents of different lengths lie apart at most, for multiples of .2 and
    more.
    """
    records: list[Record] = []
    exponents: dict[float, list[float]] = {}
    for length in config.lengths:
        channels, log_length = round(math.log2(length)), math.log(length)
        curve = {}
        for multiple in config.multiples:
            bound = multiple * log_length
            degree = least_degree("minimax", bound, 1 / length)
            rank = math.comb(channels + degree, degree)
            curve[multiple] = math.log(rank) / log_length
            exponents.setdefault(multiple, []).append(curve[multiple])
            at: Record = {"length": length, "multiple": multiple, "bound": bound}
            records.append({**at, "degree": degree, "rank": rank, "exponent": curve[multiple]})
        for power in POWERS:
            crossing = _crossing(curve, power)
            records.append({"length": length, "power": power, "crossing": crossing})
            if power == POWERS[1]:
                for order in config.orders:
                    entries = (crossing * log_length) ** (1 / order)
                    records.append({"length": length, "order": order, "entries_at_crossing": entries})
        console.print(f"n={length}: exponents {[round(exponent, 2) for exponent in curve.values()]}")
    apart = max(max(own) - min(own) for multiple, own in exponents.items() if multiple >= 0.2)
    return [*records, {"spread": apart}]


def _crossing(curve: Mapping[float, float], power: float) -> float:
    """Where a curve first reaches a power, between two points; infinite where it does not."""
    for (before, low), (after, high) in itertools.pairwise(curve.items()):
        if low < power <= high:
            return before + (after - before) * (power - low) / (high - low)
    return math.inf


def table(records: Frame) -> Iterable[str]:
    """Bounds, degrees, ranks and exponents by multiple, and the crossings."""
    points = having(records, "multiple")
    named = points.assign(
        n=[f"n = {n:g}" for n in points["length"]],
        shown=[f"{p.bound:.2f}, {p.degree:g}, {p.rank:.3g}, {p.exponent:.2f}" for p in points.itertuples()],
    )
    yield "Bound, degree, rank, and exponent of the rank in n, by the bound over ln n"
    yield pivot(named, "multiple", "n", "shown", cell=_only, head="bound / ln n", quoted=False)
    crossings, entries = having(records, "crossing"), having(records, "entries_at_crossing")
    both = pd.concat(
        [
            crossings.assign(row=[f"rank n^{p:g}: bound / ln n" for p in crossings["power"]], at=crossings["crossing"]),
            entries.assign(
                row=[f"rank n^{POWERS[1]:g}: entries, order {m:g}" for m in entries["order"]],
                at=entries["entries_at_crossing"],
            ),
        ]
    )
    yield "Where the rank passes a power of n, and the entries that are allowed there"
    yield pivot(both, "row", "length", "at", cell=_or_beyond, quoted=False)


def _only(cells: Any) -> str:
    return str(cells[0])


def _or_beyond(figures: Any) -> str:
    return "beyond" if math.isinf(figures[0]) else f"{figures[0]:.2f}"


def figure(records: Frame) -> Figure:
    """Exponents by the entries of each order, and by their power over ln n, which is the same for all orders."""
    points = having(records, "multiple")
    orders = list(dict.fromkeys(having(records, "order")["order"]))
    drawn = Figure(figsize=(10, 4.6))
    by_entries, collapsed = drawn.subplots(1, 2, sharey=True)
    styles = method_styles([f"order {order:g}" for order in orders])
    for (n, own), line in zip(points.groupby("length", sort=False), ("-", "--", ":", "-."), strict=False):
        collapsed.plot(own["multiple"], own["exponent"], color="0.2", linestyle=line, label=f"n = {n:g}")
        for order in orders:
            style = {**styles[f"order {order:g}"], "markersize": 3, "linestyle": line}
            entries = own["bound"] ** (1 / order)
            by_entries.plot(entries, own["exponent"], label=f"order {order:g}, n = {n:g}", **style)
    by_entries.set(xlabel="entries B", ylabel="exponent of the rank in n")
    collapsed.set(xlabel="$B^m$ / ln n, the same for every order m")
    for axes in (by_entries, collapsed):
        axes.axhline(2, color="0.5", linewidth=0.8)
        light_grid(axes)
        axes.legend(fontsize=8)
    return drawn
