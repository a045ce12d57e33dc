"""The error of random features: of one entry of the softmax kernel, next to its closed form, and of whole outputs."""

import dataclasses
import functools
import itertools
import math
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure
from rich.console import Console

from approx_attention import exact, fold_scale, mean_value
from approx_attention.bounds import favor_mse
from approx_attention.core import (
    Features,
    PositiveFeatures,
    TrigonometricFeatures,
    gaussian_projection,
    in_float32,
    orthogonal_projection,
)
from approx_attention.evaluation import output_error
from experiments.config import Count, Positive, Seeded, Several
from experiments.results import Frame, Record
from experiments.show import curves, having, lookup, parts, pivot, significant

# Draws of directions that are made at a time.
_AT_ONCE = 4096


@dataclasses.dataclass(frozen=True)
class Config(Seeded):
    """A query and keys of one norm at these angles, and one head of Gaussian tensors.

    Attributes:
        angles: between the query and a key, in degrees.
        norm: of the query and the keys, whose logits have no further scale.
        entry_features: number of features of an entry; at most ``head_dim``, for which theorem 2 holds.
        draws: over how many sets of directions squared errors of an entry are averaged, a multiple of 4096.
        sizes: numbers of features of outputs.
        spreads: standard deviations of the entries of q and k of the head.
        samples: sets of directions of an output, of whose errors the median is reported.
    """

    angles: Several[Positive]
    sizes: Several[Count]
    spreads: Several[Positive]
    norm: Positive = 0.7
    entry_features: Count = 16
    draws: Count = 2**18
    head_dim: Count = 16
    length: Count = 1024
    samples: Count = 32

    def __post_init__(self) -> None:
        if self.draws % _AT_ONCE:
            raise ValueError(f"draws must be a multiple of {_AT_ONCE}, got {self.draws}")
        if self.samples > _AT_ONCE:
            raise ValueError(f"samples must be at most {_AT_ONCE}, got {self.samples}")
        if self.entry_features > self.head_dim:
            raise ValueError(f"entry_features is {self.entry_features}, more than head_dim, {self.head_dim}")
        if any(size % 2 for size in (self.entry_features, *self.sizes)):
            raise ValueError("entry_features and sizes must be even: half of the directions make two features each")


Projection = Callable[[Array, int, int], Array]


def _positive(projection: Projection, key: Array, size: int, head_dim: int) -> PositiveFeatures:
    return PositiveFeatures(projection(key, size, head_dim))


def _hyperbolic(projection: Projection, key: Array, size: int, head_dim: int) -> PositiveFeatures:
    directions = projection(key, size // 2, head_dim)
    return PositiveFeatures(jnp.concatenate([directions, -directions]))


def _trigonometric(projection: Projection, key: Array, size: int, head_dim: int) -> TrigonometricFeatures:
    return TrigonometricFeatures(projection(key, size // 2, head_dim))


KINDS = {"positive": _positive, "hyperbolic": _hyperbolic, "trigonometric": _trigonometric}
ORTHOGONAL = "{}, orthogonal"
# All kinds of features, with independent and with orthogonal directions, by name.
MAPS: dict[str, Callable[[Array, int, int], Any]] = {
    name.format(kind): functools.partial(make, projection)
    for kind, make in KINDS.items()
    for name, projection in (("{}", gaussian_projection), (ORTHOGONAL, orthogonal_projection))
}


def _magnitudes(features: Features) -> Array:
    return features.values * jnp.exp(features.log_scale)


@functools.partial(jax.jit, static_argnames=("name", "size"))
def _squares(keys: Array, q: Array, k: Array, *, name: str, size: int) -> Array:
    """The mean over draws of the squared error of every entry, relative to the entry ``[keys]``."""

    def one(key: Array) -> Array:
        features = MAPS[name](key, size, q.shape[1])
        entries = _magnitudes(features(q)) @ _magnitudes(features(k)).T
        return (entries[0] / jnp.exp(q @ k.T)[0] - 1) ** 2

    return jnp.mean(jax.vmap(one)(keys), axis=0)


@functools.partial(jax.jit, static_argnames=("name", "size"))
def _outputs(keys: Array, q: Array, k: Array, v: Array, *, name: str, size: int) -> tuple[Array, Array]:
    """The outputs of every draw, and the share of its queries whose estimated normaliser is not positive."""

    def one(key: Array) -> tuple[Array, Array]:
        # Not by `kernel_state`, which is for features without a sign.
        features = MAPS[name](key, size, q.shape[1])
        weights = _magnitudes(features(q)) @ _magnitudes(features(k)).T
        normaliser = jnp.sum(weights, axis=1, keepdims=True)
        return weights @ v / normaliser, jnp.mean(normaliser <= 0)

    return jax.lax.map(one, keys)


@in_float32()
def run(config: Config, directory: pathlib.Path, console: Console) -> list[Record]:
    """Errors of an entry by angle and of an output by number of features, for every kind of features.

    ``error`` is the root of the mean squared error of an entry relative to the entry, ``closed_form`` that of lemma 2
    for independent directions. ``off_the_closed_form`` is the largest relative difference of the two mean squares, and
    ``share_of_theorem_2`` the largest mean square with orthogonal directions over the bound of the theorem.
    """
    turns = jnp.asarray(np.radians(config.angles), jnp.float32)
    q = config.norm * jnp.eye(1, config.head_dim)
    k = config.norm * jnp.zeros((len(turns), config.head_dim)).at[:, 0].set(jnp.cos(turns)).at[:, 1].set(jnp.sin(turns))
    logits, size = np.asarray(q @ k.T, np.float64)[0], config.entry_features
    keys = jax.random.split(jax.random.key(config.seed), (config.draws // _AT_ONCE, _AT_ONCE))
    squares = {
        name: np.mean([np.asarray(_squares(part, q, k, name=name, size=size), np.float64) for part in keys], axis=0)
        for name in MAPS
    }
    records: list[Record] = []
    for kind in KINDS:
        options: Any = {"features": kind, "scale": 1.0}
        closed = np.asarray(favor_mse(q, k, size, **options), np.float64)[0]
        records.append({"kind": kind, "off_the_closed_form": float(np.max(np.abs(squares[kind] / closed - 1)))})
        for name in (kind, ORTHOGONAL.format(kind)):
            for angle, square, promised in zip(config.angles, squares[name], closed, strict=True):
                errors = {"error": math.sqrt(square), "closed_form": math.sqrt(promised)}
                records.append({"kind": name, "angle": angle, **errors})
        if kind == "positive":
            # Theorem 2: what orthogonal directions gain at least, relative to the entry.
            gain = 2 * (size - 1) / (size * (config.head_dim + 2)) * (1 - np.exp(-(config.norm**2) - logits)) ** 2
            share = squares[ORTHOGONAL.format(kind)] / (closed - gain)
            records.append({"share_of_theorem_2": float(np.max(share))})
    return [*records, *_of_outputs(config, keys[0, : config.samples])]


def _of_outputs(config: Config, keys: Array) -> Iterable[Record]:
    random = np.random.default_rng(config.seed)
    unit_q, unit_k, v = (jnp.asarray(random.normal(size=(config.length, config.head_dim)), jnp.float32) for _ in "qkv")
    for spread in config.spreads:
        q, k = spread * unit_q, spread * unit_k
        truth, scaled = exact(q, k, v), fold_scale(q, k)
        yield {"spread": spread, "mean_value_error": float(output_error(mean_value(q, k, v), truth).relative)}
        for name, size in itertools.product(MAPS, config.sizes):
            outs, without = _outputs(keys, *scaled, v, name=name, size=size)
            error = float(np.median([output_error(out, truth).relative for out in outs]))
            own: Record = {"output_error": error, "share_without_normaliser": float(jnp.mean(without))}
            yield {"kind": name, "spread": spread, "size": size, **own}


def table(records: Frame) -> Iterable[str]:
    """Errors of an entry by angle, and of outputs by the number of features."""
    yield (
        "Error of an entry of the kernel relative to the entry, by the angle between query and key in degrees; in the "
        "last column, the largest relative difference between the mean squared error and its closed form"
    )
    more = lookup(records, "kind", "off_the_closed_form", significant)
    yield pivot(having(records, "error"), "kind", "angle", "error", more=more, quoted=False)
    trivial = having(records, "mean_value_error")
    for spread, own in parts(having(records, "output_error"), "spread"):
        mean = significant(list(trivial[trivial["spread"] == spread]["mean_value_error"]))
        yield (
            "Relative error of an output (median of the draws), by the number of features; entries of queries and keys "
            f"have a standard deviation of {spread:g}, and the mean of the values errs by {mean}"
        )
        yield pivot(own, "kind", "size", "output_error", quoted=False)
    yield (
        "Share of the queries whose estimated normaliser is not positive, by spread and number of features; only "
        "trigonometric features have a sign"
    )
    outputs = having(records, "output_error")
    yield pivot(
        outputs[outputs["kind"].str.startswith("trigonometric")],
        ["kind", "spread"],
        "size",
        "share_without_normaliser",
        head=["", "spread"],
        quoted=False,
    )


def figure(records: Frame) -> Figure:
    """Errors of an entry by angle; the closed forms for independent directions as thin lines."""
    errors = having(records, "error")

    def closed_forms(axes: Any, *_: Any) -> None:
        for kind in KINDS:
            line = errors[errors["kind"] == kind].groupby("angle")["closed_form"].mean()
            axes.plot(line.index, line, color="0.2", linewidth=0.8)

    return curves(
        errors,
        x="angle",
        y="error",
        by="kind",
        labels=("angle between query and key in degrees (thin: closed form)", "relative error of an entry"),
        scales=("linear", "log"),
        ticks=lambda angle: f"{angle:g}",
        each=closed_forms,
        size=(7.0, 4.4),
    )
