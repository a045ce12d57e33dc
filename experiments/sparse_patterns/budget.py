"""Channels that patterns need against the largest logit that is allowed."""

import dataclasses
import pathlib
from collections.abc import Iterable

from matplotlib.figure import Figure
from rich.console import Console

from approx_attention import dimension_bound
from experiments.config import Count, Positive, Seeded, Several
from experiments.results import Frame, Record
from experiments.show import having
from experiments.sparse_patterns.least_channels import drawn, number, search, tables


@dataclasses.dataclass(frozen=True)
class Config(Seeded):
    """Channels against the largest logit that is allowed, for permutations or sparse patterns of one length."""

    methods: Several[str]
    budgets: Several[Positive]
    length: Count = 256
    keys_per_row: Count = 1
    eps1: Positive = 0.1
    eps2: Positive = 0.1
    trials: Count = 3
    num_steps: Count = 300


def run(config: Config, directory: pathlib.Path, console: Console) -> list[Record]:
    """The least channels of each method at each budget, with the lower bound of every method."""
    records: list[Record] = []
    shape = config.length, config.keys_per_row, config.eps1, config.eps2
    ratios = []
    for budget in config.budgets:
        bound = dimension_bound(*shape, kind="packing", max_logit=budget).dim
        for method in config.methods:
            options = {"max_logit": budget, "num_steps": config.num_steps, "max_dim": 2 * config.length}
            found = search(config, config.length, method, config.trials, **options)
            console.print(f"{method}, logits up to {budget:g}: {found.dim:g} channels")
            records.append({"curve": method, "is_bound": False, "budget": budget, "channels": number(found.dim)})
            ratios.append(found.dim / bound)
        records.append({"curve": "packing", "is_bound": True, "budget": budget, "channels": bound})
    return [*records, {"least_over_bound": min(ratios)}]


def table(records: Frame) -> Iterable[str]:
    """Least channels by the largest logit that is allowed."""
    title = "least channels, by the largest logit allowed"
    yield from tables(having(records, "budget"), "budget", "channels", title)


def figure(records: Frame) -> Figure:
    """Least channels by the largest logit that is allowed."""
    labels = ("largest logit allowed", "channels")
    return drawn(having(records, "budget"), "budget", "channels", labels, ("log", "log"))
