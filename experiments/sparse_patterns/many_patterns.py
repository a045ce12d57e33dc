"""Many patterns: the share that one set of keys serves, and the samples of keys until one is accepted."""

import dataclasses
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from approx_attention import SparsePattern, dimension_bound, realize_sparse_pattern
from approx_attention.realization import failure_bound
from experiments.config import Count, Positive, Seeded, Several
from experiments.results import Frame, Record
from experiments.show import having
from experiments.sparse_patterns.least_channels import drawn, tables


@dataclasses.dataclass(frozen=True)
class Config(Seeded):
    """Patterns, and their keys.

    Attributes:
        same_keys: one set of keys serves all patterns, by queries alone; else every pattern has fresh samples.
    """

    dims: Several[Count]
    methods: Several[str]
    length: Count = 256
    keys_per_row: Count = 4
    eps1: Positive = 0.1
    eps2: Positive = 0.1
    patterns: Count = 50
    same_keys: bool = True


def run(config: Config, directory: pathlib.Path, console: Console) -> list[Record]:
    """Which share of the patterns the first sample of keys serves, the mean number of samples, and what is promised."""
    keys = jax.random.key(config.seed)
    of_patterns = jax.random.split(jax.random.fold_in(keys, 1), config.patterns)
    records: list[Record] = []
    shape = config.length, config.keys_per_row
    enough = dimension_bound(*shape, config.eps1, config.eps2, kind="least_squares_exact").dim
    for d in sorted({*config.dims, enough}):
        for method in config.methods:

            def served(key: Any, d: int = d, method: Any = method) -> Any:
                pattern = SparsePattern.random(key, *shape)
                options: Any = {"d": d, "key": keys, "method": method, "max_draws": 1}
                if not config.same_keys:
                    options |= {"key": jax.random.fold_in(key, 1), "max_draws": 64}
                certificate = realize_sparse_pattern(pattern, config.eps1, config.eps2, **options).certificate
                return certificate.ok & (certificate.draws == 1), certificate.draws

            first, draws = (float(np.mean(x)) for x in jax.lax.map(served, of_patterns))
            records.append({"curve": method, "is_bound": False, "channels": d, "share": first})
            if d == enough:
                records.append({"curve": method, "at_bound": first, "draws_at_bound": draws})
        promised = 1 - failure_bound(*shape, d)
        records.append({"curve": "promised of ls", "is_bound": True, "channels": d, "share": promised})
    return records


def table(records: Frame) -> Iterable[str]:
    """Shares by the number of channels."""
    yield from tables(having(records, "channels"), "channels", "share", "share of patterns realised, by channels")


def figure(records: Frame) -> Figure:
    """Shares by the number of channels."""
    labels = ("channels", "share of patterns")
    return drawn(having(records, "channels"), "channels", "share", labels, ("log", "linear"))
