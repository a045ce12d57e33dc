"""The figures of the comparisons of all methods."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from approx_attention.evaluation import light_grid, method_styles
from experiments.whole_picture import where_we_lose
from experiments.whole_picture.zoo import CHOOSE


def by_score(results: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """The scores of the methods of a comparison over seeds, the best first: bits of text, else accuracy."""
    what = score(results[0])
    scores = {name: [result["methods"][name][what] for result in results] for name in results[0]["methods"]}
    # What diverged is last.
    worth = {
        name: -float("inf") if np.isnan(of).any() else statistics.fmean(of) * (-1 if what == "bits" else 1)
        for name, of in scores.items()
    }
    return {name: scores[name] for name in sorted(scores, key=lambda name: -worth[name])}


def score(result: Mapping[str, Any]) -> str:
    """What a task is scored by."""
    return "bits" if "bytes" in result["data"] else "accuracy"


def draw_zoo(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """By task: the methods by their score, and the score against the time of a layer and the error of the attention."""
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    figure = Figure(figsize=(5 * len(arms) + 0.5, 14), dpi=130)
    panels = figure.subplots(3, len(arms), squeeze=False, height_ratios=(1.5, 1, 1))
    styles = method_styles(dict.fromkeys(name for run in runs for name in run["result"]["methods"]))
    handles: dict[str, Any] = {}
    for column, arm in enumerate(arms):
        of_arm = [run for run in runs if run["arm"] == arm]
        results, configs = [run["result"] for run in of_arm], of_arm[0]["config"]["methods"]
        what, scores = score(results[0]), by_score(results)
        label = "test bits per byte" if what == "bits" else "test accuracy"
        ranked, in_time, by_error = panels[:, column]
        usual = statistics.median(entry["answer_bytes"] for entry in results[0]["methods"].values())
        names = []
        for place, (name, of) in enumerate(scores.items()):
            entries = [result["methods"][name] for result in results]
            middle = statistics.fmean(of)
            reach = [[middle - min(of)], [max(of) - middle]]
            look = {**styles[name], "linestyle": "", "elinewidth": 1}
            ranked.errorbar([middle], [place], xerr=reach, **look)
            milliseconds = 1e3 * min(entry["seconds"] for entry in entries)
            handles[name] = in_time.errorbar([milliseconds], [middle], yerr=reach, **look)
            by_error.errorbar([statistics.fmean(e["attention_error"] for e in entries)], [middle], yerr=reach, **look)
            times = entries[0]["answer_bytes"] / usual
            size = "" if 0.85 <= times <= 1.15 else f" ({times:.2g}x bytes)"
            names.append(f"{name}{' *' if configs[name]['method'] in CHOOSE else ''}{size}")
        ranked.set_yticks(range(len(names)), names, fontsize=8)
        ranked.invert_yaxis()
        title = f"{arm}: {usual / 1024:.2g} KiB a head to answer from, {len(results)} seed{'s' * (len(results) > 1)}"
        ranked.set_title(title, fontsize=10)
        ranked.set_xlabel(f"{label} (* holds every token)")
        in_time.set(xscale="log", xlabel="ms of a layer's forward pass", ylabel=label)
        in_time.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        in_time.xaxis.set_major_formatter("{x:g}")
        in_time.minorticks_off()
        correlation = statistics.fmean(result["rank_correlation"]["attention_error"] for result in results)
        by_error.set(xlabel="relative error of its attention, once trained", ylabel=label)
        # What is far from any estimate leaves the others their room.
        if (right := by_error.get_xlim()[1]) > 2:
            by_error.set_xscale("function", functions=(_squeezed, _stretched))
            by_error.set_xlim(-0.05, 1.5 * right)
            by_error.set_xticks([0, 0.5, 1, 1.5, 5], ["0", "0.5", "1", "1.5", "5"])
        by_error.set_title(f"rank correlation with bits, without exact: {correlation:.2f}", fontsize=10)
        for axes in (in_time, by_error):
            if what == "bits":  # the better the higher, as of accuracies
                axes.invert_yaxis()
        for axes in (ranked, in_time, by_error):
            light_grid(axes)
    columns = 2 + 2 * len(arms)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=9)
    return figure


def _squeezed(x: Any) -> Any:
    """Nine tenths of an axis up to 1.5, and the logarithm of what is beyond."""
    return np.where(np.asarray(x) <= 1.5, x, 1.5 + 0.15 * np.log(np.maximum(x, 1.5) / 1.5))


def _stretched(x: Any) -> Any:
    return np.where(np.asarray(x) <= 1.5, x, 1.5 * np.exp((np.maximum(x, 1.5) - 1.5) / 0.15))


def above_exact(results: Sequence[Mapping[str, Any]], name: str, figure: str = "bits") -> list[float]:
    """By how much a figure of a method is above that of exact attention with the same seed, by seed."""
    return [result["methods"][name][figure] - result["methods"]["exact"][figure] for result in results]


def draw_equal_time(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """By how much the methods are above exact attention after tuning, and before it against their error."""
    results = [run["result"] for run in runs]
    figure = Figure(figsize=(11, 5.4))
    ranked, by_error = figure.subplots(1, 2)
    styles = method_styles(results[0]["methods"])
    names = []
    for place, name in enumerate(by_score(results)):
        entries, of = [result["methods"][name] for result in results], above_exact(results, name)
        middle, look = statistics.fmean(of), {**styles[name], "linestyle": "", "elinewidth": 1}
        ranked.errorbar([middle], [place], xerr=[[middle - min(of)], [max(of) - middle]], **look)
        size = entries[0]["size"]
        names.append(f"{name}{'' if size is None else f' {size}'} ({entries[0]['share']:.2f})")
        if name != "exact":
            by_error.plot(
                [statistics.fmean(entry["error"] for entry in entries)],
                [statistics.fmean(above_exact(results, name, "untuned"))],
                label=name,
                **{**styles[name], "linestyle": ""},
            )
    ranked.set_yticks(range(len(names)), names, fontsize=8)
    ranked.invert_yaxis()
    ranked.axvline(0, color="0.4", linestyle="--", linewidth=1)
    ranked.set(xlabel="test bits per byte above exact attention, trained on")
    ranked.set_title("method, size (share of the time of exact attention)", fontsize=10)
    by_error.set(
        xlabel="relative error of the attention, in the exact model",
        ylabel="bits per byte lost in its place, untuned",
    )
    for axes in (ranked, by_error):
        light_grid(axes)
    figure.legend(*by_error.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=9)
    return figure


def draw_losses(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """The factor by which each method beats, or loses to, the better of the baselines."""
    errors = where_we_lose.mean_errors(runs)
    names = dict.fromkeys(name for by_name in errors.values() for name in by_name if name not in where_we_lose.TO_BEAT)
    factors = np.full((len(names), len(errors)), np.nan)
    for column, by_name in enumerate(errors.values()):
        least = min(by_name[to_beat] for to_beat in where_we_lose.TO_BEAT)
        for row, name in enumerate(names):
            if name in by_name:
                factors[row, column] = by_name[name] / least
    figure = Figure(figsize=(1.1 * len(errors) + 2.5, 0.3 * len(names) + 1.6))
    axes = figure.subplots()
    drawn = axes.imshow(np.log10(factors), cmap="RdBu_r", vmin=-1.5, vmax=1.5, aspect="auto")
    for (row, column), factor in np.ndenumerate(factors):
        if np.isfinite(factor):
            dark = abs(np.log10(max(factor, 1e-9))) > 1
            axes.text(column, row, f"{factor:.2g}", ha="center", va="center", color="w" if dark else "k", fontsize=8)
    axes.set_xticks(range(len(errors)), list(errors), rotation=30, ha="right")
    axes.set_yticks(range(len(names)), list(names))
    axes.set_title("error over that of the better of mean(V) and local", fontsize=10)
    bar = figure.colorbar(drawn, ax=axes, ticks=[-1, 0, 1])
    bar.ax.set_yticklabels(["a tenth", "the same", "ten times"])
    return figure
