"""Realised patterns to look at."""

import dataclasses
import math
import pathlib
from collections.abc import Iterable
from typing import Literal

import jax
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from approx_attention import SparsePattern, realize_sparse_pattern
from experiments.config import Count, Positive, Seeded
from experiments.results import Frame, Record
from experiments.show import code, having, markdown, parts


@dataclasses.dataclass(frozen=True)
class Config(Seeded):
    """One pattern to look at.

    Attributes:
        pattern: its kind.
    """

    pattern: Literal["window_and_global", "blocks", "strided", "random"] = "random"
    length: Count = 64
    head_dim: Count = 40
    eps1: Positive = 1e-3
    eps2: Positive = 0.1


def run(config: Config, directory: pathlib.Path, console: Console) -> list[Record]:
    """The rows of the pattern and of the attention that has it, and its certificate."""
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
    rows = zip(*(np.round(np.asarray(x, np.float64), 5).tolist() for x in (pattern.to_dense(), attention)), strict=True)
    records: list[Record] = [{"row": i, "pattern": wanted, "attention": got} for i, (wanted, got) in enumerate(rows)]
    certificate = {name: float(x) for name, x in realized.certificate._asdict().items()}
    return [{"head_dim": config.head_dim, **certificate}, *records]


def table(records: Frame) -> Iterable[str]:
    """The certificates."""
    rows = []
    for _, own in having(records, "head_dim").iterrows():
        figures = [math.exp(own["log_eps1"]), math.expm1(own["log1p_eps2"])]
        figures += [own[name] for name in ("logit_absmax", "rho", "max_row_tv")]
        rows.append([code(own["configuration"]), f"{own['head_dim']:g}", *(f"{figure:.2g}" for figure in figures)])
    yield markdown("pattern|channels|eps1|eps2|largest logit|gap over it|total variation of a row", rows)


def figure(records: Frame) -> Figure:
    """Pattern, attention and their difference, a row for each configuration."""
    groups = list(parts(records))
    drawn = Figure(figsize=(8, 2.6 * len(groups) + 0.4))
    for row, (name, own) in zip(drawn.subplots(len(groups), 3, squeeze=False), groups, strict=True):
        matrices = having(own[own["seed"] == own["seed"].iloc[0]], "row")
        pattern, attention = (np.array(list(matrices[of])) for of in ("pattern", "attention"))
        largest = float(np.max(np.abs(attention - pattern)))
        row[0].imshow(pattern, cmap="Greys", vmin=0, vmax=pattern.max())
        row[1].imshow(attention, cmap="Greys", vmin=0, vmax=pattern.max())
        image = row[2].imshow(attention - pattern, cmap="RdBu", vmin=-largest, vmax=largest)
        drawn.colorbar(image, ax=row[2])
        channels = having(own, "head_dim")["head_dim"].iloc[0]
        for axes, title in zip(row, (name, f"attention, {channels:g} channels", "difference"), strict=True):
            axes.set_title(title, fontsize=9)
            axes.set_xticks([])
            axes.set_yticks([])
    return drawn
