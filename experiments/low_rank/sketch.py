"""The error of sketches of values next to its closed form, and what the same matrices do before the softmax."""

import dataclasses
import pathlib
import statistics
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from approx_attention import bounds, exact, importance_sample, linformer, mean_value, svd, unreduced_jlt
from approx_attention.core import SKETCHES, draw_sketch, in_float32
from experiments.config import Count, NonNegative, Positive, Seeded, Several, Share
from experiments.control_variates import gap
from experiments.low_rank import by_size
from experiments.results import Frame, Record
from experiments.show import having, pivot


@dataclasses.dataclass(frozen=True)
class Config(Seeded):
    """Tensors as in `gap`, and the numbers of rows.

    Attributes:
        draws: over how many keys squared errors are averaged.
        delta: the factor of the construction in the proof of Linformer's theorem 2, in units of 1 / length.
    """

    sizes: Several[Count]
    length: Count = 512
    head_dim: Count = 64
    smoothing: NonNegative = 0.0
    spread: NonNegative = 1.0
    shared: Share = 0.0
    draws: Count = 8
    delta: Positive = 1.0


@in_float32()  # the errors are those of closed forms
def run(config: Config, directory: pathlib.Path, console: Console) -> list[Record]:
    """Root of the mean squared error over the norm of the exact output, by kind and size.

    With it the quantity of Linformer's theorem 2, the largest error of a row over ``|P_i| |V|``, which an output of 0
    keeps below 1, with the largest of ``sizes`` below ``length``.
    """
    shape = {name: getattr(config, name) for name in ("length", "head_dim", "smoothing", "spread", "shared", "seed")}
    q, k, v = (x[0, :, 0] for x in gap.smoothed(gap.Config({}, **shape)))
    expected = exact(q, k, v)
    norm = float(jnp.linalg.norm(expected))
    weights = exact(q, k, jnp.eye(config.length))
    keys = jax.random.split(jax.random.key(config.seed), config.draws)

    def error(function: Any) -> float:
        squares = [float(jnp.sum((function(key) - expected) ** 2)) for key in keys]
        return statistics.fmean(squares) ** 0.5 / norm

    def before(key: Any, size: int, kind: str, factors: tuple[float, float] = (1.0, 1.0)) -> Any:
        matrix = draw_sketch(key, kind, size, config.length) @ jnp.eye(config.length)
        return linformer(q, k, v, projection_k=factors[0] * matrix, projection_v=factors[1] * matrix)

    delta = config.delta / config.length
    of_the_proof = delta, float(np.exp(-delta))
    allowed = jnp.linalg.norm(weights, axis=1) * jnp.linalg.norm(v)

    def of_theorem_2(out: Any) -> float:
        return float(jnp.max(jnp.linalg.norm(out - expected, axis=1) / allowed))

    most = config.sizes[-2] if config.sizes[-1] == config.length else config.sizes[-1]
    theorem_2 = {
        "gaussian, before": of_theorem_2(before(keys[0], most, "gaussian")),
        "construction of the proof": of_theorem_2(before(keys[0], most, "gaussian", of_the_proof)),
        "mean of the values": of_theorem_2(mean_value(q, k, v)),
        "zero": of_theorem_2(jnp.zeros_like(expected)),
    }
    errors: dict[str, dict[int, float]] = {}
    records: list[Record] = []
    for size in config.sizes:
        row: dict[str, float] = {}
        for kind in SKETCHES:
            options: Any = {"sketch": kind, "sketch_size": size, "centred": False}
            row[kind] = error(lambda key, options=options: unreduced_jlt(q, k, v, key, **options))
            row[f"{kind}{by_size.CLOSED}"] = float(bounds.sketch_mse(weights, v, size, kind)) ** 0.5 / norm
        row["centred hadamard"] = error(lambda key, size=size: unreduced_jlt(q, k, v, key, sketch_size=size))
        for kind in ("gaussian", "hadamard"):
            row[f"{kind}, before"] = error(lambda key, size=size, kind=kind: before(key, size, kind))
        row["construction of the proof"] = error(lambda key, size=size: before(key, size, "gaussian", of_the_proof))
        row["importance_sample"] = error(lambda key, size=size: importance_sample(q, k, v, key, sample_size=size))
        row["linformer, means"] = float(jnp.linalg.norm(linformer(q, k, v, num_slots=size) - expected)) / norm
        row["svd"] = float(jnp.linalg.norm(svd(q, k, v, rank=size) - expected)) / norm
        for kind, figure in row.items():
            records.append({"kind": kind, "size": size, "error": figure})
            errors.setdefault(kind, {})[size] = figure
    records.append({"mean_value_error": float(jnp.linalg.norm(mean_value(q, k, v) - expected)) / norm})
    for kind in SKETCHES:
        off = _largest_deviation(errors[kind], errors[f"{kind}{by_size.CLOSED}"])
        records.append({"kind": kind, "off_the_closed_form": off})
    return records + [{"output": name, "theorem_2": share} for name, share in theorem_2.items()]


def _largest_deviation(measured: dict[int, float], promised: dict[int, float]) -> float:
    """By how much a measured error differs from the promised one at most, where that is not 0."""
    return max(abs(measured[size] / error - 1) for size, error in promised.items() if error > 1e-3)


def table(records: Frame) -> Iterable[str]:
    """Errors by size, and the largest error of a row in units of theorem 2."""
    yield from by_size.table(records)
    yield "Largest error of a row, in units of what theorem 2 of Linformer allows for epsilon 1"
    yield pivot(having(records, "theorem_2"), "configuration", "output", "theorem_2")


figure = by_size.figure
