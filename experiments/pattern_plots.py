"""The figures of the families `tensor` and `sparse_patterns`."""

import functools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from approx_attention.evaluation import light_grid, method_styles


def _tensor_times(runs: Sequence[Mapping[str, Any]]) -> Figure:
    figure = Figure(figsize=(5.2 * len(runs) + 1, 4.4))
    panels = figure.subplots(1, len(runs), squeeze=False)[0]
    for axes, run in zip(panels, runs, strict=True):
        methods = run["result"]["methods"]
        for name, style in method_styles(methods).items():
            entry = methods[name]
            lengths = [int(n) for n in entry["seconds"]]
            label = name if not entry["slope"] else f"{name}, slope {entry['slope']['value']:.2f}"
            axes.plot(lengths, [1e3 * s for s in entry["seconds"].values()], label=label, **style)
            if entry.get("crossover"):
                axes.axvline(entry["crossover"], color=style["color"], linestyle=":", linewidth=1)
        axes.set(title=run["arm"], xscale="log", yscale="log", xlabel="tokens", ylabel="ms")
        light_grid(axes)
        axes.legend(fontsize=8)
    if any(entry.get("crossover") for run in runs for entry in run["result"]["methods"].values()):
        figure.supxlabel("dotted: from where on the polynomial method is faster", fontsize=9)
    return figure


def _polynomial_error(runs: Sequence[Mapping[str, Any]]) -> Figure:
    by = runs[0]["result"]["by"]
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    bounds = list(runs[0]["result"]["uniform"])
    shown = [(arm, bound) for arm in arms for bound in ([None] if by == "bound" else bounds)]
    figure = Figure(figsize=(4.4 * len(shown) + 1, 4.6))
    panels = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    handles: dict[str, Any] = {}
    for axes, (arm, bound) in zip(panels, shown, strict=True):
        results = [run["result"] for run in runs if run["arm"] == arm]
        for name, style in method_styles(results[0]["families"]).items():
            families = [result["families"][name] for result in results]

            def points(what: str, families: Any = families, bound: Any = bound) -> tuple[list[float], list[float]]:
                curves = [
                    {at: list(by_label.values())[-1] for at, by_label in family[what].items()}
                    if bound is None
                    else family[what][bound]
                    for family in families
                ]
                kept = [at for at in curves[0] if all(curve[at] is not None for curve in curves)]
                return [float(at) for at in kept], [statistics.fmean(curve[at] for curve in curves) for at in kept]

            (handles[name],) = axes.plot(*points("worst" if by == "degree" else "skill"), **style)
            if by == "degree":
                axes.plot(*points("certificate"), color=style["color"], linestyle=":", linewidth=1)
        if by == "degree":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        else:
            axes.axhline(1, color="0.5", linewidth=0.8)
        title = arm if bound is None else f"logits up to {bound}" + (f", {arm}" if len(arms) > 1 else "")
        label = {"degree": "degree", "rank": "rank", "bound": "largest logit"}[by]
        axes.set(title=title, xscale="linear" if by == "degree" else "log", yscale="log", xlabel=label)
        light_grid(axes)
    worst = "worst output over range of values\n(dotted: certificate)"
    panels[0].set_ylabel(worst if by == "degree" else "skill error")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=9)
    return figure


def _least_degrees(runs: Sequence[Mapping[str, Any]]) -> Figure:
    degrees = runs[0]["result"]["degrees"]
    figure = Figure(figsize=(9, 4.4))
    tolerances = list(next(iter(degrees.values())))
    chosen = list(dict.fromkeys((tolerances[len(tolerances) // 4], tolerances[-1])))
    for axes, tolerance in zip(figure.subplots(1, len(chosen), squeeze=False)[0], chosen, strict=True):
        for kind, style in method_styles(degrees).items():
            by_bound = degrees[kind][tolerance]
            axes.plot([float(bound) for bound in by_bound], list(by_bound.values()), label=kind, **style)
        axes.set(title=f"weights right to {tolerance}", xlabel="largest logit", ylabel="least degree")
        light_grid(axes)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _phase(runs: Sequence[Mapping[str, Any]]) -> Figure:
    curves = runs[0]["result"]["curves"]
    orders = list(next(iter(next(iter(curves.values())).values()))["entries"])
    figure = Figure(figsize=(10, 4.6))
    by_entries, collapsed = figure.subplots(1, 2, sharey=True)
    styles = method_styles([f"order {order}" for order in orders])
    for (n, curve), line in zip(curves.items(), ("-", "--", ":", "-."), strict=False):
        exponents = [point["exponent"] for point in curve.values()]
        collapsed.plot(
            [float(multiple) for multiple in curve], exponents, color="0.2", linestyle=line, label=f"n = {n}"
        )
        for order in orders:
            style = {**styles[f"order {order}"], "markersize": 3}
            label = f"order {order}, n = {n}"
            entries = [point["entries"][order] for point in curve.values()]
            by_entries.plot(entries, exponents, linestyle=line, label=label, **style)
    by_entries.set(xlabel="entries B", ylabel="exponent of the rank in n")
    collapsed.set(xlabel="$B^m$ / ln n, the same for every order m")
    for axes in (by_entries, collapsed):
        axes.axhline(2, color="0.5", linewidth=0.8)
        light_grid(axes)
        axes.legend(fontsize=8)
    return figure


def _tensor_match(runs: Sequence[Mapping[str, Any]]) -> Figure:
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    figure = Figure(figsize=(10, 4.6))
    curves, scores = figure.subplots(1, 2)
    for place, (arm, style) in enumerate(method_styles(arms).items()):
        results = [run["result"] for run in runs if run["arm"] == arm]
        for result in results:
            steps = [int(step) for step in result["curve"]]
            label = arm if result is results[0] else None
            curves.plot(steps, list(result["curve"].values()), color=style["color"], linewidth=1, label=label)
        scores.plot([place] * len(results), [result["accuracy"] for result in results], linestyle="", **style)
        majority = statistics.fmean(result["majority"] for result in results)
        scores.plot([place - 0.3, place + 0.3], [majority] * 2, color="0.5", linestyle=":")
    curves.set(xlabel="step", ylabel="bits", yscale="log")
    scores.set_xticks(range(len(arms)), [arm.replace("-", "\n", 1) for arm in arms], fontsize=7)
    scores.set(ylabel="accuracy (dotted: the commonest answer)")
    for axes in (curves, scores):
        light_grid(axes)
    figure.legend(*curves.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def _tensor_window(runs: Sequence[Mapping[str, Any]]) -> Figure:
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    figure = Figure(figsize=(4.6 * len(arms) + 1, 4.4))
    panels = figure.subplots(1, len(arms), squeeze=False, sharey=True)[0]
    for axes, arm in zip(panels, arms, strict=True):
        results = [run["result"] for run in runs if run["arm"] == arm]
        for name, style in method_styles(results[0]["methods"]).items():
            ranks = list(results[0]["windows"])
            means = [statistics.fmean(r["methods"][name]["skill"][rank] for r in results) for rank in ranks]
            axes.plot([int(rank) for rank in ranks], means, label=name, **style)
        axes.axhline(1, color="0.5", linewidth=0.8)
        windows = [f"{rank}\n{window}" for rank, window in results[0]["windows"].items()]
        axes.set(title=f"{arm} clusters", xscale="log", yscale="log", xlabel="rank, and the window of equal cost")
        axes.set_xticks([int(rank) for rank in ranks], windows)
        axes.minorticks_off()
        light_grid(axes)
    panels[0].set_ylabel("skill error")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _curves(runs: Sequence[Mapping[str, Any]], *, x: str, y: str, scales: tuple[str, str] = ("log", "log")) -> Figure:
    """What was measured, with marks, and the bounds as lines where they are in reach, a panel for each arm.

    A logarithmic axis leaves out an arm that is 0 throughout.
    """
    if scales[1] == "log":
        runs = [run for run in runs if any(max(curve.values()) > 0 for curve in run["result"]["curves"].values())]
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    names = dict.fromkeys(name for run in runs for kind in ("curves", "bounds") for name in run["result"][kind])
    # Constructions and bounds stand side by side: no look is kept for a method.
    styles = dict(zip(names, method_styles(f"{name} here" for name in names).values(), strict=True))
    figure = Figure(figsize=(4.6 * len(arms) + 1.5, 4.8))
    handles: dict[str, Any] = {}
    for axes, arm in zip(figure.subplots(1, len(arms), squeeze=False)[0], arms, strict=True):
        results = [run["result"] for run in runs if run["arm"] == arm]
        curves, bounds = results[0]["curves"], results[0]["bounds"]
        tops = [max(_means([result["curves"][name] for result in results]).values(), default=0) for name in curves]
        reach = float("inf") if scales[1] == "log" else 1.25 * max(tops)
        for name in [*curves, *bounds]:
            means = _means([result["curves" if name in curves else "bounds"][name] for result in results])
            if not means or min(means.values()) > reach:
                continue
            color = styles[name]["color"]
            look = styles[name] if name in curves else {"color": color, "linestyle": ":"}
            (handles[name.replace("_", " ")],) = axes.plot([float(step) for step in means], means.values(), **look)
        if scales[1] == "linear":
            axes.set_ylim(0, reach)
        steps = list(next(iter(curves.values())))
        axes.set(title=arm if len(arms) > 1 else "", xscale=scales[0], yscale=scales[1], xlabel=x, ylabel=y)
        axes.set_xticks([float(step) for step in steps], steps)
        axes.minorticks_off()
        light_grid(axes)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=9)
    return figure


def _means(curves: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """Means over seeds, where every seed has a figure."""
    figures = {step: [curve[step] for curve in curves] for step in curves[0]}
    return {step: statistics.fmean(x for x in row if x is not None) for step, row in figures.items() if None not in row}


def _headline(runs: Sequence[Mapping[str, Any]]) -> Figure:
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    figure = Figure(figsize=(4.4 * len(arms) + 1, 4.2))
    for axes, arm in zip(figure.subplots(1, len(arms), squeeze=False, sharex=True)[0], arms, strict=True):
        results = [run["result"] for run in runs if run["arm"] == arm]
        names = [name for name, entry in results[0]["methods"].items() if entry["dim"] is not None]
        dims = [statistics.fmean(result["methods"][name]["dim"] or 0 for result in results) for name in names]
        bars = axes.barh(range(len(names)), dims, color="C0")
        axes.bar_label(bars, [f"{dim:.0f}" for dim in dims], padding=3)
        axes.axvline(results[0]["tokens"], color="0.3", linestyle=":")
        axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
        axes.set(title=arm, xscale="log", xlabel="channels (dotted: tokens)")
        axes.margins(x=0.25)
        axes.invert_yaxis()
    return figure


def _picture(runs: Sequence[Mapping[str, Any]]) -> Figure:
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    figure = Figure(figsize=(8, 2.6 * len(arms) + 0.4))
    for row, arm in zip(figure.subplots(len(arms), 3, squeeze=False), arms, strict=True):
        result = next(run["result"] for run in runs if run["arm"] == arm)
        pattern, attention = (np.asarray(result["matrices"][name]) for name in ("pattern", "attention"))
        difference = attention - pattern
        largest = float(np.max(np.abs(difference)))
        row[0].imshow(pattern, cmap="Greys", vmin=0, vmax=pattern.max())
        row[1].imshow(attention, cmap="Greys", vmin=0, vmax=pattern.max())
        drawn = row[2].imshow(difference, cmap="RdBu", vmin=-largest, vmax=largest)
        figure.colorbar(drawn, ax=row[2])
        for axes, title in zip(row, (arm, f"attention, {result['head_dim']} channels", "difference"), strict=True):
            axes.set_title(title, fontsize=9)
            axes.set_xticks([])
            axes.set_yticks([])
    return figure


# The figure of a study by the name of its experiment.
FIGURES = {
    "tensor_scaling": _tensor_times,
    "tensor_decode": _tensor_times,
    "polynomial_error": _polynomial_error,
    "least_degrees": _least_degrees,
    "phase": _phase,
    "tensor_match": _tensor_match,
    "tensor_window": _tensor_window,
    "log_law": functools.partial(_curves, x="tokens", y="channels", scales=("log", "linear")),
    "headline": _headline,
    "budget": functools.partial(_curves, x="largest logit allowed", y="channels"),
    "many_patterns": functools.partial(_curves, x="channels", y="share of patterns", scales=("log", "linear")),
    "precision": functools.partial(_curves, x="largest ratio of zero to nonzero", y="error of ratios of nonzeros"),
    "picture": _picture,
}
