"""Whether attention over pairs of keys learns to match triples, and attention over keys does not."""

import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from matplotlib.figure import Figure
from rich.console import Console

from approx_attention import tensor_attention, tensor_polynomial
from approx_attention.evaluation import light_grid, method_styles
from approx_attention.nnx import TensorAttention
from experiments import data
from experiments.config import Count, Seeded
from experiments.data import DataConfig
from experiments.results import Frame, Record
from experiments.show import code, having, markdown, parts, spread
from experiments.training import OptimizerConfig, make_optimizer


@dataclasses.dataclass(frozen=True)
class Config(Seeded):
    """A small transformer whose tokens are signs, and its attention.

    Attributes:
        order: 2 for keys, 3 for pairs of keys.
        degree: that of the polynomial trained in place of exact attention; None for exact.
    """

    data: DataConfig
    train: OptimizerConfig
    order: Literal[2, 3] = 3
    degree: Count | None = None
    num_layers: Count = 1
    num_heads: Count = 1
    model_dim: Count = 32
    head_dim: Count = 16


class MatchModel(nnx.Module):
    """Tokens ``[B, T]`` of a number of bits to the log-odds ``[B, T]`` that each has a match; there are no positions.

    ``streams`` gives ``num_outputs`` numbers for each token.
    """

    def __init__(self, config: Config, bits: int, rngs: nnx.Rngs, *, num_outputs: int = 1, method: Any = None):
        width = config.model_dim
        self.bits = bits
        self.embedding = nnx.Linear(bits, width, rngs=rngs)
        if method is None:
            exact = config.degree is None
            method = tensor_attention if exact else functools.partial(tensor_polynomial, degree=config.degree)
        layers = [
            TensorAttention(
                width,
                num_heads=config.num_heads,
                head_dim=config.head_dim,
                order=config.order,
                method=method,
                rngs=rngs,
            )
            for _ in range(config.num_layers)
        ]
        self.layers = nnx.List(layers)
        self.up = nnx.List([nnx.Linear(width, 4 * width, rngs=rngs) for _ in range(config.num_layers)])
        self.down = nnx.List([nnx.Linear(4 * width, width, rngs=rngs) for _ in range(config.num_layers)])
        self.head = nnx.Linear(width, num_outputs, rngs=rngs)

    def streams(self, tokens: Array) -> tuple[list[Array], Array]:
        """What each attention layer reads, and the outputs ``[B, T, num_outputs]``."""
        signs = 1 - 2 * ((tokens[..., None] >> jnp.arange(self.bits)) & 1)
        x, read = self.embedding(signs.astype(jnp.float32)), []
        for attention, up, down in zip(self.layers, self.up, self.down, strict=True):
            read.append(x)
            x = x + attention(x)
            x = x + down(jax.nn.gelu(up(x)))
        return read, self.head(x)

    def __call__(self, tokens: Array) -> Array:
        return self.streams(tokens)[1][..., 0]


def largest_logit(layer: TensorAttention, x: Array) -> Array:
    """The largest magnitude of a logit between tokens, over a batch."""
    q, keys = layer.query(x), [project(x) for project in layer.keys]
    letters = "jl"[: len(keys)]
    terms = ",".join(["bihd", *(f"b{letter}hd" for letter in letters)])
    return jnp.max(jnp.abs(jnp.einsum(f"{terms}->bhi{letters}", q, *keys))) / math.sqrt(q.shape[-1])


def loss(model: MatchModel, batch: dict[str, Any]) -> Array:
    """Mean binary cross-entropy, in bits."""
    return jnp.mean(optax.sigmoid_binary_cross_entropy(model(batch["tokens"]), batch["targets"])) / math.log(2)


@nnx.jit
def train_step(model: MatchModel, optimizer: nnx.Optimizer, batch: dict[str, Any]) -> Array:
    """One step of gradient descent; returns the loss before it."""
    value, gradient = nnx.value_and_grad(loss)(model, batch)
    optimizer.update(model, gradient)
    return value


def run(config: Config, directory: pathlib.Path, console: Console) -> list[Record]:
    """Trains on fresh data; accuracies on held-out ones, and what logits grew to.

    ``above_majority`` is how much more accurate the model is than always the commonest answer.
    """
    dataset = data.load(config.data)
    model = MatchModel(config, dataset.vocabulary.bit_length() - 1, nnx.Rngs(config.seed))
    optimizer = make_optimizer(config.train, model)
    begun, losses = time.monotonic(), []
    records: list[Record] = []
    for step in range(config.train.steps):
        batch = dataset.draw(np.random.default_rng([config.seed, step]), config.train.batch, "train")
        losses.append(train_step(model, optimizer, batch))
        if (step + 1) % config.train.log_every == 0:
            records.append({"step": step + 1, "bits": float(jnp.mean(jnp.stack(losses)))})
            losses = []
    seconds = time.monotonic() - begun
    batches = data.held_out(dataset, "test", config.train.batch, config.train.evaluation_batches)
    says_yes = nnx.jit(lambda model, tokens: model(tokens) > 0)
    told = np.concatenate([np.asarray(says_yes(model, batch["tokens"])) for batch in batches])
    asked = np.concatenate([batch["targets"] for batch in batches]) > 0
    right = told == asked
    majority = max(asked.mean(), 1 - asked.mean())
    read, _ = model.streams(jnp.asarray(batches[0]["tokens"]))
    largest = max(float(largest_logit(layer, x)) for layer, x in zip(model.layers, read, strict=True))
    score: Record = {
        "accuracy": float(right.mean()),
        "balanced_accuracy": float((right[asked].mean() + right[~asked].mean()) / 2),
        "majority": float(majority),
        "above_majority": float(right.mean() - majority),
        "largest_logit": largest,
        "parameters": sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))),
        "training_seconds": round(seconds, 1),
    }
    return [score, *records]


def table(records: Frame) -> Iterable[str]:
    """Accuracy of each configuration, and that of the commonest answer."""
    rows = [
        [
            code(name),
            *(spread(list(own[figure])) for figure in ("accuracy", "balanced_accuracy", "majority", "largest_logit")),
            f"{own['parameters'].iloc[0]:.0f}",
            f"{own['training_seconds'].mean():.0f} s",
        ]
        for name, own in parts(having(records, "accuracy"))
    ]
    yield markdown("|accuracy|balanced|commonest answer|largest logit|parameters|training", rows)


def figure(records: Frame) -> Figure:
    """The loss in training, and the accuracies."""
    drawn = Figure(figsize=(10, 4.6))
    losses, scores = drawn.subplots(1, 2)
    names = list(dict.fromkeys(records["configuration"]))
    for place, (name, style) in enumerate(method_styles(names).items()):
        own = records[records["configuration"] == name]
        for number, (_, of) in enumerate(having(own, "step").groupby("seed", sort=False)):
            look = {"color": style["color"], "linewidth": 1, "label": name if number == 0 else None}
            losses.plot(of["step"], of["bits"], **look)
        found = having(own, "accuracy")
        scores.plot([place] * len(found), found["accuracy"], linestyle="", **style)
        scores.plot([place - 0.3, place + 0.3], [found["majority"].mean()] * 2, color="0.5", linestyle=":")
    losses.set(xlabel="step", ylabel="bits", yscale="log")
    scores.set_xticks(range(len(names)), [name.replace("-", "\n", 1) for name in names], fontsize=7)
    scores.set(ylabel="accuracy (dotted: the commonest answer)")
    for axes in (losses, scores):
        light_grid(axes)
    drawn.legend(*losses.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return drawn
