"""Comparisons and plans as figures."""

import contextlib
import dataclasses
import functools
import itertools
import math
import pathlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import numpy as np

from approx_attention.evaluation.comparison import Comparison
from approx_attention.evaluation.plans import Plan

# Colours that the colour-blind can distinguish: those of Okabe and Ito without yellow, which is faint on white, and
# more.
_COLORS = {
    "black": "#000000",
    "grey": "#999999",
    "green": "#009E73",
    "pink": "#CC79A7",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "blue": "#0072B2",
    "brown": "#8C564B",
    "red": "#D55E00",
    "violet": "#7F3FBF",
}
# Colour and marker of each method, the same in every figure. Methods of one colour differ in the marker or its filling.
_LOOKS = {
    "exact": ("black", "o", "full"),
    "mean_value": ("grey", "P", "full"),
    "local": ("green", "D", "full"),
    "longformer": ("pink", "v", "full"),
    "bigbird": ("orange", "^", "full"),
    "top_k": ("sky", "X", "full"),
    "lsh_top_k": ("blue", "s", "full"),
    "priority": ("brown", "o", "full"),
    "lsh_priority": ("brown", "o", "hollow"),
    "uniform_sample": ("brown", "*", "full"),
    "mean_pool": ("red", "d", "full"),
    "coreset": ("violet", "p", "full"),
    "sparse_coreset": ("black", "o", "hollow"),
    "hyper_attention": ("grey", "P", "hollow"),
    "linformer": ("green", "D", "hollow"),
    "block_linformer": ("pink", "v", "hollow"),
    "unreduced_jlt": ("orange", "^", "hollow"),
    "importance_sample": ("sky", "X", "hollow"),
    "favor": ("blue", "s", "hollow"),
    "scatterbrain": ("brown", "*", "hollow"),
    "cosformer": ("red", "d", "hollow"),
    "rfa": ("violet", "p", "hollow"),
    "ra": ("black", "P", "full"),
    "lara": ("grey", "D", "full"),
    "eva": ("green", "v", "full"),
    "nystrom": ("pink", "^", "full"),
    "skyformer": ("orange", "X", "full"),
    "polynomial": ("sky", "s", "full"),
    "svd": ("blue", "*", "full"),
}
_PICK = {"linestyle": "", "marker": "*", "markersize": 18, "markerfacecolor": "none", "color": "black"}
_TOLERANCE = {"color": _COLORS["red"], "linewidth": 1}
_EXACT_LINE = {"color": "0.4", "linestyle": "--"}
_Draw = TypeVar("_Draw", bound=Callable[..., Any])


def method_styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """A colour and a marker for each method, the same in every figure; other names get the remaining ones."""
    names = list(names)
    left = itertools.cycle([look for name, look in _LOOKS.items() if name not in names] or _LOOKS.values())
    looks = {name: _LOOKS.get(name) or next(left) for name in names}
    return {
        name: {
            "color": _COLORS[color],
            "marker": marker,
            "markerfacecolor": "white" if filling == "hollow" else _COLORS[color],
        }
        for name, (color, marker, filling) in looks.items()
    }


def figure_style() -> contextlib.AbstractContextManager[None]:
    """A context with the style of figures, `figures.mplstyle`."""
    from matplotlib import style

    return style.context(pathlib.Path(__file__).with_name("figures.mplstyle"))


def _styled(draw: _Draw) -> _Draw:
    """Decorate a function to make its figure in `figure_style`."""

    @functools.wraps(draw)
    def drawn(*args: Any) -> Any:
        with figure_style():
            return draw(*args)

    return cast(_Draw, drawn)


@_styled
def draw_frontiers(rows: Sequence[Comparison], title: str) -> Any:
    """Draw error against time and against cache bytes, one line per method through the sizes in the legend.

    Args:
        rows: the rows of a comparison. Errors that are 0 or infinite are left out.
        title: the title of the figure.

    Returns:
        The Matplotlib figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8))
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
    left.axvline(exact.seconds * 1e3, **_EXACT_LINE, label=f"fastest exact ({exact.method})")
    if exact.held_bytes is not None:
        right.axvline(exact.held_bytes / 1024, **_EXACT_LINE)
    left.set(xlabel="time of a call (ms)", ylabel="relative error of the output")
    right.set(xlabel="cache per key head and sequence (KiB); dashed: all keys and values")
    for axes in (left, right):
        log_scales(axes)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), fontsize=9)
    figure.suptitle(title, fontsize=11, parse_math=False)
    return figure


@_styled
def draw_plan(made: Plan, title: str) -> Any:
    """Draw error against size with the fit and the bound, and the bound of each candidate against its cost.

    Args:
        made: a `Plan`.
        title: the title of the figure.

    Returns:
        A matplotlib figure; save it with ``figure.savefig(path)``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.2))
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
    right.axvline(exact, **_EXACT_LINE, label="fastest exact")
    if made.pick is not None and not made.pick.is_exact:
        right.plot(costs[made.candidates.index(made.pick)], made.pick.error_bound, label="pick", **_PICK)
        if made.pick.size is not None:
            left.plot(made.pick.size, made.pick.error_bound, **_PICK)
    for axes in (left, right):
        axes.axhline(made.tolerance, **_TOLERANCE)
    left.set(xlabel="size (line: fit, dotted: bound for unseen heads)", ylabel="relative error of the output")
    what = "time of a call (ms)" if made.rank_by == "seconds" else "cache per key head and sequence (KiB)"
    right.set(xlabel=f"{what}; the bound of each candidate")
    for axes in (left, right):
        log_scales(axes)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
    figure.suptitle(title, fontsize=11, parse_math=False)
    return figure


@_styled
def draw_compared_layers(rows: Mapping[str, Sequence[Comparison]], title: str) -> Any:
    """Draw a comparison with medians over layers, and standard deviations over layers as bars."""
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
    return draw_frontiers(medians, f"{title} (medians; bars: standard deviation over layers)")


@_styled
def draw_planned_layers(plans: Mapping[str, Plan], title: str) -> Any:
    """Draw plans by layer: the held-out error of the proposed setting of every method, and the picks."""
    from matplotlib.figure import Figure

    names = list(plans)
    figure = Figure(figsize=(max(7.0, 0.5 * len(names) + 4), 5.2))
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
        axes.plot(*zip(*picks, strict=True), label="pick", **_PICK)
    axes.axhline(next(iter(plans.values())).tolerance, **_TOLERANCE, label="tolerance")
    axes.set(ylabel="relative error on held-out units")
    axes.set_xticks(range(len(names)), names, rotation=90 if len(names) > 6 else 0, fontsize=8, parse_math=False)
    log_scales(axes, "y")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
    figure.suptitle(title, fontsize=11, parse_math=False)
    return figure


def log_scales(axes: Any, which: str = "xy") -> None:
    """Make axes logarithmic, with a grid and plain numbers as labels."""
    from matplotlib import ticker

    light_grid(axes)
    axes.margins(0.08, 0.1)
    axes.set(**{f"{name}scale": "log" for name in which})
    for axis in [{"x": axes.xaxis, "y": axes.yaxis}[name] for name in which]:
        # Axes without points begin at 0.
        if axis.get_view_interval()[0] <= 0:
            axes.set(**{f"{axis.axis_name}lim": (0.1, 1)})
        low, high = axis.get_view_interval()
        decades = math.log10(high / low)
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(ticker.NullLocator())


def light_grid(axes: Any) -> None:
    """Draw light grid lines behind everything else."""
    from matplotlib import rcParams

    # Most ticks are made when a figure is saved, after its style has ended, and would have the default colour.
    axes.grid(True, color=rcParams["grid.color"])
