"""Figures over seeds as the cells of a table."""

import math
import statistics
from collections.abc import Sequence

from approx_attention.evaluation import markdown_table


def spread(figures: Sequence[float]) -> str:
    """The mean and the deviation over seeds, with three decimals."""
    mean = statistics.fmean(figures)
    return f"{mean:.3f}" if len(figures) == 1 else f"{mean:.3f} ± {_deviation(figures):.3f}"


def significant(figures: Sequence[float]) -> str:
    """The mean and the deviation over seeds, with two significant digits."""
    mean = statistics.fmean(figures)
    return f"{mean:.2g}" if len(figures) == 1 else f"{mean:.2g} ± {_deviation(figures):.1g}"


def _deviation(figures: Sequence[float]) -> float:
    """Of a run that diverged there is none, and `statistics` raises."""
    return statistics.stdev(figures) if all(map(math.isfinite, figures)) else math.nan


def in_kib(num_bytes: int | None) -> str:
    """Bytes, where they are known."""
    return "" if num_bytes is None else f"{num_bytes / 1024:.4g} KiB"


def count(number: int, what: str) -> str:
    """A number of things: 1 seed, 2 seeds."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, aligned to the left."""
    return markdown_table(header, rows, others="left")
