"""The figure of each kind of study, from its results."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from approx_attention.evaluation import figure_style, light_grid, method_styles
from experiments import pattern_plots
from experiments.whole_picture import figures


def draw(experiment: str, runs: Sequence[Mapping[str, Any]]) -> Figure:
    """The figure of a study."""
    with figure_style():
        return _FIGURES[experiment](runs)


def _quality(runs: Sequence[Mapping[str, Any]]) -> Figure:
    octaves = list(runs[0]["result"]["test"].get("by_position", {}))
    figure = Figure(figsize=(10, 4.2))
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
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


def _swap_in(runs: Sequence[Mapping[str, Any]]) -> Figure:
    figure = Figure(figsize=(7, 4.4))
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
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def _long_context(runs: Sequence[Mapping[str, Any]]) -> Figure:
    figure = Figure(figsize=(10, 7.5))
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
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6)
    return figure


def _gap(runs: Sequence[Mapping[str, Any]]) -> Figure:
    figure = Figure(figsize=(10, 4.6))
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
    figure.legend(loc="outside lower center", ncols=7, fontsize=9)
    return figure


def _bias(runs: Sequence[Mapping[str, Any]]) -> Figure:
    figure = Figure(figsize=(9, 4.2))
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
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


def _continuum(runs: Sequence[Mapping[str, Any]]) -> Figure:
    figure = Figure(figsize=(7, 4.2))
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
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _coreset_error(runs: Sequence[Mapping[str, Any]]) -> Figure:
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    columns = min(3, len(arms))
    rows = -(-len(arms) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows + 0.8))
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
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns + 1, fontsize=9)
    return figure


def _coreset_bytes(runs: Sequence[Mapping[str, Any]]) -> Figure:
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    columns = min(4, len(arms))
    rows = -(-len(arms) // columns)
    figure = Figure(figsize=(3.6 * columns, 3.4 * rows + 0.8))
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    styles, handles = method_styles(list(runs[0]["result"]["tokens"])), {}
    for axes, arm in zip(panels, arms, strict=False):
        results = [run["result"] for run in runs if run["arm"] == arm]
        shares = list(next(iter(results[0]["tokens"].values())))
        for form, style in styles.items():
            # The best of the algorithms on each run; the ring is all tokens in that format, without a choice.
            best = [[min(by[form][share] for by in r["errors"].values()) for share in shares] for r in results]
            means = [max(statistics.fmean(x), 1e-5) for x in zip(*best, strict=True)]
            (handles[form],) = axes.plot([float(share) for share in shares], means, **styles[form])
            alone = max(statistics.fmean(r["all_tokens"][form] for r in results), 1e-5)
            if form != "float32":
                axes.plot(
                    results[0]["all_share"][form], alone, "o", color=style["color"], markersize=11, fillstyle="none"
                )
        axes.set(title=arm, xscale="log", yscale="log", xlabel="share of the bytes of all tokens in float32")
        axes.set_xticks([float(share) for share in shares], [f"1/{1 / float(share):.0f}" for share in shares])
        axes.minorticks_off()
        light_grid(axes)
    for axes in panels[len(arms) :]:
        axes.set_visible(False)
    figure.supylabel("error; rings: all tokens")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize=9)
    return figure


def _cache(runs: Sequence[Mapping[str, Any]]) -> Figure:
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    figure = Figure(figsize=(5.2 * len(arms) + 1, 4.6))
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
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=8)
    return figure


def _latency(runs: Sequence[Mapping[str, Any]]) -> Figure:
    figure = Figure(figsize=(9, 4.2))
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
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def _certified(runs: Sequence[Mapping[str, Any]]) -> Figure:
    layers = runs[0]["result"]["layers"]
    figure = Figure(figsize=(4.6 * len(layers), 4.4))
    for axes, (layer, by_norm) in zip(figure.subplots(1, len(layers), squeeze=False)[0], layers.items(), strict=True):
        for number, (norm, by_size) in enumerate(by_norm.items()):
            for line, (size, entries) in zip(itertools.cycle(("-", "--", ":", "-.")), by_size.items()):
                shares = [100 * entry["exact_steps"] for entry in entries.values()]
                label = f"queries times {norm}, {size} clusters"
                axes.plot([float(x) for x in entries], shares, line, color=f"C{number}", marker=".", label=label)
        axes.set(title=f"layer {layer}", xscale="log", xlabel="tolerance, in units of the largest value")
        light_grid(axes)
    figure.supylabel("steps that read all tokens, %")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _errors_by_size(runs: Sequence[Mapping[str, Any]]) -> Figure:
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    figure = Figure(figsize=(5.2 * len(arms) + 1, 5))
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
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=9)
    return figure


def _spectra(runs: Sequence[Mapping[str, Any]]) -> Figure:
    figure = Figure(figsize=(9, 4.2))
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
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


_FIGURES = {
    "where_we_lose": figures.draw_losses,
    "equal_time": figures.draw_equal_time,
    "sketch": _errors_by_size,
    "projection_fit": _errors_by_size,
    "spectra": _spectra,
    "coreset_error": _coreset_error,
    "coreset_bytes": _coreset_bytes,
    "cache": _cache,
    "latency": _latency,
    "certified": _certified,
    "continuum": _continuum,
    "quality": _quality,
    "swap_in": _swap_in,
    "zoo": figures.draw_zoo,
    "long_context": _long_context,
    "gap": _gap,
    "bias": _bias,
    **pattern_plots.FIGURES,
}
