"""A window of exact third-order attention against the polynomial method over all tokens, at equal operations."""

import dataclasses
import math
import pathlib
from collections.abc import Iterable
from typing import Literal

import jax
from matplotlib.figure import Figure
from rich.console import Console

from approx_attention import tensor_attention, tensor_polynomial
from approx_attention.core import in_float32
from experiments.config import Count, NonNegative, Positive, Seeded, Several
from experiments.results import Frame, Record
from experiments.show import curves, having, parts, pivot, significant
from experiments.tensor.inputs import clustered, error_and_skill


@dataclasses.dataclass(frozen=True)
class Config(Seeded):
    """Causal clustered tensors, and the degrees whose operations a window gets."""

    degrees: Several[Count]
    order: Literal["mixed", "segments"]
    bound: Positive
    length: Count = 512
    head_dim: Count = 8
    clusters: Count = 8
    noise: NonNegative = 0.3


def run(config: Config, directory: pathlib.Path, console: Console) -> list[Record]:
    """Error and skill of both by the rank of the polynomial, against causal attention over all pairs.

    A polynomial of rank r takes 6 r (Dv + 1) operations for each token and a window of w tokens 2 w^2 (D + Dv).
    """
    dim = config.head_dim
    tensors = clustered(
        jax.random.key(config.seed),
        config.length,
        dim,
        config.bound,
        clusters=config.clusters,
        noise=config.noise,
        order=config.order,
    )
    with in_float32():
        expected = tensor_attention(*tensors, scale=1.0, is_causal="both")
    uniform = tensor_polynomial(*tensors, degree=0, is_causal="both")
    records: list[Record] = [{"uniform_error": error_and_skill(uniform, expected, uniform)[0]}]
    for degree in config.degrees:
        rank = math.comb(dim + degree, degree)
        window = min(config.length, max(1, round(math.sqrt(3 * rank * (dim + 1) / (2 * dim)))))
        outs = {
            "window": tensor_attention(*tensors, scale=1.0, is_causal="both", window=window),
            "polynomial": tensor_polynomial(*tensors, scale=1.0, degree=degree, is_causal="both"),
        }
        for name, out in outs.items():
            error, skill = error_and_skill(out, expected, uniform)
            records.append({"method": name, "rank": rank, "window": window, "error": error, "skill": skill})
    return records


def table(records: Frame) -> Iterable[str]:
    """Skill and error of both by the rank of the polynomial."""
    for name, own in parts(records):
        uniform = significant(list(own["uniform_error"].dropna()))
        yield f"`{name}` clusters: uniform weights have error {uniform}, and skill error 1"
        shown = having(own, "rank").rename(columns={"skill": "skill error"})
        heads = ["rank", "window"]
        yield pivot(shown, heads, "method", ["skill error", "error"], head=heads, quoted=False)


def figure(records: Frame) -> Figure:
    """Skill of both by the rank of the polynomial."""
    found = having(records, "rank")
    windows = dict(zip(found["rank"], found["window"], strict=True))
    return curves(
        found,
        x="rank",
        y="skill",
        by="method",
        labels=("rank, and the window of equal cost", "skill error"),
        ticks=lambda rank: f"{rank:g}\n{windows[rank]:g}",
        titles=lambda name: f"{name} clusters",
        each=lambda axes, *_: axes.axhline(1, color="0.5", linewidth=0.8),
    )
