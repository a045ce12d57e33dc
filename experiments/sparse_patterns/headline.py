"""Channels that each construction needs for patterns of one length."""

import dataclasses
import math
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
from matplotlib.figure import Figure
from rich.console import Console

from approx_attention import SparsePattern, realize_sparse_pattern
from experiments.config import Count, Positive, Seeded, Several
from experiments.results import Frame, Record
from experiments.show import code, markdown, panels, parts, whole
from experiments.sparse_patterns.search import least_channels


@dataclasses.dataclass(frozen=True)
class Config(Seeded):
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


def run(config: Config, directory: pathlib.Path, console: Console) -> list[Record]:
    """Channels that each method needs, and the logits and the total variation that it has there."""
    records: list[Record] = []
    eps = config.eps1, config.eps2
    for method in config.methods:
        options: dict[str, Any] = {"max_logit": config.max_logit}
        trials = least_channels(config, config.length, config.keys_per_row, eps, method, **options)
        least = sorted(trials)[len(trials) // 2]
        console.print(f"{method}: {least} channels")
        entry: Record = {"method": method, "tokens": config.length, "channels": least, "trials": trials}
        if math.isfinite(least):
            key = jax.random.key(config.seed)
            pattern = SparsePattern.random(key, config.length, config.keys_per_row)
            options |= {"d": int(least), "key": key, "method": method, "num_steps": config.num_steps}
            certificate = realize_sparse_pattern(pattern, *eps, **options).certificate
            entry["logit_absmax"] = float(certificate.logit_absmax)
            entry["max_row_tv"] = float(certificate.max_row_tv)
        records.append(entry)
    return records


def table(records: Frame) -> Iterable[str]:
    """Least channels of every method, and the realisation there, by configuration."""
    for name, own in parts(records):
        rows = [
            [
                code(method),
                whole(list(of["channels"])),
                *(
                    "" if of[figure].isna().any() else f"{of[figure].mean():.3g}"
                    for figure in ("logit_absmax", "max_row_tv")
                ),
            ]
            for method, of in parts(own, "method")
        ]
        yield f"`{name}`: least channels at {own['tokens'].iloc[0]:g} tokens, and the realisation with these"
        yield markdown("|channels|largest logit|total variation of a row", rows)


def figure(records: Frame) -> Figure:
    """Least channels as bars."""
    groups = list(parts(records[records["channels"].map(math.isfinite)]))
    drawn, axes = panels(len(groups), size=(4.4, 3.6), sharex=True)
    for ax, (name, own) in zip(axes, groups, strict=True):
        dims = own.groupby("method", sort=False)["channels"].mean()
        bars = ax.barh(range(len(dims)), dims, color="C0")
        ax.bar_label(bars, [f"{dim:.0f}" for dim in dims], padding=3)
        ax.axvline(own["tokens"].iloc[0], color="0.3", linestyle=":")
        ax.set_yticks(range(len(dims)), [method.replace("_", " ") for method in dims.index])
        ax.set(title=name, xscale="log", xlabel="channels (dotted: tokens)")
        ax.margins(x=0.25)
        ax.invert_yaxis()
    return drawn
