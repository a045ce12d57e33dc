"""Results over several layers of one file: median and worst error of each method."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from approx_attention.evaluation.comparison import Comparison
from approx_attention.evaluation.plans import Candidate, Plan


@dataclasses.dataclass(frozen=True)
class OverLayers:
    """Results of one method over layers, at one size if all layers have the same.

    Attributes:
        method: name of the method.
        size: the size of its summary, if it has one and it is the same in all layers.
        num_layers: number of layers.
        relative_error: median relative error over layers.
        worst_error: largest relative error of a layer.
        worst_layer: the layer of the worst error.
        seconds: median time over layers.
        speedup: median speedup over layers.
        held_bytes: largest cache bytes of a layer, if known.
        is_exact: whether it is a form of exact attention.
        num_picked: number of layers in which a plan picks it.
        num_meets: number of layers in which its measured error meets the tolerance of a plan.
    """

    method: str
    size: int | None
    num_layers: int
    relative_error: float
    worst_error: float
    worst_layer: str
    seconds: float
    speedup: float
    held_bytes: int | None
    is_exact: bool
    num_picked: int = 0
    num_meets: int = 0


def compared_over_layers(rows: Mapping[str, Sequence[Comparison]]) -> list[OverLayers]:
    """Aggregate each method at each size over layers."""
    settings = dict.fromkeys((row.method, row.size) for own in rows.values() for row in own)
    return [
        _over_layers(
            {layer: row for layer, own in rows.items() for row in own if (row.method, row.size) == setting},
            lambda row: row.relative_error,
        )
        for setting in settings
    ]


def planned_over_layers(plans: Mapping[str, Plan]) -> list[OverLayers]:
    """Aggregate each method at the size that each layer's plan proposes first, with held-out errors."""
    methods = dict.fromkeys(candidate.method for made in plans.values() for candidate in made.candidates)
    summary = []
    for method in methods:
        own: dict[str, Candidate] = {}
        for layer, made in plans.items():
            for candidate in made.candidates:
                if candidate.method == method:
                    own.setdefault(layer, candidate)
        picked = sum(made.pick is not None and made.pick.method == method for made in plans.values())
        found = _over_layers(own, lambda row: row.held_out_error)
        meets = sum(candidate.meets for candidate in own.values())
        summary.append(dataclasses.replace(found, num_picked=picked, num_meets=meets))
    return sorted(summary, key=lambda row: (-row.num_picked, -row.num_meets, row.is_exact))


def _over_layers(rows: Mapping[str, Any], error: Callable[[Any], float]) -> OverLayers:
    # A NaN error is the worst.
    errors = {layer: math.inf if math.isnan(error(row)) else error(row) for layer, row in rows.items()}
    worst = max(errors, key=lambda layer: errors[layer])
    own = list(rows.values())
    sizes = {row.size for row in own}
    held = [row.held_bytes for row in own if row.held_bytes is not None]
    return OverLayers(
        method=own[0].method,
        size=own[0].size if len(sizes) == 1 else None,
        num_layers=len(own),
        relative_error=statistics.median(errors.values()),
        worst_error=errors[worst],
        worst_layer=worst,
        seconds=statistics.median(row.seconds for row in own),
        speedup=statistics.median(row.speedup for row in own),
        held_bytes=max(held, default=None),
        is_exact=own[0].is_exact,
    )
