"""Several layers of one file: what each method loses over them, in the middle and at worst."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from approx_attention.evaluation.comparison import (
    FRONTIER,
    TRIVIAL,
    TRIVIAL_FOOTNOTE,
    best_rows,
    draw_frontiers,
    in_units,
    no_better_than_mean,
    plain_table,
    times,
)
from approx_attention.evaluation.diagnostics import Comparison
from approx_attention.evaluation.figures import log_scales, method_styles
from approx_attention.evaluation.planning import Candidate, Plan


@dataclasses.dataclass(frozen=True)
class OverLayers:
    """One method, at one size where all layers have the same, over the layers that it was measured on.

    Attributes:
        method: its name.
        size: the size of its summary, if it has one and it is the same in all layers.
        num_layers: how many layers it was measured on.
        relative_error: the median over layers.
        worst_error: the largest of a layer.
        worst_layer: that layer.
        seconds: the median over layers.
        speedup: the median over layers.
        held_bytes: the most of a layer, if known.
        is_exact: whether it is a form of exact attention.
        num_picked: of how many layers it is the pick of a plan.
        num_meets: in how many layers its measured error meets the tolerance of a plan.
    """

    method: str
    size: int | None
    num_layers: int
    relative_error: float
    worst_error: float
    worst_layer: str
    seconds: float
    speedup: float
    held_bytes: int | None
    is_exact: bool
    num_picked: int = 0
    num_meets: int = 0


def compared_over_layers(rows: Mapping[str, Sequence[Comparison]]) -> list[OverLayers]:
    """Each method at each size, over layers."""
    settings = dict.fromkeys((row.method, row.size) for own in rows.values() for row in own)
    return [
        _over_layers(
            {layer: row for layer, own in rows.items() for row in own if (row.method, row.size) == setting},
            lambda row: row.relative_error,
        )
        for setting in settings
    ]


def planned_over_layers(plans: Mapping[str, Plan]) -> list[OverLayers]:
    """Each method at the size that each layer's plan proposes first; errors are those of what was held out."""
    methods = dict.fromkeys(candidate.method for made in plans.values() for candidate in made.candidates)
    summary = []
    for method in methods:
        own: dict[str, Candidate] = {}
        for layer, made in plans.items():
            for candidate in made.candidates:
                if candidate.method == method:
                    own.setdefault(layer, candidate)
        picked = sum(made.pick is not None and made.pick.method == method for made in plans.values())
        found = _over_layers(own, lambda row: row.held_out_error)
        meets = sum(candidate.meets for candidate in own.values())
        summary.append(dataclasses.replace(found, num_picked=picked, num_meets=meets))
    return sorted(summary, key=lambda row: (-row.num_picked, -row.num_meets, row.is_exact))


def _over_layers(rows: Mapping[str, Any], error: Callable[[Any], float]) -> OverLayers:
    # An error that is no number is the worst.
    errors = {layer: math.inf if math.isnan(error(row)) else error(row) for layer, row in rows.items()}
    worst = max(errors, key=lambda layer: errors[layer])
    own = list(rows.values())
    sizes = {row.size for row in own}
    held = [row.held_bytes for row in own if row.held_bytes is not None]
    return OverLayers(
        method=own[0].method,
        size=own[0].size if len(sizes) == 1 else None,
        num_layers=len(own),
        relative_error=statistics.median(errors.values()),
        worst_error=errors[worst],
        worst_layer=worst,
        seconds=statistics.median(row.seconds for row in own),
        speedup=statistics.median(row.speedup for row in own),
        held_bytes=max(held, default=None),
        is_exact=own[0].is_exact,
    )


def comparison_summary_table(summary: Sequence[OverLayers], title: str) -> Table:
    """The comparisons of all layers in one table."""
    table = plain_table(
        title,
        "median and worst: relative error over layers · worst in: the layer of the worst error · time, than exact: "
        f"medians over layers · cache: the most bytes of a layer · * on the frontier of error against time · "
        f"{TRIVIAL_FOOTNOTE}",
        *("method", "size", "cache", "time", "than exact", "layers", "median", "worst", "worst in"),
    )
    frontier, trivial = best_rows(summary), no_better_than_mean(summary)
    for i, row in enumerate(summary):
        table.add_row(
            Text(f"{row.method}{FRONTIER if i in frontier else ''}{TRIVIAL if i in trivial else ''}"),
            "" if row.size is None else str(row.size),
            "" if row.held_bytes is None else in_units(row.held_bytes),
            f"{row.seconds * 1e3:.3g} ms",
            times(row.speedup, "faster", "slower"),
            str(row.num_layers),
            f"{row.relative_error:.3g}",
            f"{row.worst_error:.3g}",
            Text(row.worst_layer),
            style="bold" if i in frontier else "dim" if row.is_exact else "",
        )
    return table


def picks_table(plans: Mapping[str, Plan], title: str) -> Table:
    """What is recommended for each layer."""
    table = plain_table(
        title,
        "held out: relative error of what was held out · than exact: the fastest form of it",
        *("layer", "pick", "at most", "held out", "cache", "time", "than exact"),
    )
    for layer, made in plans.items():
        pick = made.pick
        cells = ("nothing meets the tolerance",)
        if pick is not None:
            cells = (
                pick.label,
                "" if pick.is_exact else f"{pick.error_bound:.3g}",
                f"{pick.held_out_error:.3g}",
                in_units(pick.held_bytes),
                f"{pick.seconds * 1e3:.3g} ms",
                times(pick.speedup, "faster", "slower"),
            )
        table.add_row(Text(layer), *cells)
    return table


def plan_summary_table(summary: Sequence[OverLayers], title: str) -> Table:
    """The plans of all layers by method."""
    table = plain_table(
        title,
        "picked: of how many layers it is the pick · meets: in how many layers its held-out error meets the tolerance "
        "· median and worst: of the held-out error over layers, at the size that each plan proposes · worst in: the "
        f"layer of the worst error · {TRIVIAL_FOOTNOTE}",
        *("method", "picked", "meets", "layers", "median", "worst", "worst in", "than exact"),
    )
    trivial = no_better_than_mean(summary)
    for i, row in enumerate(summary):
        table.add_row(
            Text(f"{row.method}{TRIVIAL if i in trivial else ''}"),
            str(row.num_picked),
            str(row.num_meets),
            str(row.num_layers),
            f"{row.relative_error:.3g}",
            f"{row.worst_error:.3g}",
            Text(row.worst_layer),
            times(row.speedup, "faster", "slower"),
            style="bold" if row.num_picked else "dim" if row.is_exact else "",
        )
    return table


def draw_compared_layers(rows: Mapping[str, Sequence[Comparison]], title: str) -> Any:
    """The figure of a comparison with medians over layers, and the deviation of layers as bars."""
    medians = []
    for setting in dict.fromkeys((row.method, row.size) for own in rows.values() for row in own):
        own = [row for layer in rows.values() for row in layer if (row.method, row.size) == setting]
        errors = [row.relative_error for row in own]
        medians.append(
            dataclasses.replace(
                own[0],
                seconds=statistics.median(row.seconds for row in own),
                relative_error=statistics.median(errors),
                relative_error_std=statistics.pstdev(errors) if all(map(math.isfinite, errors)) else 0.0,
            )
        )
    return draw_frontiers(medians, f"{title} (medians, and the deviation of layers as bars)")


def draw_planned_layers(plans: Mapping[str, Plan], title: str) -> Any:
    """The figure of plans by layer: the held-out error of what each proposes of every method, and the picks."""
    from matplotlib.figure import Figure

    names = list(plans)
    figure = Figure(figsize=(max(7.0, 0.5 * len(names) + 4), 5.2), layout="constrained", dpi=150)
    axes = figure.subplots()
    methods = dict.fromkeys(c.method for made in plans.values() for c in made.candidates if not c.is_exact)
    for method, look in method_styles(methods).items():
        found = [next((c for c in made.candidates if c.method == method), None) for made in plans.values()]
        points = [(i, c.held_out_error) for i, c in enumerate(found) if c and 0 < c.held_out_error < math.inf]
        if points:
            axes.plot(*zip(*points, strict=True), label=method, markersize=5, linewidth=0.8, **look)
    picks = [(i, made.pick) for i, made in enumerate(plans.values()) if made.pick and made.pick.held_out_error > 0]
    picks = [(i, pick.held_out_error) for i, pick in picks if not pick.is_exact]
    if picks:
        star = {"linestyle": "", "marker": "*", "markersize": 18, "markerfacecolor": "none", "color": "black"}
        axes.plot(*zip(*picks, strict=True), label="pick", **star)
    axes.axhline(next(iter(plans.values())).tolerance, color="#D55E00", linewidth=1, label="tolerance")
    axes.set(ylabel="relative error of what was held out")
    axes.set_xticks(range(len(names)), names, rotation=90 if len(names) > 6 else 0, fontsize=8, parse_math=False)
    log_scales(axes, "y")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=11, parse_math=False)
    return figure
