"""Rounding of realised patterns, by data type."""

import dataclasses
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
from rich.console import Console

from approx_attention import SparsePattern, realize_sparse_pattern
from experiments.config import Count, Positive, Seeded, Several
from experiments.results import Frame, Record
from experiments.sparse_patterns.least_channels import drawn, tables


@dataclasses.dataclass(frozen=True)
class Config(Seeded):
    """Realisations of one pattern to growing precision, rounded to each type.

    Attributes:
        eps1: the precisions asked for between zeros and nonzeros; the smaller, the larger the logits.
    """

    eps1: Several[Positive]
    dtypes: Several[str]
    length: Count = 256
    head_dim: Count = 128
    keys_per_row: Count = 4


def run(config: Config, directory: pathlib.Path, console: Console) -> list[Record]:
    """The error of ratios of nonzeros, which is all rounding, and its log in units of the logit times the spacing."""
    key = jax.random.key(config.seed)
    pattern = SparsePattern.random(key, config.length, config.keys_per_row)
    records: list[Record] = []
    for name in config.dtypes:
        dtype = jnp.dtype(name)
        for eps1 in config.eps1:
            options: Any = {"d": config.head_dim, "key": key, "max_draws": 1, "dtype": dtype}
            certificate = realize_sparse_pattern(pattern, eps1, 1e6, **options).certificate
            logit = float(certificate.logit_absmax)
            units = float(certificate.log1p_eps2) / logit / float(jnp.finfo(dtype).eps)
            error = float(jnp.expm1(certificate.log1p_eps2))
            records.append(
                {"curve": name, "is_bound": False, "eps1": eps1, "error": error, "logit": logit, "in_units": units}
            )
    return records


def table(records: Frame) -> Iterable[str]:
    """Errors by the ratio of zeros to nonzeros that is asked for."""
    yield from tables(records, "eps1", "error", "error of ratios of nonzeros, by that of zeros to nonzeros")


def figure(records: Frame) -> Figure:
    """Errors by the ratio of zeros to nonzeros that is asked for."""
    labels = ("largest ratio of zero to nonzero", "error of ratios of nonzeros")
    return drawn(records, "eps1", "error", labels, ("log", "log"))
