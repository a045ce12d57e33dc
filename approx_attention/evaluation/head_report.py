"""Diagnoses of heads as tables, Markdown and figures."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table
from rich.text import Text

from approx_attention.evaluation.figures import figure_style, light_grid
from approx_attention.evaluation.heads import LOW_RANK, NUM_SINKS, WORDS, HeadDiagnosis
from approx_attention.evaluation.tables import markdown_table, plain_table

# Colours that the colour-blind can distinguish.
_COLORS = {
    "short": "#BBBBBB",
    "uniform": "#F0E442",
    "nearby": "#009E73",
    "sink + nearby": "#56B4E9",
    "few keys": "#E69F00",
    "diffuse": "#CC79A7",
}
# Maps with more heads than this show no numbers.
_MOST_NUMBERS = 160
Layers = Mapping[str, Sequence[HeadDiagnosis]]


@dataclasses.dataclass(frozen=True)
class VerdictCount:
    """The number of heads with a verdict.

    Attributes:
        verdict: the verdict.
        num_heads: the number of heads over all layers.
        heads: the indices of the heads by layer.
        methods: methods that suit them.
    """

    verdict: str
    num_heads: int
    heads: dict[str, list[int]]
    methods: tuple[str, ...]


def heads_over_layers(layers: Layers) -> list[VerdictCount]:
    """Count the heads of each verdict, the most frequent first."""
    every = [head for own in layers.values() for head in own]
    counts = Counter(head.verdict for head in every)
    found = []
    for verdict, count in counts.most_common():
        by_layer = {layer: [head.head for head in own if head.verdict == verdict] for layer, own in layers.items()}
        methods = next(head.methods for head in every if head.verdict == verdict)
        found.append(VerdictCount(verdict, count, {layer: own for layer, own in by_layer.items() if own}, methods))
    return found


# 1. Cells


class _Column(NamedTuple):
    name: str
    cell: Callable[[HeadDiagnosis], str]


def _number(name: str, field: str, form: str = ".3g") -> _Column:
    return _Column(name, lambda head: format(getattr(head, field), form))


_HEAD = _number("head", "head", "d")
_VERDICT = _Column("verdict", lambda head: head.verdict)


_WEIGHTS = [
    _number("keys", "effective_keys"),
    _number("share: near", "window_share", ".2f"),
    _number("first", "sink_share", ".2f"),
    _number("top", "top_share", ".2f"),
    _number("rank", "weight_rank"),
]
_ERRORS = [
    _number("error: mean", "mean_error", ".2f"),
    _number("near", "window_error", ".2f"),
    _number("+ first", "sink_window_error", ".2f"),
    _number("top", "top_error", ".2f"),
    _number("rank", "rank_error", ".2f"),
    _number("samples", "samples", ".0f"),
]
_MORE = [
    _number("entropy", "entropy", ".2f"),
    _number("one key", "heaviest_share", ".3f"),
    _number("key rank", "key_rank"),
    _number("longest key", "key_spread", ".2f"),
    _number("largest logit", "largest_logit"),
    _number("radius", "radius"),
]


def _theorems(heads: Sequence[HeadDiagnosis]) -> list[_Column]:
    def size(name: str) -> _Column:
        def cell(head: HeadDiagnosis) -> str:
            number = head.theorems[name]
            return f"({number:.2g})" if name in head.vacuous else f"{number:.0f}"

        return _Column(name, cell)

    return [_number("of keys", "num_keys"), *(size(name) for name in heads[0].theorems)]


def _cells(columns: Sequence[_Column], heads: Sequence[HeadDiagnosis]) -> tuple[list[str], list[list[str]]]:
    return [column.name for column in columns], [[column.cell(head) for column in columns] for head in heads]


def _notes(size: int, tolerance: float) -> list[str]:
    return [
        "keys: exp(entropy), the effective number of keys",
        f"share: of the weights, near: within a window of {size}, first: on the first {NUM_SINKS} keys, top: on the "
        f"{size} keys with the largest weights of each query",
        f"rank: the rank at which the weights of the queries have an error of {tolerance:g}",
        "error: relative error of the output of the mean of the visible values, of attention to these keys only, and "
        f"of the best weights of rank {size}",
        f"samples: the number of random keys for an error of {tolerance:g}",
    ]


def _more_notes(tolerance: float) -> list[str]:
    return [
        f"one key: the largest share of a key over all queries; key rank: the rank at which the centred keys have an "
        f"error of {tolerance:g}; longest key: its norm over the median; radius: the largest norm of a query times "
        "that of a centred key, times the scale; largest logit: with centred keys",
        f"theorems: the number of keys, samples or features for an error of {tolerance:g}, without the constant; in "
        "brackets if it is vacuous, at least the number of keys. uniform_sample, coreset and polynomial: for all "
        "queries within the radius; favor: for an orthogonal query and key of median norms; unreduced_jlt: by the "
        "variance on these tensors; linformer: Johnson-Lindenstrauss, for all norms",
    ]


# 2. Tables


def heads_table(heads: Sequence[HeadDiagnosis], title: str, size: int, tolerance: float) -> Table:
    """The diagnoses of heads as a table for the terminal."""

    def say_something(head: HeadDiagnosis) -> str:
        return ", ".join(name for name in head.theorems if name not in head.vacuous) or "vacuous"

    header, rows = _cells([_HEAD, *_WEIGHTS, *_ERRORS, _Column("theorems", say_something), _VERDICT], heads)
    notes = [*_notes(size, tolerance), "theorems: those that are not vacuous, with sizes below the number of keys"]
    notes += [f"{verdict}: {', '.join(methods)}" for verdict, methods in {x.verdict: x.methods for x in heads}.items()]
    table = plain_table(title, " · ".join(notes), *header)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def verdicts_table(summary: Sequence[VerdictCount], title: str) -> Table:
    """The number of heads of each verdict over all layers, as a table for the terminal."""
    table = plain_table(title, "which: the numbers of the heads, by layer", *_VERDICTS)
    for row in _verdict_cells(summary):
        table.add_row(*map(Text, row))
    return table


def heads_markdown(layers: Layers, titles: Mapping[str, str], size: int, tolerance: float) -> str:
    """All tables in Markdown, with a section for each layer."""
    parts = ["# Heads"]
    if "" not in layers:
        parts.append(markdown_table(_VERDICTS, _verdict_cells(heads_over_layers(layers)), others="left"))
    for layer, heads in layers.items():
        tables = [[*_WEIGHTS, *_ERRORS, _VERDICT], [*_MORE, *_theorems(heads)]]
        parts += [f"## {titles[layer]}", *(markdown_table(*_cells([_HEAD, *columns], heads)) for columns in tables)]
    notes = *_notes(size, tolerance), *_more_notes(tolerance)
    words = [f"*{word}*: {meaning}" for word, meaning in WORDS.items()]
    return "\n\n".join([*parts, "## Notes", "\n".join(f"- {note}" for note in (*notes, *words))]) + "\n"


_VERDICTS = ["verdict", "heads", "methods", "which"]


def _verdict_cells(summary: Sequence[VerdictCount]) -> list[list[str]]:
    return [[row.verdict, str(row.num_heads), ", ".join(row.methods), _which(row.heads)] for row in summary]


def _which(heads: Mapping[str, Sequence[int]]) -> str:
    return "; ".join(f"{layer}: {', '.join(map(str, numbers))}" for layer, numbers in heads.items())


# 3. Figures


def draw_heads(heads: Sequence[HeadDiagnosis], title: str, size: int) -> Any:
    """Draw one layer, with a bar for each head."""
    from matplotlib.figure import Figure

    with figure_style():
        figure = Figure(figsize=(12, max(2.6, 0.28 * len(heads) + 1.8)))
        quantities = _quantities([heads], size)
        for axes, (name, (values,), is_share) in zip(figure.subplots(1, 5, sharey=True), quantities, strict=True):
            axes.barh(range(len(heads)), values, color=[_COLORS[_word(head)] for head in heads])
            axes.set_title(name, fontsize=9)
            light_grid(axes)
            axes.set_xlim((0, 1) if is_share else (1, max(2.0, 1.2 * max(values))))
            if is_share:
                axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
            else:
                axes.set_xscale("log")
                _plain(axes.xaxis)
        first = figure.axes[0]
        first.set(ylabel="head", ylim=(len(heads) - 0.5, -0.5))
        first.set_yticks(range(len(heads)), [f"{'• ' * _is_low(head)}{head.head}" for head in heads])
        _legend(figure, heads)
        figure.suptitle(title, fontsize=11, parse_math=False)
        return figure


def draw_heads_of_layers(layers: Layers, title: str, size: int) -> Any:
    """Draw many layers: a map of layers and heads for each quantity, and one of the verdicts."""
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.figure import Figure

    own, width = list(layers.values()), max(map(len, layers.values()))
    words = list(_COLORS)
    with figure_style():
        figure = Figure(figsize=(min(16.0, max(9.0, 0.9 * width + 3)), min(24.0, max(4.0, 0.44 * len(own) + 2.6))))
        panels = figure.subplots(2, 3, sharex=True, sharey=True).ravel()
        verdicts = _grid([[words.index(_word(head)) for head in heads] for heads in own], width)
        panels[0].imshow(
            verdicts, cmap=ListedColormap(list(_COLORS.values())), vmin=-0.5, vmax=len(words) - 0.5, aspect="auto"
        )
        panels[0].set_title("verdict", fontsize=9)
        for row, heads in enumerate(own):
            low = [column for column, head in enumerate(heads) if _is_low(head)]
            panels[0].plot(low, [row] * len(low), linestyle="", marker="o", color="black", markersize=4)
        for axes, (name, values, is_share) in zip(panels[1:], _quantities(own, size), strict=True):
            grid = _grid(values, width)
            scale = {"vmin": 0, "vmax": 1} if is_share else {"norm": LogNorm(1, max(2.0, np.nanmax(grid)))}
            image = axes.imshow(grid, cmap="viridis", aspect="auto", **scale)
            axes.set_title(name, fontsize=9)
            bar = figure.colorbar(image, ax=axes)
            bar.ax.tick_params(labelsize=8)
            if not is_share:
                _plain(bar.ax.yaxis)
            if grid.size <= _MOST_NUMBERS:
                for (row, column), value in np.ndenumerate(grid):
                    if math.isfinite(value):
                        text = f"{value:.2f}".lstrip("0") if is_share else f"{value:.{1 if value < 10 else 0}f}"
                        color = "black" if image.norm(value) > 0.55 else "white"
                        axes.text(column, row, text, ha="center", va="center", fontsize=6, color=color)
        for axes in panels:
            axes.set_xticks(range(width))
            axes.set_xticks(np.arange(width) - 0.5, minor=True)
            axes.set_yticks(range(len(own)), list(layers), fontsize=8, parse_math=False)
            axes.set_yticks(np.arange(len(own)) - 0.5, minor=True)
            axes.tick_params(labelsize=8, length=2)
            axes.tick_params(which="minor", length=0)
            axes.grid(True, which="minor", color="white", linewidth=0.6)
        for axes in panels[3:]:
            axes.set_xlabel("head", fontsize=9)
        _legend(figure, [head for heads in own for head in heads])
        figure.suptitle(title, fontsize=11, parse_math=False)
        return figure


def _word(head: HeadDiagnosis) -> str:
    return head.verdict.removesuffix(f", {LOW_RANK}")


def _is_low(head: HeadDiagnosis) -> bool:
    return head.verdict.endswith(LOW_RANK)


def _quantities(layers: Sequence[Sequence[HeadDiagnosis]], size: int) -> Iterable[tuple[str, list[list[float]], bool]]:
    """The main quantities: a name, the values of all heads by layer, and whether they are shares."""
    for name, field, is_share in (
        ("effective number of keys", "effective_keys", False),
        (f"share within a window of {size}", "window_share", True),
        (f"share on the first {NUM_SINKS} keys", "sink_share", True),
        (f"share of the {size} largest weights", "top_share", True),
        ("rank of the weights", "weight_rank", False),
    ):
        yield name, [[float(getattr(head, field)) for head in heads] for heads in layers], is_share


def _grid(rows: Sequence[Sequence[float]], width: int) -> np.ndarray:
    """Rows of any length as an array; missing heads are NaN, and blank in the figure."""
    return np.array([[*row, *[math.nan] * (width - len(row))] for row in rows], float)


def _plain(axis: Any) -> None:
    """Show ticks of a logarithmic axis as plain numbers."""
    from matplotlib import ticker

    low, high = axis.get_view_interval()
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(ticker.NullLocator())


def _legend(figure: Any, heads: Sequence[HeadDiagnosis]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    present = {_word(head) for head in heads}
    handles: list[Any] = [Patch(color=color, label=word) for word, color in _COLORS.items() if word in present]
    if any(map(_is_low, heads)):
        handles.append(Line2D([], [], linestyle="", marker="o", color="black", markersize=4, label="and of low rank"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9)
