"""The figure of each kind of study, from its results."""

import functools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from approx_attention.evaluation import light_grid, method_styles
from experiments.whole_picture import figures


def draw(experiment: str, runs: Sequence[Mapping[str, Any]]) -> Figure:
    """The figure of a study."""
    return _FIGURES[experiment](runs)


def _quality(runs: Sequence[Mapping[str, Any]]) -> Figure:
    octaves = list(runs[0]["result"]["test"].get("by_position", {}))
    figure = Figure(figsize=(10, 4.2), layout="constrained", dpi=150)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1) if octaves else (0.01, 1))
    styles = method_styles(dict.fromkeys(run["arm"] for run in runs))
    for arm, style in styles.items():
        results = [run["result"] for run in runs if run["arm"] == arm]
        means = [statistics.fmean(result["test"]["by_position"][octave] for result in results) for octave in octaves]
        left.plot(octaves, means, label=arm, **style)
        right.plot(
            [result["attention_error"]["method"]["mean"] for result in results],
            [result["test"]["bits"] for result in results],
            linestyle="",
            **style,
        )
    left.set(xlabel="position in the sequence", ylabel="test bits per token")
    left.tick_params(axis="x", rotation=30)
    right.set(xlabel="relative error of the attention, on the model's own tensors", ylabel="test bits per token")
    for axes in (left, right):
        light_grid(axes)
    # A whole example is classified at no position.
    left.set_visible(bool(octaves))
    if not octaves:
        right.set_ylabel("test bits per example")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    return figure


def _swap_in(runs: Sequence[Mapping[str, Any]]) -> Figure:
    figure = Figure(figsize=(7, 4.4), layout="constrained", dpi=150)
    axes = figure.subplots()
    exact, losses = [run["result"]["methods"]["exact"]["bits"] for run in runs], []
    for name, style in method_styles(runs[0]["result"]["methods"]).items():
        if name == "exact":
            continue
        results = [run["result"]["methods"][name] for run in runs]
        lost = [result["bits"] - bits for result, bits in zip(results, exact, strict=True)]
        losses += lost
        axes.plot([r["attention_error"]["mean"] for r in results], lost, linestyle="", label=name, **style)
    axes.set(
        xscale="log",
        xlabel="relative error of the attention",
        ylabel="test bits per token lost against exact,\nwithout further training",
    )
    if min(losses) > 0:
        axes.set_yscale("log")
    else:
        axes.set_yscale("symlog", linthresh=1e-2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.grid(True, which="both", color="0.9")
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


def _long_context(runs: Sequence[Mapping[str, Any]]) -> Figure:
    figure = Figure(figsize=(10, 7.5), layout="constrained", dpi=150)
    panels = list(figure.subplots(2, 2, sharex=True).flat)
    handles: dict[str, Any] = {}
    for axes, run in zip(panels, runs, strict=False):
        styles = method_styles(name for name in run["result"]["methods"] if name != "best exact")
        for name, entry in run["result"]["methods"].items():
            lengths = [int(n) for n in entry["seconds"]]
            style = {"color": "0.3", "linestyle": "--"} if name == "best exact" else styles[name]
            (handles[name],) = axes.plot(lengths, [1e3 * s for s in entry["seconds"].values()], **style)
        axes.set(title=run["arm"].replace("_", " and "), xscale="log", yscale="log", ylabel="time of a layer (ms)")
        axes.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
        axes.minorticks_off()
        light_grid(axes)
    for axes in panels[-2:]:
        axes.set_xlabel("tokens")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, frameon=False)
    return figure


def _gap(runs: Sequence[Mapping[str, Any]]) -> Figure:
    figure = Figure(figsize=(10, 4.6), layout="constrained", dpi=150)
    axes = figure.subplots()
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    names = list(dict.fromkeys(name for run in runs for name in run["result"]["methods"]))
    for name, style in method_styles(names).items():
        points = []
        for place, arm in enumerate(arms):
            errors = [run["result"]["methods"].get(name, {}).get("error") for run in runs if run["arm"] == arm]
            if None not in errors:
                points.append((place, statistics.fmean(errors)))
        axes.plot(*zip(*points, strict=True), label=name, linewidth=0.8, **style)
    axes.set_xticks(
        range(len(arms)), [arm.replace("-spread", "\nspread").replace("-", " ") for arm in arms], fontsize=8
    )
    axes.set(yscale="log", ylabel="relative error to softmax attention")
    light_grid(axes)
    figure.legend(loc="outside lower center", ncols=7, frameon=False, fontsize=9)
    return figure


def _bias(runs: Sequence[Mapping[str, Any]]) -> Figure:
    figure = Figure(figsize=(9, 4.2), layout="constrained", dpi=150)
    panels = figure.subplots(1, 2, sharex=True)
    for name, style in method_styles(runs[0]["result"]["methods"]).items():
        results = [run["result"]["methods"][name] for run in runs]
        for axes, what in zip(panels, ("bias", "deviation"), strict=True):
            sizes = [int(n) for n in results[0][what]]
            means = [statistics.fmean(r[what][str(n)] for r in results) for n in sizes]
            noise = [statistics.fmean(r["noise"][str(n)] for r in results) for n in sizes]
            seen = [m if what == "deviation" or m > 2 * e else float("nan") for m, e in zip(means, noise, strict=True)]
            axes.plot(sizes, seen, label=name, **style)
            if what == "bias":
                axes.plot(sizes, noise, color=style["color"], linestyle=":", linewidth=1)
    for axes, title in zip(panels, ("bias (dotted: what could be seen)", "deviation of one draw"), strict=True):
        axes.set(title=title, xscale="log", yscale="log", xlabel="features or samples", ylabel="relative to attention")
        light_grid(axes)
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    return figure


def _continuum(runs: Sequence[Mapping[str, Any]]) -> Figure:
    figure = Figure(figsize=(7, 4.2), layout="constrained", dpi=150)
    axes = figure.subplots()
    results = [run["result"] for run in runs]
    sizes = list(results[0]["errors"])
    for size, style in zip(sizes, method_styles(sizes).values(), strict=True):
        groups = list(results[0]["errors"][size])
        # One key per group is exact; what is left is rounding.
        means = [max(statistics.fmean(r["errors"][size][n] for r in results), 1e-7) for n in groups]
        axes.plot([int(n) for n in groups], means, label=f"{size} keys exactly", **style)
    axes.axhline(statistics.fmean(r["random_features"] for r in results), color="0.5", linestyle=":")
    axes.annotate("random features", (1, statistics.fmean(r["random_features"] for r in results)), va="bottom")
    axes.set(xscale="log", yscale="log", xlabel="groups of keys with a coefficient each", ylabel="relative error")
    light_grid(axes)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def _coreset_error(runs: Sequence[Mapping[str, Any]]) -> Figure:
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    columns = min(3, len(arms))
    rows = -(-len(arms) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows + 0.8), layout="constrained", dpi=150)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    names = list(dict.fromkeys(name for run in runs for name in run["result"]["methods"]))
    styles, handles = method_styles(names), {}
    for axes, arm in zip(panels, arms, strict=False):
        results = [run["result"] for run in runs if run["arm"] == arm]
        steps = [float(step) for step in results[0]["mean_value"]]
        for name in results[0]["methods"]:
            errors = [list(r["methods"][name]["error"].values()) for r in results]
            # What is exact but for rounding stands at the foot.
            means = [max(statistics.fmean(x), 1e-5) for x in zip(*errors, strict=True)]
            (handles[name],) = axes.plot(steps, means, **styles[name])
            if len(errors) > 1:
                low, high = ([max(f(x), 1e-5) for x in zip(*errors, strict=True)] for f in (min, max))
                axes.fill_between(steps, low, high, color=styles[name]["color"], alpha=0.15, linewidth=0)
        trivial = [statistics.fmean(x) for x in zip(*(r["mean_value"].values() for r in results), strict=True)]
        (handles["mean of the values"],) = axes.plot(steps, trivial, color="0.5", linestyle=":")
        grows = results[0]["grows"]
        axes.set(title=arm, yscale="log", xscale="linear" if grows == "radii" else "log")
        axes.set(xlabel={"sizes": "tokens kept", "radii": "norm of the queries", "head_dims": "dimension"}[grows])
        axes.set_xticks(steps, [f"{step:g}" for step in steps])
        axes.minorticks_off()
        light_grid(axes)
    for axes in panels[len(arms) :]:
        axes.set_visible(False)
    figure.supylabel("greatest error over all queries")
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=columns + 1, frameon=False, fontsize=9
    )
    return figure


def _cache(runs: Sequence[Mapping[str, Any]]) -> Figure:
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    figure = Figure(figsize=(5.2 * len(arms) + 1, 4.6), layout="constrained", dpi=150)
    panels = figure.subplots(1, len(arms), squeeze=False)[0]
    handles: dict[str, Any] = {}
    for axes, arm in zip(panels, arms, strict=True):
        results = [run["result"] for run in runs if run["arm"] == arm]
        for policy, style in method_styles(results[0]["policies"]).items():
            shares = list(results[0]["policies"][policy])
            lost = [
                statistics.fmean(r["policies"][policy][s]["bits"] - r["exact"]["bits"] for r in results) for s in shares
            ]
            (handles[policy],) = axes.plot([100 * float(s) for s in shares], [max(x, 1e-4) for x in lost], **style)
        axes.set(title=arm.replace("_", " "), xscale="log", yscale="log", xlabel="tokens kept of the prefix (%)")
        axes.set_xticks([100 * float(s) for s in shares], [f"{100 * float(s):g}" for s in shares])
        axes.minorticks_off()
        light_grid(axes)
    panels[0].set_ylabel("bits per token lost after the prefix")
    columns = 1 + 2 * len(arms)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=8
    )
    return figure


def _latency(runs: Sequence[Mapping[str, Any]]) -> Figure:
    figure = Figure(figsize=(9, 4.2), layout="constrained", dpi=150)
    result = runs[0]["result"]
    titles = {"prefill": "compression beside exact causal attention", "decode": "one decoding step"}
    styles = method_styles(result["decode"])  # which has every arm
    for axes, (name, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for arm in result[name]:
            lengths = [int(n) for n in result[name][arm]]
            axes.plot(lengths, [1e3 * s for s in result[name][arm].values()], label=arm, **styles[arm])
        axes.set(title=title, xscale="log", yscale="log", xlabel="tokens in the cache", ylabel="ms")
        axes.set_xticks(lengths, [f"{n // 1024}k" for n in lengths])
        axes.minorticks_off()
        light_grid(axes)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return figure


def _errors_by_size(runs: Sequence[Mapping[str, Any]]) -> Figure:
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    figure = Figure(figsize=(5.2 * len(arms) + 1, 5), layout="constrained", dpi=150)
    panels = figure.subplots(1, len(arms), squeeze=False)[0]
    handles: dict[str, Any] = {}
    for axes, arm in zip(panels, arms, strict=True):
        results = [run["result"] for run in runs if run["arm"] == arm]
        names = [name for name in results[0]["errors"] if not name.endswith(", closed form")]
        # Sketches and methods stand side by side: no look is kept for a method.
        for name, style in zip(names, method_styles(f"{name} here" for name in names).values(), strict=True):
            sizes = list(results[0]["errors"][name])
            # An exact answer stands at the foot.
            means = [max(statistics.fmean(r["errors"][name][n] for r in results), 1e-3) for n in sizes]
            (handles[name],) = axes.plot([int(n) for n in sizes], means, **style)
            promised = results[0]["errors"].get(f"{name}, closed form")
            if promised:
                line = [max(x, 1e-3) for x in promised.values()]
                (handles["closed form"],) = axes.plot([int(n) for n in sizes], line, color="0.2", linewidth=0.8)
        if "mean_value" in results[0]:
            trivial = statistics.fmean(r["mean_value"] for r in results)
            handles["mean of the values"] = axes.axhline(trivial, color="0.5", linestyle=":")
        axes.set(title=arm, xscale="log", yscale="log", xlabel="rows or slots")
        axes.set_xticks([int(n) for n in sizes], sizes)
        axes.minorticks_off()
        light_grid(axes)
    panels[0].set_ylabel("error relative to exact attention")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _spectra(runs: Sequence[Mapping[str, Any]]) -> Figure:
    figure = Figure(figsize=(9, 4.2), layout="constrained", dpi=150)
    results = [run["result"] for run in runs]
    titles = {"weights": "of P", "centred": "of P less the uniform weights"}
    for axes, (kind, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        for name, line in (("trained", "-"), ("initial", ":")):
            layers = results[0][name]["curves"][kind]
            for layer, style in method_styles(layers).items():
                curve = [
                    statistics.fmean(x) for x in zip(*(r[name]["curves"][kind][layer] for r in results), strict=True)
                ]
                ranks = range(1, len(curve) + 1)
                axes.plot(ranks, curve, color=style["color"], linestyle=line, label=f"{layer}, {name}")
        axes.set(title=f"singular values {title}", xlabel="how many")
        light_grid(axes)
    figure.supylabel("share of their sum")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _tensor_times(runs: Sequence[Mapping[str, Any]]) -> Figure:
    figure = Figure(figsize=(5.2 * len(runs) + 1, 4.4), layout="constrained", dpi=150)
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
        axes.legend(frameon=False, fontsize=8)
    if any(entry.get("crossover") for run in runs for entry in run["result"]["methods"].values()):
        figure.supxlabel("dotted: from where on the polynomial method is faster", fontsize=9)
    return figure


def _polynomial_error(runs: Sequence[Mapping[str, Any]]) -> Figure:
    by = runs[0]["result"]["by"]
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    bounds = list(runs[0]["result"]["uniform"])
    shown = [(arm, bound) for arm in arms for bound in ([None] if by == "bound" else bounds)]
    figure = Figure(figsize=(4.4 * len(shown) + 1, 4.6), layout="constrained", dpi=150)
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
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _least_degrees(runs: Sequence[Mapping[str, Any]]) -> Figure:
    degrees = runs[0]["result"]["degrees"]
    figure = Figure(figsize=(9, 4.4), layout="constrained", dpi=150)
    tolerances = list(next(iter(degrees.values())))
    chosen = list(dict.fromkeys((tolerances[len(tolerances) // 4], tolerances[-1])))
    for axes, tolerance in zip(figure.subplots(1, len(chosen), squeeze=False)[0], chosen, strict=True):
        for kind, style in method_styles(degrees).items():
            by_bound = degrees[kind][tolerance]
            axes.plot([float(bound) for bound in by_bound], list(by_bound.values()), label=kind, **style)
        axes.set(title=f"weights right to {tolerance}", xlabel="largest logit", ylabel="least degree")
        light_grid(axes)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _phase(runs: Sequence[Mapping[str, Any]]) -> Figure:
    curves = runs[0]["result"]["curves"]
    orders = list(next(iter(next(iter(curves.values())).values()))["entries"])
    figure = Figure(figsize=(10, 4.6), layout="constrained", dpi=150)
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
        axes.legend(frameon=False, fontsize=8)
    return figure


def _tensor_match(runs: Sequence[Mapping[str, Any]]) -> Figure:
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    figure = Figure(figsize=(10, 4.6), layout="constrained", dpi=150)
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
    figure.legend(*curves.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return figure


def _tensor_window(runs: Sequence[Mapping[str, Any]]) -> Figure:
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    figure = Figure(figsize=(4.6 * len(arms) + 1, 4.4), layout="constrained", dpi=150)
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
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
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
    figure = Figure(figsize=(4.6 * len(arms) + 1.5, 4.8), layout="constrained", dpi=150)
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
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _means(curves: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """Means over seeds, where every seed has a figure."""
    figures = {step: [curve[step] for curve in curves] for step in curves[0]}
    return {step: statistics.fmean(x for x in row if x is not None) for step, row in figures.items() if None not in row}


def _headline(runs: Sequence[Mapping[str, Any]]) -> Figure:
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    figure = Figure(figsize=(4.4 * len(arms) + 1, 4.2), layout="constrained", dpi=150)
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
    figure = Figure(figsize=(8, 2.6 * len(arms) + 0.4), layout="constrained", dpi=150)
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


_FIGURES = {
    "where_we_lose": figures.draw_losses,
    "equal_time": figures.draw_equal_time,
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
    "sketch": _errors_by_size,
    "projection_fit": _errors_by_size,
    "spectra": _spectra,
    "coreset_error": _coreset_error,
    "cache": _cache,
    "latency": _latency,
    "continuum": _continuum,
    "quality": _quality,
    "swap_in": _swap_in,
    "zoo": figures.draw_zoo,
    "long_context": _long_context,
    "gap": _gap,
    "bias": _bias,
}
