"""The figure of each kind of study, from its results."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

# Colours that the colour-blind tell apart, each with a marker of its own.
_STYLES = tuple(
    zip(
        ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B"),
        "osD^vPX*",
        strict=True,
    )
)


def draw(experiment: str, runs: Sequence[Mapping[str, Any]]) -> Figure:
    """The figure of a study."""
    return {"quality": _quality, "swap_in": _swap_in, "long_context": _long_context}[experiment](runs)


def _style(index: int) -> dict[str, Any]:
    colour, marker = _STYLES[index % len(_STYLES)]
    return {"color": colour, "marker": marker}


def _quality(runs: Sequence[Mapping[str, Any]]) -> Figure:
    figure = Figure(figsize=(10, 4.2), layout="constrained", dpi=150)
    left, right = figure.subplots(1, 2)
    for index, arm in enumerate(dict.fromkeys(run["arm"] for run in runs)):
        results = [run["result"] for run in runs if run["arm"] == arm]
        octaves = list(results[0]["test"].get("by_position", {}))
        means = [statistics.fmean(result["test"]["by_position"][octave] for result in results) for octave in octaves]
        left.plot(octaves, means, label=arm, **_style(index))
        right.plot(
            [result["attention_error"]["method"]["mean"] for result in results],
            [result["test"]["bits"] for result in results],
            linestyle="",
            **_style(index),
        )
    left.set(xlabel="position in the sequence", ylabel="test bits per token")
    left.tick_params(axis="x", rotation=30)
    right.set(xlabel="relative error of the attention, on the model's own tensors", ylabel="test bits per token")
    for axes in (left, right):
        axes.grid(True, color="0.9")
        axes.set_axisbelow(True)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    return figure


def _swap_in(runs: Sequence[Mapping[str, Any]]) -> Figure:
    figure = Figure(figsize=(7, 4.4), layout="constrained", dpi=150)
    axes = figure.subplots()
    for index, name in enumerate(runs[0]["result"]["methods"]):
        results = [run["result"]["methods"][name] for run in runs]
        errors, bits = [r["attention_error"]["mean"] for r in results], [r["bits"] for r in results]
        axes.plot(errors, bits, linestyle="", label=name, **_style(index))
    axes.set(xlabel="relative error of the attention", ylabel="test bits per token, without further training")
    axes.grid(True, color="0.9")
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def _long_context(runs: Sequence[Mapping[str, Any]]) -> Figure:
    figure = Figure(figsize=(10, 7.5), layout="constrained", dpi=150)
    panels = list(figure.subplots(2, 2, sharex=True).flat)
    handles: dict[str, Any] = {}
    for axes, run in zip(panels, runs, strict=False):
        for index, (name, entry) in enumerate(run["result"]["methods"].items()):
            lengths = [int(n) for n in entry["seconds"]]
            style = {"color": "0.3", "linestyle": "--"} if name == "best exact" else _style(index)
            (handles[name],) = axes.plot(lengths, [1e3 * s for s in entry["seconds"].values()], **style)
        axes.set(title=run["arm"].replace("_", " and "), xscale="log", yscale="log", ylabel="time of a layer (ms)")
        axes.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
        axes.minorticks_off()
        axes.grid(True, color="0.9")
        axes.set_axisbelow(True)
    for axes in panels[-2:]:
        axes.set_xlabel("tokens")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, frameon=False)
    return figure
