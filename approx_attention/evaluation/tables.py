"""Comparisons and plans as tables for the terminal, and cells as a table in Markdown."""

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from rich import box
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text
from tabulate import tabulate

from approx_attention.evaluation.arms import MEAN
from approx_attention.evaluation.comparison import Comparison, best_rows, no_better_than_mean
from approx_attention.evaluation.error_laws import LEAST_HEADS
from approx_attention.evaluation.layers import OverLayers
from approx_attention.evaluation.plans import Plan
from approx_attention.evaluation.units import in_units, times

# Marks of rows in tables.
FRONTIER, TRIVIAL = " *", " !"
PADDED_FOOTNOTE = "times include padding, errors do not"
TRIVIAL_FOOTNOTE = f"! error not below that of `{MEAN}`"


def comparison_table(rows: Sequence[Comparison], title: str, window_size: int, *, is_padded: bool = False) -> Table:
    """The comparison as a table for the terminal; rows on the frontier of error against time are marked.

    Args:
        rows: the results of `compare`.
        title: the title.
        window_size: the window of the far error, for the footnote.
        is_padded: whether some tokens are padding, which the footnote mentions.

    Returns:
        A ``rich`` table.
    """
    table = plain_table(
        title,
        "error: relative Frobenius norm, mean ± standard deviation over seeds · worst row: relative to the rms row "
        "norm · normaliser: rms error of its log · "
        f"far: relative error of the part of the sums beyond a window of {window_size} (1 = none of it recovered) · "
        "cache: bytes per key head and sequence · than exact: relative to its fastest form · "
        f"* on the frontier of error against time · {TRIVIAL_FOOTNOTE}{is_padded * f' · {PADDED_FOOTNOTE}'}",
        *("method", "size", "cache", "than all keys", "time", "than exact", "compile", "error", "worst row"),
        *("normaliser", "far"),
        optional=("compile", "worst row", "normaliser", "than all keys", "time", "far", "than exact", "cache"),
    )
    frontier, trivial = best_rows(rows), no_better_than_mean(rows)
    for i, row in enumerate(rows):
        table.add_row(
            Text(f"{row.method}{FRONTIER if i in frontier else ''}{TRIVIAL if i in trivial else ''}"),
            "" if row.size is None else str(row.size),
            "" if row.held_bytes is None else in_units(row.held_bytes),
            "" if row.compression is None else times(row.compression, "smaller", "larger"),
            f"{row.seconds * 1e3:.3g} ms",
            times(row.speedup, "faster", "slower"),
            f"{row.compile_seconds:.1f} s",
            _with_deviation(row.relative_error, row.relative_error_std, row.num_seeds),
            f"{row.worst_row_error:.3g}",
            "" if row.normalizer_error is None else f"{row.normalizer_error:.3g}",
            _with_deviation(row.far_error, row.far_error_std, row.num_seeds),
            style="bold" if i in frontier else "dim" if row.is_exact else "",
        )
    return table


def plan_table(made: Plan, title: str) -> Table:
    """Return the candidates of a plan as a rich table, with the best first and the pick in bold.

    Args:
        made: a `Plan`.
        title: the title of the table.
    """
    split = made.split
    padded = "" if split.query_mask is None else f" · {PADDED_FOOTNOTE}"
    table = plain_table(
        title,
        f"chosen on {len(split.calibration)} {split.by}, checked on {len(split.held_out)} others"
        + ("" if split.by == "heads" else f", because there are fewer than {LEAST_HEADS} key heads")
        + f" · at most: the bound of the error with confidence {made.confidence:g}, on which the choice is based · "
        "held out: relative error on held-out units · worst: on the worst of these · cache: bytes per key head and "
        f"sequence · than exact: relative to its fastest form · {TRIVIAL_FOOTNOTE}{padded}",
        *(
            "method",
            "size",
            "predicted",
            "at most",
            "held out",
            "worst",
            "all",
            "cache",
            "time",
            "than exact",
            "remark",
        ),
        optional=("worst", "all", "time", "predicted", "than exact"),
    )
    trivial = no_better_than_mean(made.candidates)
    for i, candidate in enumerate(made.candidates):
        if candidate.is_predicted:
            remark = "" if candidate.meets else "missed when checked"
        else:
            remark = "bound exceeds the tolerance" if candidate.meets else "misses the tolerance"
        if not candidate.in_budget:
            remark += f"{', ' if remark else ''}over budget"
        table.add_row(
            Text(f"{candidate.method}{TRIVIAL if i in trivial else ''}"),
            "" if candidate.size is None else str(candidate.size),
            *("" if candidate.is_exact else f"{x:.3g}" for x in (candidate.predicted_error, candidate.error_bound)),
            *(f"{x:.3g}" for x in (candidate.held_out_error, candidate.worst_held_out_error, candidate.relative_error)),
            in_units(candidate.held_bytes),
            f"{candidate.seconds * 1e3:.3g} ms",
            times(candidate.speedup, "faster", "slower"),
            remark,
            style="bold" if candidate is made.pick else "" if candidate.is_predicted and candidate.in_budget else "dim",
        )
    return table


def comparison_summary_table(summary: Sequence[OverLayers], title: str) -> Table:
    """The comparisons of all layers in one table."""
    table = plain_table(
        title,
        "median and worst: relative error over layers · worst in: the layer of the worst error · time, than exact: "
        f"medians over layers · cache: largest bytes of a layer · * on the frontier of error against time · "
        f"{TRIVIAL_FOOTNOTE}",
        *("method", "size", "cache", "time", "than exact", "layers", "median", "worst", "worst in"),
    )
    frontier, trivial = best_rows(summary), no_better_than_mean(summary)
    for i, row in enumerate(summary):
        table.add_row(
            Text(f"{row.method}{FRONTIER if i in frontier else ''}{TRIVIAL if i in trivial else ''}"),
            "" if row.size is None else str(row.size),
            "" if row.held_bytes is None else in_units(row.held_bytes),
            f"{row.seconds * 1e3:.3g} ms",
            times(row.speedup, "faster", "slower"),
            str(row.num_layers),
            f"{row.relative_error:.3g}",
            f"{row.worst_error:.3g}",
            Text(row.worst_layer),
            style="bold" if i in frontier else "dim" if row.is_exact else "",
        )
    return table


def plan_summary_table(summary: Sequence[OverLayers], title: str) -> Table:
    """The plans of all layers by method."""
    table = plain_table(
        title,
        "picked: number of layers in which it is the pick · meets: number of layers in which its held-out error meets "
        "the tolerance · median and worst: held-out error over layers, at the size that each plan proposes · worst in: "
        f"the layer of the worst error · {TRIVIAL_FOOTNOTE}",
        *("method", "picked", "meets", "layers", "median", "worst", "worst in", "than exact"),
    )
    trivial = no_better_than_mean(summary)
    for i, row in enumerate(summary):
        table.add_row(
            Text(f"{row.method}{TRIVIAL if i in trivial else ''}"),
            str(row.num_picked),
            str(row.num_meets),
            str(row.num_layers),
            f"{row.relative_error:.3g}",
            f"{row.worst_error:.3g}",
            Text(row.worst_layer),
            times(row.speedup, "faster", "slower"),
            style="bold" if row.num_picked else "dim" if row.is_exact else "",
        )
    return table


def picks_table(plans: Mapping[str, Plan], title: str) -> Table:
    """The recommendation for each layer."""
    table = plain_table(
        title,
        "held out: relative error on held-out units · than exact: relative to its fastest form",
        *("layer", "pick", "at most", "held out", "cache", "time", "than exact"),
    )
    for layer, made in plans.items():
        pick = made.pick
        cells = ("nothing meets the tolerance",)
        if pick is not None:
            cells = (
                pick.label,
                "" if pick.is_exact else f"{pick.error_bound:.3g}",
                f"{pick.held_out_error:.3g}",
                in_units(pick.held_bytes),
                f"{pick.seconds * 1e3:.3g} ms",
                times(pick.speedup, "faster", "slower"),
            )
        table.add_row(Text(layer), *cells)
    return table


def markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, others: str | Sequence[str] = "right"
) -> str:
    """Make a Markdown table.

    A notebook shows the table that is the last value of a cell as a table, and not as text.

    Args:
        header: the names of the columns.
        rows: rows of cells.
        others: alignment of the columns after the first, which is left-aligned: ``"right"``, ``"left"`` or
            ``"center"``, for all or for each.

    Returns:
        The text of the table.

    Example:
        >>> from approx_attention.evaluation import markdown_table
        >>> print(markdown_table(["method", "ms"], [["`local`", "1.5"]]))
        | method   |   ms |
        |:---------|-----:|
        | `local`  |  1.5 |
    """
    alignment = ["left", *([others] * (len(header) - 1) if isinstance(others, str) else others)]
    return _Markdown(tabulate(rows, header, tablefmt="pipe", colalign=alignment, disable_numparse=True))


class _Markdown(str):
    __slots__ = ()

    def _repr_markdown_(self) -> str:
        return self


class FittingTable(Table):
    """A table that leaves out optional columns, one after the other, until it fits the width of the console.

    Cells are on one line, unless the table does not fit without the optional columns either.
    """

    optional: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator:
        """Render the columns that fit, and name those that are left out."""
        table, left_out = self, []
        unlimited = options.update(max_width=10_000)
        for header in self.optional:
            if table.__rich_measure__(console, unlimited).maximum <= options.max_width:
                break
            left_out.append(header)
            table = self._without(left_out)
        if left_out:
            table.caption = f"{self.caption} · left out at this width: {', '.join(left_out)}"
        if table.__rich_measure__(console, unlimited).maximum > options.max_width:
            table.columns = [dataclasses.replace(column, no_wrap=False, overflow="fold") for column in table.columns]
        yield from Table.__rich_console__(table, console, options)

    def _without(self, headers: Sequence[str]) -> Table:
        kept = [column for column in self.columns if column.header not in headers]
        table = copy.copy(self)
        table.columns = [dataclasses.replace(column, _index=i) for i, column in enumerate(kept)]
        return table


def plain_table(title: str, caption: str, *columns: str, optional: Sequence[str] = ()) -> Table:
    """An empty table; its title, which contains file names, is not parsed as markup.

    Args:
        title: the title.
        caption: the notes.
        columns: the headers.
        optional: headers of columns to leave out where the console is too narrow, the first of them first.
    """
    table = FittingTable(
        title=Text(title, style="table.title"),
        caption=caption,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=bool(optional))
    table.optional = optional
    return table


def _with_deviation(mean: float | None, deviation: float | None, num_seeds: int) -> str:
    if mean is None:
        return ""
    return f"{mean:.3g}" if num_seeds == 1 else f"{mean:.3g} ± {deviation:.2g}"
