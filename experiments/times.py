"""How the studies of time show milliseconds by length."""

from collections.abc import Iterable, Mapping
from typing import Any

from matplotlib.figure import Figure

from experiments.results import Frame
from experiments.show import curves, having, milliseconds, parts, pivot, slopes


def table(records: Frame, title: str, more: Mapping[str, Any] | None = None) -> Iterable[str]:
    """Milliseconds by length, and exponents, by configuration."""
    for name, own in parts(records):
        yield f"`{name}`: milliseconds of {title}, slope of log time"
        times = having(own, "seconds").sort_values("length", kind="stable")
        yield pivot(
            times,
            "method",
            "length",
            "seconds",
            cell=milliseconds,
            more={**slopes(own, "method"), **(more or {})},
            quoted=False,
        )


def figure(records: Frame) -> Figure:
    """Milliseconds by length; dotted where a method begins to be faster than exact attention."""
    times = having(records, "seconds")
    crossings = having(records, "crossover") if "crossover" in records else None

    def mark(axes: Any, name: Any, _: Frame) -> None:
        if crossings is not None:
            own = crossings[crossings["configuration"] == name]
            for at in own.groupby("method")["crossover"].mean():
                axes.axvline(at, color="0.5", linestyle=":", linewidth=1)

    dotted = "" if crossings is None else " (dotted: from where on a polynomial is faster)"
    return curves(
        times.assign(ms=1e3 * times["seconds"]),
        x="length",
        y="ms",
        by="method",
        labels=(f"tokens{dotted}", "ms"),
        ticks=None,
        each=mark,
        size=(5.2, 4.0),
    )
