"""The measurements on the shipped sample, and the figure of a method among the others."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

from approx_attention.evaluation import BASELINES

DOCS = pathlib.Path(__file__).parent
# The default comparison, that of methods as expensive as exact attention, and that of methods without a causal form.
COMPARISONS = tuple(DOCS / folder / "compare.json" for folder in ("", "costly", "bidirectional"))


def comparison(path: pathlib.Path = COMPARISONS[0]) -> dict[str, Any]:
    """The document that ``approx-attention compare`` wrote for the shipped sample."""
    return json.loads(path.read_text(encoding="utf-8"))


def measured_methods() -> dict[str, pathlib.Path]:
    """The approximations that were compared, with the file of each."""
    found: dict[str, pathlib.Path] = {}
    for path in COMPARISONS:
        for row in comparison(path)["rows"]:
            if not row["is_exact"]:
                found.setdefault(row["method"], path)
    return found


def kib_held(row: Mapping[str, Any], document: Mapping[str, Any]) -> float:
    """Cache bytes of a row; a method that keeps all tokens has those of exact attention."""
    every = next(row["held_bytes"] for row in document["rows"] if row["is_exact"])
    return (row["held_bytes"] or every) / 1024


# Marker and shade of each baseline in the figure of a method.
MARKERS = {"mean_value": ("s", "0.2"), "local": ("^", "0.2"), "uniform_sample": ("D", "0.45")}


def draw_error(name: str, document: Mapping[str, Any], path: pathlib.Path) -> None:
    """Draw error against cache bytes: the method in colour, the baselines with markers, all others grey."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in document["rows"]:
        if not row["is_exact"]:
            curves.setdefault(row["method"], []).append((kib_held(row, document), row["relative_error"]))
    with matplotlib.rc_context({"font.size": 11, "svg.hashsalt": name}):
        figure, axes = plt.subplots(figsize=(5.6, 3.9), layout="constrained")
        others = "other methods"
        for other, points in sorted(curves.items(), key=lambda item: (item[0] == name, item[0] in BASELINES)):
            kib, error = zip(*sorted(points), strict=True)
            if other == name:
                style: dict[str, Any] = {"color": "tab:blue", "marker": "o", "markersize": 7, "label": name}
            elif other in BASELINES:
                marker, shade = MARKERS[other]
                style = {"color": shade, "marker": marker, "markersize": 6, "label": other, "linestyle": ":"}
            else:
                style = {"color": "0.8", "marker": "o", "markersize": 4, "linewidth": 1, "label": others}
                others = "_"  # the legend names them once
            axes.plot(kib, error, **style)
        top = 1.3 * max(1.2, *(value for _, value in curves.get(name, [(0, 0.0)])))
        axes.set(yscale="log", xlabel="cache (KiB)", ylabel="relative error", xlim=(-5, None), ylim=(None, top))
        axes.grid(alpha=0.3)
        figure.legend(loc="outside upper center", ncols=3, fontsize=9, frameon=False)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
