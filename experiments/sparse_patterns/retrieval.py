"""The error of attention over a few retrieved keys, by their number and by the number of all keys."""

import dataclasses
import functools
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

from approx_attention import exact, lsh_priority, lsh_top_k, mean_value, priority, top_k
from approx_attention.core import in_float32
from approx_attention.evaluation import load_sample, output_error
from experiments.config import Count, Seeded, Several
from experiments.fits import slope
from experiments.results import Frame, Record
from experiments.show import curves, having, parts, pivot, significant, slopes, thousands
from experiments.whole_picture import where_we_lose


@dataclasses.dataclass(frozen=True)
class Config(Seeded):
    """Queries over many keys, and the number of keys that they read.

    Attributes:
        data: ``sharp_head`` or ``diffuse_head`` of the sample, whose number of keys is its own, or a family of
            `where_we_lose`.
        keys_read: numbers of keys per query.
        num_keys: numbers of all keys.
        queries: the number of queries.
        samples: of a random method, whose squared errors are averaged.
    """

    keys_read: Several[Count]
    num_keys: Several[Count]
    data: str = "gaussian-1"
    queries: Count = 64
    samples: Count = 8

    def __post_init__(self) -> None:
        if self.data not in HEADS:
            where_we_lose.Config([self.data], tokens=1)


HEADS = {"sharp_head": 0, "diffuse_head": 1}


def half_uniform(q: Array, k: Array, v: Array, key: Array, *, keys_per_query: int) -> Array:
    """Half of the keys by their logits, and as many of the others at random, which stand for all others."""
    logits = q @ k.T / math.sqrt(q.shape[1])
    half = keys_per_query // 2
    largest, best = jax.lax.top_k(logits, half)
    ranks = jax.random.uniform(key, logits.shape).at[jnp.arange(len(q))[:, None], best].set(-1.0)
    others = jax.lax.top_k(ranks, keys_per_query - half)[1]
    weight = math.log((k.shape[0] - half) / (keys_per_query - half))
    places = jnp.concatenate([best, others], axis=1)
    chosen = jnp.concatenate([largest, jnp.take_along_axis(logits, others, axis=1) + weight], axis=1)
    return jnp.einsum("tk,tkd->td", jax.nn.softmax(chosen), v[places])


METHODS: dict[str, Callable[..., Array]] = {
    "priority": priority,
    "top_k": lambda q, k, v, key, *, keys_per_query: top_k(q, k, v, keys_per_query=keys_per_query),
    "half top_k, half uniform": half_uniform,
    "lsh_priority": lsh_priority,
    "lsh_top_k": lsh_top_k,
}


@functools.partial(jax.jit, static_argnames=("name", "keys_per_query"))
def _outputs(q: Array, k: Array, v: Array, keys: Array, *, name: str, keys_per_query: int) -> Array:
    return jax.lax.map(lambda key: METHODS[name](q, k, v, key, keys_per_query=keys_per_query), keys)


def _tensors(config: Config, num_keys: int) -> tuple[Array, Array, Array]:
    if config.data in HEADS:
        query, key, value = (x[HEADS[config.data], :, 0].astype(jnp.float32) for x in load_sample())
        return query[-config.queries :], key[-num_keys:], value[-num_keys:]
    settings: Any = {"tokens": 1, "length": num_keys, "num_heads": 1, "seed": config.seed}
    q, k, v = (x[0, :, 0] for x in where_we_lose.draw(where_we_lose.Config([config.data], **settings), config.data))
    places = np.random.default_rng(config.seed).choice(num_keys, config.queries, replace=False)
    return q[places], k, v


@in_float32()  # rounding of keys would be a further error
def run(config: Config, directory: pathlib.Path, console: Console) -> list[Record]:
    """Error by method, keys read and number of keys, with the exponents of both.

    ``error`` is relative to the norm of the outputs, and ``value_error`` is the root mean square over queries in units
    of the largest norm of a value, as the theorem has it: outputs that average many values are small, and errors
    relative to them grow.
    """
    records: list[Record] = []
    found: dict[tuple[str, int, int], float] = {}
    for num_keys in config.num_keys:
        q, k, v = _tensors(config, num_keys)
        truth = exact(q, k, v)
        trivial = float(output_error(mean_value(q, k, v), truth).relative)
        records.append({"num_keys": num_keys, "mean_value_error": trivial})
        for read in (n for n in config.keys_read if n < num_keys):
            for name in METHODS:
                keys = jax.random.split(jax.random.key(config.seed), config.samples)
                outs = _outputs(q, k, v, keys, name=name, keys_per_query=read)
                errors = [float(output_error(out, truth).relative) for out in outs]
                squares = jnp.sum((outs - truth[None]) ** 2, axis=-1)
                in_values = float(jnp.sqrt(jnp.mean(squares)) / jnp.max(jnp.linalg.norm(v, axis=-1)))
                found[name, num_keys, read] = in_values
                figures = {"error": math.sqrt(np.mean(np.square(errors))), "value_error": in_values}
                records.append({"method": name, "num_keys": num_keys, "keys_read": read, **figures})
        console.print(f"{config.data}, {num_keys} keys")
    most, least = max(config.num_keys), min(config.keys_read)
    for name in METHODS:
        by_read = {read: error for (of, n, read), error in found.items() if (of, n) == (name, most)}
        by_keys = {n: error for (of, n, read), error in found.items() if (of, read) == (name, least)}
        records.append({"method": name, **slope(by_read, "slope_in_read"), **slope(by_keys, "slope_in_keys")})
    return records


def table(records: Frame) -> Iterable[str]:
    """Errors by the keys read, and by the number of keys, with their exponents."""
    for name, own in parts(records):
        errors = having(own, "method", "error")
        most, least = errors["num_keys"].max(), errors["keys_read"].min()
        trivial = own[own["num_keys"] == most]["mean_value_error"].dropna()
        trivially = significant(list(trivial))
        yield f"`{name}`: relative error with {most:g} keys, by the number read; mean of the values {trivially}"
        yield pivot(errors[errors["num_keys"] == most], "method", "keys_read", "error", quoted=False)
        yield f"`{name}`: error in units of the largest value with {most:g} keys, by the number read"
        more = slopes(own, "method", "slope_in_read")
        yield pivot(errors[errors["num_keys"] == most], "method", "keys_read", "value_error", more=more, quoted=False)
        if errors["num_keys"].nunique() > 1:
            yield f"`{name}`: error in units of the largest value with {least:g} keys read, by the number of keys"
            more, few = slopes(own, "method", "slope_in_keys"), errors[errors["keys_read"] == least]
            yield pivot(few, "method", "num_keys", "value_error", more=more, quoted=False)


def figure(records: Frame) -> Figure:
    """Errors by the number of keys that a query reads, where it varies, at the most keys of each configuration."""
    errors = having(records, "method", "error")
    most, read = (
        errors.groupby("configuration")[name].transform(how)
        for name, how in (("num_keys", "max"), ("keys_read", "nunique"))
    )
    shown = errors[(errors["num_keys"] == most) & (read > 1)]
    labels = ("keys that a query reads", "relative error")
    return curves(shown, x="keys_read", y="error", by="method", labels=labels, ticks=thousands)
