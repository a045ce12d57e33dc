"""What realised patterns are like: many served by one set of keys, the rounding of their type, and a picture."""

import dataclasses
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from approx_attention import SparsePattern, dimension_bound, realize_sparse_pattern
from approx_attention.realization import failure_bound
from experiments.config import Count, Positive, Seeded, Several


@dataclasses.dataclass(frozen=True)
class ManyPatternsConfig(Seeded):
    """Patterns that are realised with one and the same set of keys, by queries alone."""

    dims: Several[Count]
    methods: Several[str]
    length: Count = 256
    keys_per_row: Count = 4
    eps1: Positive = 0.1
    eps2: Positive = 0.1
    patterns: Count = 50


def run_many_patterns(config: ManyPatternsConfig, directory: pathlib.Path, console: Console) -> dict[str, Any]:
    """Which share of the patterns the first draw of keys serves, beside what is promised of least squares."""
    keys = jax.random.key(config.seed)
    of_patterns = jax.random.split(jax.random.fold_in(keys, 1), config.patterns)
    curves: dict[str, dict[str, float]] = {}
    bounds: dict[str, dict[str, float]] = {"promised of ls": {}}
    shape = config.length, config.keys_per_row
    enough = dimension_bound(*shape, config.eps1, config.eps2, kind="least_squares_exact").dim
    for d in sorted({*config.dims, enough}):
        for method in config.methods:

            def served(key: Any, d: int = d, method: Any = method) -> Any:
                pattern = SparsePattern.random(key, *shape)
                options: Any = {"d": d, "key": keys, "method": method, "max_draws": 1}
                return realize_sparse_pattern(pattern, config.eps1, config.eps2, **options).certificate.ok

            share = float(np.mean(jax.lax.map(served, of_patterns)))
            curves.setdefault(method, {})[str(d)] = share
        bounds["promised of ls"][str(d)] = 1 - failure_bound(*shape, d)
    return {
        "curves": curves,
        "bounds": bounds,
        "at_bound": {name: curve[str(enough)] for name, curve in curves.items()},
    }


@dataclasses.dataclass(frozen=True)
class PrecisionConfig(Seeded):
    """Realisations of one pattern to growing precision, rounded to each type.

    Attributes:
        eps1: the precisions asked for between zeros and nonzeros; the smaller, the larger the logits.
    """

    eps1: Several[Positive]
    dtypes: Several[str]
    length: Count = 256
    head_dim: Count = 128
    keys_per_row: Count = 4


def run_precision(config: PrecisionConfig, directory: pathlib.Path, console: Console) -> dict[str, Any]:
    """The error of ratios of nonzeros, which is all rounding, and its log in units of the logit times the spacing."""
    key = jax.random.key(config.seed)
    pattern = SparsePattern.random(key, config.length, config.keys_per_row)
    curves: dict[str, dict[str, float]] = {}
    units: dict[str, dict[str, float]] = {}
    logits: dict[str, dict[str, float]] = {}
    for name in config.dtypes:
        dtype = jnp.dtype(name)
        for eps1 in config.eps1:
            options: Any = {"d": config.head_dim, "key": key, "max_draws": 1, "dtype": dtype}
            certificate = realize_sparse_pattern(pattern, eps1, 1e6, **options).certificate
            error, size = float(jnp.expm1(certificate.log1p_eps2)), float(certificate.logit_absmax)
            curves.setdefault(name, {})[f"{eps1:g}"] = error
            logits.setdefault(name, {})[f"{eps1:g}"] = size
            units.setdefault(name, {})[f"{eps1:g}"] = float(certificate.log1p_eps2) / size / float(jnp.finfo(dtype).eps)
    return {"curves": curves, "bounds": {}, "logits": logits, "in_units_of_logit_rounding": units}


@dataclasses.dataclass(frozen=True)
class PictureConfig(Seeded):
    """One pattern to look at.

    Attributes:
        pattern: its kind.
    """

    pattern: Literal["window_and_global", "blocks", "strided", "random"] = "random"
    length: Count = 64
    head_dim: Count = 40
    eps1: Positive = 1e-3
    eps2: Positive = 0.1


def run_picture(config: PictureConfig, directory: pathlib.Path, console: Console) -> dict[str, Any]:
    """The matrix of the pattern, the attention that has it, and what is certified."""
    n, key = config.length, jax.random.key(config.seed)
    pattern = {
        "window_and_global": lambda: SparsePattern.banded(n, range(-2, 3)).with_global([0], only_columns=True),
        "blocks": lambda: SparsePattern.block(n, 4),
        "strided": lambda: SparsePattern.strided(n, max(1, n // 8)),
        "random": lambda: SparsePattern.random(key, n, 4),
    }[config.pattern]()
    realized = realize_sparse_pattern(pattern, config.eps1, config.eps2, d=config.head_dim, key=key)
    q, k = realized.inputs @ realized.w_q, realized.inputs @ realized.w_k
    attention = jax.nn.softmax(q @ k.T / config.head_dim**0.5)
    matrices = {"pattern": pattern.to_dense(), "attention": attention}
    return {
        "matrices": {name: np.round(np.asarray(x, np.float64), 5).tolist() for name, x in matrices.items()},
        "certificate": {name: float(x) for name, x in realized.certificate._asdict().items()},
        "head_dim": config.head_dim,
    }
