"""How many channels patterns need: against the number of tokens, by method, and against the size of the logits."""

import dataclasses
import functools
import math
import pathlib
from typing import Any

import jax
import numpy as np
from rich.console import Console

from approx_attention import SparsePattern, dimension_bound, realize_sparse_pattern
from approx_attention.realization import MinimalDimension, minimal_dimension
from experiments.config import Count, Positive, Seeded, Several

# The bounds that are drawn beside what was measured.
UPPER = ("johnson_lindenstrauss", "projection_heuristic", "orthogonal_heuristic", "least_squares_exact")


@dataclasses.dataclass(frozen=True)
class LogLawConfig(Seeded):
    """Random k-sparse patterns of growing length.

    Attributes:
        keys_per_row: k, in rows and columns.
        trials: over how many draws the median is taken.
    """

    lengths: Several[Count]
    methods: Several[str]
    keys_per_row: Count = 2
    eps1: Positive = 0.5
    eps2: Positive = 1.0
    trials: Count = 5


def run_log_law(config: LogLawConfig, directory: pathlib.Path, console: Console) -> dict[str, Any]:
    """The least channels of each method at each length, the bounds, and straight lines through them in log2 length."""
    curves: dict[str, dict[str, Any]] = {}
    trials: dict[str, dict[str, Any]] = {}
    for method in config.methods:
        for length in config.lengths:
            found = _search(config, length, method, config.trials)
            console.print(f"{method}, {length} tokens: {found.dim:g} channels")
            curves.setdefault(method, {})[str(length)] = _number(found.dim)
            trials.setdefault(method, {})[str(length)] = [_number(dim) for dim in found.per_trial]
    k = config.keys_per_row
    bounds = {
        kind: {str(n): dimension_bound(n, k, config.eps1, config.eps2, kind=kind).dim for n in config.lengths}
        for kind in UPPER
        if k > 1 or not kind.endswith("heuristic")
    }
    theory = 4 * math.log(2) / math.log1p(1 / k)
    fits = {name: _line_in_log2(curve, theory) for name, curve in {**curves, **bounds}.items()}
    return {"curves": curves, "bounds": bounds, "trials": trials, "fits": fits, "theory": theory}


def _line_in_log2(curve: dict[str, Any], theory: float) -> dict[str, float] | None:
    """Channels for each doubling of the length, with half of the 95 % interval, R^2, and the share of the theory's."""
    from scipy import stats

    points = [(math.log2(int(n)), dim) for n, dim in curve.items() if dim is not None]
    if len(points) < 3:
        return None
    doublings, dims = zip(*points, strict=True)
    line: Any = stats.linregress(doublings, dims)
    return {
        "value": float(line.slope),
        "half_width": float(stats.t.ppf(0.975, len(points) - 2) * line.stderr),
        "r2": float(line.rvalue) ** 2,
        "over_theory": float(line.slope) / theory,
    }


@dataclasses.dataclass(frozen=True)
class HeadlineConfig(Seeded):
    """One length, and all methods.

    Attributes:
        max_logit: the largest logit that is accepted; any if none is given.
        num_steps: gradient steps of the methods that take any.
    """

    methods: Several[str]
    length: Count = 256
    keys_per_row: Count = 4
    eps1: Positive = 0.1
    eps2: Positive = 0.1
    max_logit: Positive | None = None
    trials: Count = 3
    num_steps: Count = 300


def run_headline(config: HeadlineConfig, directory: pathlib.Path, console: Console) -> dict[str, Any]:
    """Channels that each method needs, and the logits and the total variation that it has there."""
    methods = {}
    for method in config.methods:
        options: dict[str, Any] = {"max_logit": config.max_logit, "num_steps": config.num_steps}
        found = _search(config, config.length, method, config.trials, **options)
        console.print(f"{method}: {found.dim:g} channels")
        methods[method] = {"dim": _number(found.dim), "trials": [_number(dim) for dim in found.per_trial]}
        if math.isfinite(found.dim):
            key = jax.random.key(config.seed)
            pattern = SparsePattern.random(key, config.length, config.keys_per_row)
            options |= {"d": int(found.dim), "key": key, "method": method}
            certificate = realize_sparse_pattern(pattern, config.eps1, config.eps2, **options).certificate
            methods[method] |= {
                "logit_absmax": float(certificate.logit_absmax),
                "max_row_tv": float(certificate.max_row_tv),
            }
    return {"methods": methods, "tokens": config.length}


@dataclasses.dataclass(frozen=True)
class BudgetConfig(Seeded):
    """Channels against the largest logit that is allowed, for permutations or sparse patterns of one length."""

    methods: Several[str]
    budgets: Several[Positive]
    length: Count = 256
    keys_per_row: Count = 1
    eps1: Positive = 0.1
    eps2: Positive = 0.1
    trials: Count = 3
    num_steps: Count = 300


def run_budget(config: BudgetConfig, directory: pathlib.Path, console: Console) -> dict[str, Any]:
    """The least channels of each method at each budget, beside the lower bound of every method."""
    curves: dict[str, dict[str, Any]] = {}
    bounds: dict[str, dict[str, Any]] = {"packing": {}}
    for budget in config.budgets:
        place = f"{budget:g}"
        for method in config.methods:
            options = {"max_logit": budget, "num_steps": config.num_steps, "max_dim": 2 * config.length}
            found = _search(config, config.length, method, config.trials, **options)
            console.print(f"{method}, logits up to {place}: {found.dim:g} channels")
            curves.setdefault(method, {})[place] = _number(found.dim)
        shape = config.length, config.keys_per_row, config.eps1, config.eps2
        bounds["packing"][place] = dimension_bound(*shape, kind="packing", max_logit=budget).dim
    ratios = [
        dim / bounds["packing"][place] for curve in curves.values() for place, dim in curve.items() if dim is not None
    ]
    return {"curves": curves, "bounds": bounds, "least_over_bound": min(ratios, default=None)}


def _search(config: Any, length: int, method: str, trials: int, **options: Any) -> MinimalDimension:
    pattern = functools.partial(SparsePattern.random, num_tokens=length, keys_per_row=config.keys_per_row)
    key = jax.random.fold_in(jax.random.key(config.seed), length)
    return minimal_dimension(pattern, config.eps1, config.eps2, key=key, method=method, trials=trials, **options)


def _number(dim: float) -> int | None:
    """None where no number of channels was enough."""
    return int(dim) if np.isfinite(dim) else None
