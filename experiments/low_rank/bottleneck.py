"""The attention weights that a head of few channels can express: positive stochastic matrices, regressed."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import Array
from rich.console import Console

from approx_attention.core import in_float32
from approx_attention.realization import needed_head_dim, realize_attention
from experiments.config import Count, Positive, Seeded, Several
from experiments.results import Frame, Record
from experiments.show import curves, having, parts, pivot


@dataclasses.dataclass(frozen=True)
class Config(Seeded):
    """Random weights, and the sizes of the heads that are fitted to them.

    Attributes:
        weights: the softmax of Gaussian logits of deviation 1, or rows that are uniform on the simplex.
        steps: of Adam, from the queries and keys whose logits are nearest.
    """

    head_dims: Several[Count]
    weights: Literal["gaussian", "uniform"] = "gaussian"
    length: Count = 24
    steps: Count = 3000
    learning_rate: Positive = 3e-3


@functools.partial(jax.jit, static_argnames=("steps", "rate"))
@in_float32()
def _errors(start: tuple[Array, Array], used: Array, weights: Array, *, steps: int, rate: float) -> tuple[Array, Array]:
    """The largest total variation of a row, before and after the fit; channels that are not used stay 0."""
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def attention(factors: tuple[Array, Array]) -> Array:
        q, k = (jnp.where(used[None, :], x, 0) for x in factors)
        return jax.nn.log_softmax(q @ k.T)

    def loss(factors: tuple[Array, Array]) -> Array:
        return -jnp.mean(jnp.sum(weights * attention(factors), axis=1))

    def step(state: Any, _: None) -> tuple[Any, None]:
        factors, memory = state
        updates, memory = optimizer.update(jax.grad(loss)(factors), memory)
        return (optax.apply_updates(factors, updates), memory), None

    def variation(factors: tuple[Array, Array]) -> Array:
        return jnp.max(jnp.sum(jnp.abs(jnp.exp(attention(factors)) - weights), axis=1)) / 2

    fitted = jax.lax.scan(step, (start, optimizer.init(start)), None, length=steps)[0][0]
    # Where the start is exact a fit only adds the noise of its steps.
    return variation(start), jnp.minimum(variation(start), variation(fitted))


def run(config: Config, directory: pathlib.Path, console: Console) -> list[Record]:
    """The error of the nearest logits and of the fit, by the size of the head, and the size that is needed."""
    n, key = config.length, jax.random.key(config.seed)
    of = {"gaussian": jax.random.normal, "uniform": lambda key, shape: jnp.log(jax.random.exponential(key, shape))}
    weights = jax.nn.softmax(of[config.weights](key, (n, n)))
    records: list[Record] = [{"needed": int(needed_head_dim(weights))}]
    for head_dim in config.head_dims:
        q, k = realize_attention(weights, head_dim)
        # One shape for all sizes, and logits without a scale.
        q, k = (jnp.pad(x / head_dim**0.25, ((0, 0), (0, n - head_dim))) for x in (q, k))
        used = jnp.arange(n) < head_dim
        errors = _errors((q, k), used, weights, steps=config.steps, rate=config.learning_rate)
        for kind, error in zip(("nearest logits", "fitted"), errors, strict=True):
            records.append({"kind": kind, "head_dim": head_dim, "error": float(error)})
        console.print(f"{head_dim} channels: {errors[1]:.2g}")
    return records


def table(records: Frame) -> Iterable[str]:
    """Errors by the size of the head."""
    for name, own in parts(records):
        needed = ", ".join(f"{x:g}" for x in sorted(set(own["needed"].dropna())))
        yield f"`{name}`: largest total variation of a row, by channels of the head; needed are {needed}"
        yield pivot(having(own, "kind", "error"), "kind", "head_dim", "error", quoted=False)


# Errors by the size of the head.
figure = functools.partial(
    curves,
    x="head_dim",
    y="error",
    by="kind",
    labels=("channels of the head", "largest total variation of a row"),
    scales=("linear", "log"),
    least=1e-7,
    size=(5.2, 3.8),
)
