"""Records as tables in Markdown and as figures: what the modules of studies share."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from approx_attention.evaluation import light_grid, markdown_table, method_styles
from experiments.results import Frame

Cell = Callable[[Sequence[float]], str]


def having(records: Frame, *columns: str) -> Frame:
    """The records that have all of these columns, without columns that none of them has."""
    missing = [column for column in columns if column not in records]
    if missing:
        raise KeyError(f"no record has {', '.join(missing)}")
    return records.dropna(subset=list(columns)).dropna(axis=1, how="all")


def parts(records: Frame, by: str = "configuration") -> Iterable[tuple[Any, Frame]]:
    """The records of each value of a column, in the order of their first appearance."""
    return records.groupby(by, sort=False)


def spread(figures: Sequence[float]) -> str:
    """Mean and standard deviation over seeds, with three decimals."""
    mean = statistics.fmean(figures)
    return f"{mean:.3f}" if len(figures) == 1 else f"{mean:.3f} ± {_deviation(figures):.3f}"


def significant(figures: Sequence[float]) -> str:
    """Mean and standard deviation over seeds, with two significant digits."""
    mean = statistics.fmean(figures)
    return f"{mean:.2g}" if len(figures) == 1 else f"{mean:.2g} ± {_deviation(figures):.1g}"


def reached(figures: Sequence[float]) -> str:
    """Mean and standard deviation of a least size, or in how many runs no size that was tried was enough."""
    missed = sum(map(math.isinf, figures))
    if missed:
        return "not reached" if missed == len(figures) else f"not reached in {missed} of {len(figures)}"
    mean = statistics.fmean(figures)
    digits = 0 if mean >= 10 else 1
    return f"{mean:.{digits}f}" if len(figures) == 1 else f"{mean:.{digits}f} ± {_deviation(figures):.{digits}f}"


def _deviation(figures: Sequence[float]) -> float:
    """NaN for a run that diverged, for which `statistics` raises."""
    return statistics.stdev(figures) if all(map(math.isfinite, figures)) else math.nan


def mean(figures: Sequence[float]) -> str:
    """The mean over seeds alone, with three decimals."""
    return f"{statistics.fmean(figures):.3f}"


def whole(figures: Sequence[float]) -> str:
    """A count; its mean and standard deviation where it differs between seeds."""
    if not all(map(math.isfinite, figures)):
        return "none"
    return f"{figures[0]:.0f}" if min(figures) == max(figures) else significant(figures)


def milliseconds(figures: Sequence[float]) -> str:
    """Mean time over seeds, given in seconds."""
    return f"{1e3 * statistics.fmean(figures):.3g}"


def in_kib(num_bytes: Any) -> str:
    """Bytes, where they are known."""
    return "" if num_bytes is None or math.isnan(num_bytes) else f"{num_bytes / 1024:.4g} KiB"


def interval(value: float, half_width: float) -> str:
    """A fitted number with its 95 % interval; nothing where there is none."""
    return "" if math.isnan(value) else f"{value:.2f} ± {half_width:.2f}"


def count(number: int, what: str, plural: str = "") -> str:
    """A number of things: 1 seed, 2 seeds, 2 studies."""
    return f"{number} {what if number == 1 else plural or f'{what}s'}"


def code(name: Any) -> str:
    """A name as code."""
    return f"`{name}`"


def label(value: Any) -> str:
    """A value as the head of a column."""
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def markdown(header: str | Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, aligned to the left; a header may be one text with bars between the columns."""
    return markdown_table(header.split("|") if isinstance(header, str) else header, rows, others="left")


def pivot(
    records: Frame,
    rows: str | Sequence[str],
    columns: str,
    value: str | Sequence[str],
    *,
    cell: Cell | Sequence[Cell] = significant,
    head: str | Sequence[str] = "",
    more: Mapping[str, Callable[[Any, Frame], str]] | None = None,
    quoted: bool = True,
) -> str:
    """A table with a row for each value of ``rows`` and a column for each of ``columns``.

    Args:
        records: with all of these columns.
        rows: the columns that name a row, the first as code if ``quoted``.
        columns: the column whose values head the columns.
        value: what a cell shows, over seeds; of several, the blocks of columns stand side by side.
        cell: how it shows that; one for each value, or one for all.
        head: heads of the columns of names.
        more: further columns, from the name of the row and its records.
        quoted: show the first name as code.
    """
    by, values = [rows] if isinstance(rows, str) else list(rows), [value] if isinstance(value, str) else list(value)
    cells = [cell] * len(values) if callable(cell) else list(cell)
    steps, more = list(dict.fromkeys(records[columns])), more or {}
    body = []
    for key, part in records.groupby(by, sort=False):
        names = [label(name) for name in key]
        row = [code(names[0]) if quoted else names[0], *names[1:]]
        for what, shown in zip(values, cells, strict=True):
            of = {step: list(own[what]) for step, own in part.groupby(columns, sort=False)}
            row += [shown(of[step]) if step in of else "" for step in steps]
        body.append([*row, *(function(key if len(by) > 1 else key[0], part) for function in more.values())])
    heads = [head] if isinstance(head, str) else list(head)
    heads += [f"{what} {label(step)}" if len(values) > 1 else label(step) for what in values for step in steps]
    return markdown([*heads, *more], body)


def lookup(records: Frame, by: str, figure: str, shown: Callable[..., str] = spread) -> Mapping[str, Any]:
    """A further column of `pivot`: a figure of each row from separate records."""
    return _further(records, by, figure, lambda own: shown(list(own[figure])))


def slopes(records: Frame, by: str, figure: str = "slope") -> Mapping[str, Any]:
    """A further column of `pivot`: a fitted exponent with its interval, the mean over seeds where there are several."""

    def fitted(own: Frame) -> str:
        first = own.iloc[0]
        return interval(first[figure], first[f"{figure}_half_width"]) if len(own) == 1 else spread(list(own[figure]))

    return _further(records, by, figure, fitted)


def _further(records: Frame, by: str, figure: str, shown: Callable[[Frame], str]) -> Mapping[str, Any]:
    known = records[records[figure].notna()] if figure in records else records[:0]

    def column(name: Any, _: Frame) -> str:
        own = known[known[by] == name]
        return shown(own) if len(own) else ""

    return {figure.replace("_", " "): column}


Scales = tuple[Literal["log", "linear"], Literal["log", "linear"]]


def panels(number: int, *, columns: int = 3, size: tuple[float, float] = (4.4, 3.6), **options: Any) -> tuple[Any, Any]:
    """A figure with that many panels, ``columns`` in a row, and room for a legend below."""
    columns = min(columns, number)
    rows = -(-number // columns)
    figure = Figure(figsize=(size[0] * columns + 0.6, size[1] * rows + 0.8))
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for empty in axes[number:]:
        empty.set_visible(False)
    return figure, axes[:number]


def curves(
    records: Frame,
    *,
    x: str,
    y: str,
    by: str,
    panel: str | None = "configuration",
    labels: tuple[str, str],
    scales: Scales = ("log", "log"),
    ticks: Callable[[Any], str] | None = label,
    least: float | None = None,
    dotted: Sequence[Any] = (),
    titles: Callable[[Any], str] = str,
    columns: int = 3,
    size: tuple[float, float] = (4.4, 3.6),
    each: Callable[[Axes, Any, Frame], object] | None = None,
) -> Figure:
    """Lines of ``y`` against ``x`` for each value of ``by``, with the range over seeds; a panel for each ``panel``.

    Args:
        records: those with all of these columns are shown.
        x: the column of the horizontal axis; names stand side by side, in their order.
        y: the column of the vertical axis.
        by: the column that names a line.
        panel: the column that names a panel; None for one panel with all.
        labels: of the axes.
        scales: of the axes.
        ticks: how a value of ``x`` is shown; None for ticks that the plot chooses.
        least: where smaller values are drawn, as what is exact but for rounding has no logarithm.
        dotted: lines that are drawn dotted and without marks, such as bounds.
        titles: the title of a panel.
        columns: panels in a row.
        size: of a panel, in inches.
        each: draws more into a panel.
    """
    records = having(records, x, y, by)
    places = list(dict.fromkeys(records[x])) if isinstance(records[x].iloc[0], str) else []
    if places:
        records = records.assign(**{x: [places.index(name) for name in records[x]]})
    groups = [("", records)] if panel is None else list(parts(records, panel))
    figure, axes = panels(len(groups), columns=columns, size=size)
    names, handles = list(dict.fromkeys(records[by])), {}
    styles = method_styles(list(map(str, names)))
    for ax, (title, part) in zip(axes, groups, strict=True):
        for name, line in part.groupby(by, sort=False):
            found = line.groupby(x, sort=True)[y]
            mean, low, high = (
                s if least is None else s.clip(lower=least) for s in (found.mean(), found.min(), found.max())
            )
            look = {"color": styles[str(name)]["color"], "linestyle": ":"} if name in dotted else styles[str(name)]
            (handles[str(name).replace("_", " ")],) = ax.plot(mean.index, mean, **look)
            if (low < high).any():
                ax.fill_between(mean.index, low, high, color=look["color"], alpha=0.15, linewidth=0)
        ax.set(title=titles(title) if len(groups) > 1 else "", xscale=scales[0], yscale=scales[1])
        if ticks is not None:
            steps = sorted(set(part[x]))
            ax.set_xticks(steps, [ticks(places[step] if places else step) for step in steps])
            ax.minorticks_off()
        light_grid(ax)
        if each is not None:
            each(ax, title, part)
    for ax in axes[-columns:]:
        ax.set_xlabel(labels[0] or ax.get_xlabel())
    figure.supylabel(labels[1], fontsize=10)
    # As many names in a row as the figure has room for.
    widest = max(map(len, handles))
    fitting = max(1, int(figure.get_figwidth() / (0.6 + 0.085 * widest)))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=fitting, fontsize=9)
    return figure


def thousands(number: float) -> str:
    """A length as a tick: 512, 2k."""
    return f"{number / 1024:g}k" if number >= 1024 else f"{number:g}"


def table_of_times(records: Frame, title: str, more: Mapping[str, Any] | None = None) -> Iterable[str]:
    """Milliseconds of each method by length, and exponents, by configuration."""
    for name, own in parts(records):
        yield f"`{name}`: milliseconds of {title}, slope of log time"
        times = having(own, "seconds").sort_values("length", kind="stable")
        further = {**slopes(own, "method"), **(more or {})}
        yield pivot(times, "method", "length", "seconds", cell=milliseconds, more=further, quoted=False)


def figure_of_times(records: Frame) -> Figure:
    """Milliseconds by length; dotted where a method begins to be faster than exact attention."""
    times = having(records, "seconds")
    crossings = having(records, "crossover") if "crossover" in records else None

    def mark(axes: Any, name: Any, _: Frame) -> None:
        if crossings is not None:
            own = crossings[crossings["configuration"] == name]
            for at in own.groupby("method")["crossover"].mean():
                axes.axvline(at, color="0.5", linestyle=":", linewidth=1)

    dotted = "" if crossings is None else " (dotted: from where on a method is faster)"
    shown, labels = times.assign(ms=1e3 * times["seconds"]), (f"tokens{dotted}", "ms")
    return curves(shown, x="length", y="ms", by="method", labels=labels, ticks=None, each=mark, size=(5.2, 4.0))
