"""How the studies of low rank show errors by size."""

from collections.abc import Iterable
from typing import Any

from matplotlib.figure import Figure

from experiments.results import Frame
from experiments.show import curves, having, parts, pivot, significant

# After the name of a kind whose error is a closed form and not measured.
CLOSED = ", closed form"


def table(records: Frame) -> Iterable[str]:
    """Errors by kind and size, by configuration."""
    for name, own in parts(records):
        yield f"`{name}`: error relative to exact attention, by rows or slots"
        yield pivot(having(own, "kind", "size"), "kind", "size", "error", quoted=False)
        if "mean_value_error" in own:
            yield f"The mean of the values errs by {significant(list(own['mean_value_error'].dropna()))}."


def figure(records: Frame) -> Figure:
    """Errors by size; closed forms as thin lines."""
    errors = having(records, "kind", "size")
    closed = errors["kind"].str.endswith(CLOSED)

    def more(axes: Any, name: Any, _: Frame) -> None:
        for _, own in errors[closed & (errors["configuration"] == name)].groupby("kind", sort=False):
            line = own.groupby("size")["error"].mean().clip(lower=1e-3)
            axes.plot(line.index, line, color="0.2", linewidth=0.8)
        if "mean_value_error" in records:
            own = records[records["configuration"] == name]["mean_value_error"]
            axes.axhline(own.mean(), color="0.5", linestyle=":")

    marks = [
        *(["thin: closed form"] if closed.any() else []),
        *(["dotted: mean(V)"] if "mean_value_error" in records else []),
    ]
    return curves(
        errors[~closed],
        x="size",
        y="error",
        by="kind",
        labels=("rows or slots", "; ".join(["relative error", *marks])),
        least=1e-3,
        each=more,
        size=(5.2, 4.4),
    )
