"""Projections fitted to softmax attention on one kind of data, against the best matrix of their rank."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from approx_attention import exact, linformer, mean_value, svd
from experiments.config import Count, NonNegative, Positive, Seeded, Several
from experiments.low_rank import by_size
from experiments.results import Record


@dataclasses.dataclass(frozen=True)
class Config(Seeded):
    """Noisy tokens with positions, through fixed random maps to q and k, and how long to fit."""

    sizes: Several[Count]
    length: Count = 64
    head_dim: Count = 16
    spread: NonNegative = 1.5
    noise: NonNegative = 0.5
    steps: Count = 500
    batch: Count = 8
    learning_rate: Positive = 1e-2


def run(config: Config, directory: pathlib.Path, console: Console) -> list[Record]:
    """Relative error on fresh data of every kind of projection, by the number of slots."""
    length, head_dim = config.length, config.head_dim
    key_maps, key_positions, key_train, key_test = jax.random.split(jax.random.key(config.seed), 4)
    maps = jax.random.normal(key_maps, (3, head_dim, head_dim)) / np.sqrt(head_dim)
    maps = maps * jnp.array([config.spread, config.spread, 1.0])[:, None, None]
    positions = jax.random.normal(key_positions, (length, head_dim))

    def draw(key: Any, count: int) -> Any:
        x = positions + config.noise * jax.random.normal(key, (count, length, head_dim))
        return tuple(jnp.einsum("bnd,de->bne", x, m) for m in maps)

    def errors(function: Any, tensors: Any) -> Any:
        out = jax.vmap(function)(*tensors)
        target = jax.vmap(exact)(*tensors)
        return jnp.sum((out - target) ** 2) / jnp.sum(target**2)

    def fitted(size: int, shared: bool) -> float:
        names = ("projection_k",) if shared else ("projection_k", "projection_v")
        drawn = jax.random.normal(jax.random.key(config.seed + 1), (len(names), size, length)) / np.sqrt(length)
        projections = dict(zip(names, drawn, strict=True))
        optimizer = optax.adam(config.learning_rate)

        def loss(projections: Any, key: Any) -> Any:
            return errors(lambda q, k, v: linformer(q, k, v, **projections), draw(key, config.batch))

        @jax.jit
        def steps(projections: Any) -> Any:
            def step(state: Any, key: Any) -> Any:
                projections, memory = state
                updates, memory = optimizer.update(jax.grad(loss)(projections, key), memory)
                return (optax.apply_updates(projections, updates), memory), None

            state = (projections, optimizer.init(projections))
            return jax.lax.scan(step, state, jax.random.split(key_train, config.steps))[0][0]

        learned = steps(projections)
        return float(errors(lambda q, k, v: linformer(q, k, v, **learned), test)) ** 0.5

    test = draw(key_test, 32)
    records: list[Record] = []
    for size in config.sizes:
        gaussian = jax.random.normal(jax.random.key(config.seed + 2), (size, length)) / np.sqrt(size)
        row = {
            "svd": float(errors(lambda q, k, v, size=size: svd(q, k, v, rank=size), test)) ** 0.5,
            "learned E and F": fitted(size, False),
            "learned E = F": fitted(size, True),
            "means": float(errors(lambda q, k, v, size=size: linformer(q, k, v, num_slots=size), test)) ** 0.5,
            "gaussian": float(errors(lambda q, k, v, e=gaussian: linformer(q, k, v, projection_k=e), test)) ** 0.5,
            "mean of the values": float(errors(mean_value, test)) ** 0.5,
        }
        records += [{"kind": kind, "size": size, "error": error} for kind, error in row.items()]
    return records


table, figure = by_size.table, by_size.figure
