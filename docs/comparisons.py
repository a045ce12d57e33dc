"""What was measured on the shipped sample, and the figure of a method among the others."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

from approx_attention.evaluation import BASELINES

DOCS = pathlib.Path(__file__).parent
# The default comparison, that of methods that cost as much as exact attention, and that of those without a causal form.
COMPARISONS = tuple(DOCS / folder / "compare.json" for folder in ("", "costly", "bidirectional"))


def comparison(path: pathlib.Path = COMPARISONS[0]) -> dict[str, Any]:
    """What ``approx-attention compare`` measured on the shipped sample."""
    return json.loads(path.read_text(encoding="utf-8"))


def measured_methods() -> dict[str, pathlib.Path]:
    """The approximations that were compared, and where."""
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


# Where the names of baselines stand in a figure: at which of their points, how far from it, on which side.
LABELS = {"mean_value": (0, (8, -4), "left"), "uniform_sample": (-1, (-8, -6), "right")}


def draw_error(name: str, document: Mapping[str, Any], path: pathlib.Path) -> None:
    """Draw error against cache bytes: the method in colour, the baselines named, all others grey."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in document["rows"]:
        if not row["is_exact"]:
            curves.setdefault(row["method"], []).append((kib_held(row, document), row["relative_error"]))
    with matplotlib.rc_context({"font.size": 11, "svg.hashsalt": name}):
        figure, axes = plt.subplots(figsize=(5, 3.6), layout="constrained")
        for other, points in curves.items():
            kib, error = zip(*sorted(points), strict=True)
            mine = other == name
            style: dict[str, Any] = {"color": "tab:blue", "zorder": 3} if mine else {"color": "0.6", "linewidth": 1}
            axes.plot(kib, error, marker="o", markersize=6 if mine else 4, **style)
            if mine or other in BASELINES:
                at, shift, side = LABELS.get(other, (0, (0, 7), "center"))
                name_style: dict[str, Any] = {
                    "color": style["color"] if mine else "0.35",
                    "weight": "bold" if mine else "normal",
                }
                name_style |= {"bbox": {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}}
                axes.annotate(other, (kib[at], error[at]), shift, textcoords="offset points", ha=side, **name_style)
        top = 1.3 * max(1.2, *(value for _, value in curves.get(name, [(0, 0.0)])))
        axes.set(yscale="log", xlabel="cache (KiB)", ylabel="relative error", xlim=(-5, None), ylim=(None, top))
        axes.grid(alpha=0.3)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
