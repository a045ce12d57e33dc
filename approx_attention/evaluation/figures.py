"""Comparisons and plans as figures."""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from approx_attention.evaluation.comparison import Comparison
from approx_attention.evaluation.plans import Plan
from approx_attention.registry import METHODS

# Colours that the colour-blind tell apart, each with a different marker.
_STYLES = tuple(
    zip(
        ("#000000", "#999999", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#0072B2", "#8C564B", "#D55E00", "#7F3FBF"),
        "oPDv^Xs*dp",
        strict=True,
    )
)


def method_styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """A colour and a marker for each method, the same in every figure; names that are no methods take what is left.

    What is left is taken again with hollow markers once it is used up.
    """
    names = list(names)
    known = [name for name in METHODS if name in names]
    free = [i for i in range(len(_STYLES)) if i >= len(METHODS) or list(METHODS)[i] not in known]
    looks = {}
    for number, name in enumerate([name for name in names if name not in known]):
        pool = free or range(len(_STYLES))
        looks[name] = (pool[number % len(pool)], number >= len(pool))
    places = {name: list(METHODS).index(name) for name in known}
    looks |= {name: (place % len(_STYLES), place // len(_STYLES) % 2 == 1) for name, place in places.items()}
    # The third time round a colour comes with the next marker.
    turned = {name: place // (2 * len(_STYLES)) for name, place in places.items()}
    return {
        name: {
            "color": _STYLES[index][0],
            "marker": _STYLES[(index + turned.get(name, 0)) % len(_STYLES)][1],
            "markerfacecolor": "white" if hollow else _STYLES[index][0],
        }
        for name, (index, hollow) in ((name, looks[name]) for name in names)
    }


def draw_frontiers(rows: Sequence[Comparison], title: str) -> Any:
    """The figure: error against time and against cache bytes, one line per method through the sizes in the legend."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained", dpi=150)
    left, right = figure.subplots(1, 2, sharey=True)
    approximations = [row for row in rows if not row.is_exact]
    looks = method_styles(dict.fromkeys(row.method for row in approximations))
    for name, look in looks.items():
        chosen = [row for row in approximations if row.method == name]
        sizes = ", ".join(str(row.size) for row in chosen if row.size is not None)
        style = {**look, "label": f"{name} ({sizes})" if sizes else name}
        for axes, xs in (
            (left, [row.seconds * 1e3 for row in chosen]),
            (right, [None if row.held_bytes is None else row.held_bytes / 1024 for row in chosen]),
        ):
            points = [
                (x, row)
                for x, row in zip(xs, chosen, strict=True)
                if x is not None and 0 < row.relative_error < math.inf
            ]
            if not points:
                continue
            x, errors = [x for x, _ in points], [row.relative_error for _, row in points]
            axes.errorbar(x, errors, [row.relative_error_std for _, row in points], capsize=2, markersize=6, **style)
    exact = min((row for row in rows if row.is_exact), key=lambda row: row.seconds)
    left.axvline(exact.seconds * 1e3, color="0.4", linestyle="--", label=f"fastest exact ({exact.method})")
    if exact.held_bytes is not None:
        right.axvline(exact.held_bytes / 1024, color="0.4", linestyle="--")
    left.set(xlabel="time of a call (ms)", ylabel="relative error of the output")
    right.set(xlabel="cache per key head and sequence (KiB); dashed: all keys and values")
    for axes in (left, right):
        log_scales(axes)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11, parse_math=False)
    return figure


def draw_plan(made: Plan, title: str) -> Any:
    """The figure: error against size with the fit and the bound, and the bound of each candidate against its cost."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.2), layout="constrained", dpi=150)
    left, right = figure.subplots(1, 2, sharey=True)
    names = dict.fromkeys([*made.curves, *(c.method for c in made.candidates if not c.is_exact)])
    looks = method_styles(names)
    for name, curve in made.curves.items():
        sizes = np.geomspace(min(curve.measured), max(curve.measured), 64)
        color = looks[name]["color"]
        marks = {key: value for key, value in looks[name].items() if key != "color"}
        left.plot(list(curve.measured), list(curve.measured.values()), linestyle="", color=color, markersize=5, **marks)
        left.plot(sizes, [curve.error.error(size) for size in sizes], color=color, linewidth=1)
        left.plot(sizes, [curve.bound.error(size) for size in sizes], color=color, linewidth=0.8, linestyle=":")
    costs = [1e3 * c.seconds if made.rank_by == "seconds" else c.held_bytes / 1024 for c in made.candidates]
    for cost, candidate in zip(costs, made.candidates, strict=True):
        if not candidate.is_exact:
            right.plot(cost, candidate.error_bound, linestyle="", label=candidate.label, **looks[candidate.method])
    exact = min(cost for cost, candidate in zip(costs, made.candidates, strict=True) if candidate.is_exact)
    right.axvline(exact, color="0.4", linestyle="--", label="fastest exact")
    if made.pick is not None and not made.pick.is_exact:
        star = {"linestyle": "", "marker": "*", "markersize": 18, "markerfacecolor": "none", "color": "black"}
        right.plot(costs[made.candidates.index(made.pick)], made.pick.error_bound, label="pick", **star)
        if made.pick.size is not None:
            left.plot(made.pick.size, made.pick.error_bound, **star)
    for axes in (left, right):
        axes.axhline(made.tolerance, color="#D55E00", linewidth=1)
    left.set(xlabel="size (line: fit, dotted: bound for unseen heads)", ylabel="relative error of the output")
    what = "time of a call (ms)" if made.rank_by == "seconds" else "cache per key head and sequence (KiB)"
    right.set(xlabel=f"{what}; the bound of each candidate")
    for axes in (left, right):
        log_scales(axes)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=11, parse_math=False)
    return figure


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


def log_scales(axes: Any, which: str = "xy") -> None:
    """Logarithmic axes with a grid and labels that are plain numbers."""
    from matplotlib import ticker

    light_grid(axes)
    axes.margins(0.08, 0.1)
    axes.set(**{f"{name}scale": "log" for name in which})
    for axis in [{"x": axes.xaxis, "y": axes.yaxis}[name] for name in which]:
        # Axes without a point begin at 0.
        if axis.get_view_interval()[0] <= 0:
            axes.set(**{f"{axis.axis_name}lim": (0.1, 1)})
        low, high = axis.get_view_interval()
        decades = math.log10(high / low)
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(ticker.NullLocator())


def light_grid(axes: Any) -> None:
    """Light lines behind everything else."""
    axes.grid(True, color="0.9")
    axes.set_axisbelow(True)
