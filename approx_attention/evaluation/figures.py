"""What all figures have in common: a colour and a marker for each method, and plain logarithmic axes."""

import math
from collections.abc import Iterable
from typing import Any

from approx_attention.registry import METHODS


def method_styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """A colour and a marker for each method, the same in every figure; names that are no methods take what is left.

    What is left is taken again with hollow markers once it is used up.
    """
    names = list(names)
    known = [name for name in METHODS if name in names]
    free = [i for i in range(len(_STYLES)) if i >= len(METHODS) or list(METHODS)[i] not in known]
    looks = {}
    for number, name in enumerate([name for name in names if name not in known]):
        pool = free or range(len(_STYLES))
        looks[name] = (pool[number % len(pool)], number >= len(pool))
    places = {name: list(METHODS).index(name) for name in known}
    looks |= {name: (place % len(_STYLES), place // len(_STYLES) % 2 == 1) for name, place in places.items()}
    # The third time round a colour comes with the next marker.
    turned = {name: place // (2 * len(_STYLES)) for name, place in places.items()}
    return {
        name: {
            "color": _STYLES[index][0],
            "marker": _STYLES[(index + turned.get(name, 0)) % len(_STYLES)][1],
            "markerfacecolor": "white" if hollow else _STYLES[index][0],
        }
        for name, (index, hollow) in ((name, looks[name]) for name in names)
    }


# Colours that the colour-blind tell apart, each with a different marker.
_STYLES = tuple(
    zip(
        ("#000000", "#999999", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#0072B2", "#8C564B", "#D55E00", "#7F3FBF"),
        "oPDv^Xs*dp",
        strict=True,
    )
)


def light_grid(axes: Any) -> None:
    """Light lines behind everything else."""
    axes.grid(True, color="0.9")
    axes.set_axisbelow(True)


def log_scales(axes: Any, which: str = "xy") -> None:
    """Logarithmic axes with a grid and labels that are plain numbers."""
    from matplotlib import ticker

    light_grid(axes)
    axes.margins(0.08, 0.1)
    axes.set(**{f"{name}scale": "log" for name in which})
    for axis in [{"x": axes.xaxis, "y": axes.yaxis}[name] for name in which]:
        # Axes without a point begin at 0.
        if axis.get_view_interval()[0] <= 0:
            axes.set(**{f"{axis.axis_name}lim": (0.1, 1)})
        low, high = axis.get_view_interval()
        decades = math.log10(high / low)
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(ticker.NullLocator())
