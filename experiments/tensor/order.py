"""The least width at which attention learns to match triples of tokens or to compose functions, by its order."""

import dataclasses
import pathlib
import time
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from matplotlib.figure import Figure
from rich.console import Console

from approx_attention import strassen_attention, tensor_attention, tree_attention
from approx_attention.evaluation import light_grid, method_styles
from experiments import data
from experiments.config import Count, Seeded, Several, Share
from experiments.data import DataConfig
from experiments.data.dataset import SPLITS
from experiments.results import Frame, Record
from experiments.show import curves, having, panels, pivot, spread, whole
from experiments.tensor import match
from experiments.tensor.match import MatchModel
from experiments.training import OptimizerConfig, make_optimizer

# Methods of `TensorAttention`, which hands them its causality: these have none.
_METHODS: Mapping[str, Any] = {
    "second": tensor_attention,
    "third": tensor_attention,
    "strassen": lambda q, k, v, key, *, kv_mask, is_causal: strassen_attention(q, k, v, kv_mask=kv_mask),
    "tree": lambda q, k, v, key, *, kv_mask, is_causal: tree_attention(q, k, v, parents=(-1, 0), kv_mask=kv_mask),
}


@dataclasses.dataclass(frozen=True)
class Config(Seeded):
    """A small transformer whose tokens are signs, its attention, and the widths that are tried.

    Attributes:
        attention: over keys (second), over pairs of keys (third), or over pairs whose logits are sums over the three
            pairs of tokens (strassen) or over the two edges of a path (tree).
        widths: of the residual stream, tried in turn until one learns the task.
        least_head_dim: a head has width / num_heads channels, and no fewer than this.
        enough: the accuracy that ends the training of a width, and the search.
    """

    data: DataConfig
    train: OptimizerConfig
    attention: Literal["second", "third", "strassen", "tree"] = "third"
    num_layers: Count = 1
    num_heads: Count = 1
    widths: Several[Count] = dataclasses.field(default_factory=lambda: [4, 8, 16, 32, 64])
    least_head_dim: Count = 8
    enough: Share = 0.95

    def __post_init__(self) -> None:
        if self.widths != sorted(set(self.widths)):
            raise ValueError(f"widths must increase, got {self.widths}")


# Arrays of NumPy or JAX, by name.
Batch = Mapping[str, Any]


def make_model(config: Config, width: int, bits: int, num_outputs: int) -> MatchModel:
    """A freshly initialised model of one width."""
    sizes = match.Config(
        config.data,
        config.train,
        order=2 if config.attention == "second" else 3,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        model_dim=width,
        head_dim=max(config.least_head_dim, width // config.num_heads),
    )
    rngs, method = nnx.Rngs(config.seed), _METHODS[config.attention]
    return MatchModel(sizes, bits, rngs, num_outputs=num_outputs, method=method)


def loss(model: MatchModel, batch: Batch) -> Array:
    """Mean cross-entropy over the tokens that are asked about."""
    (_, logits), asked = model.streams(batch["tokens"]), batch["targets"] >= 0
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(batch["targets"], 0))
    return jnp.where(asked, entropy, 0).sum() / asked.sum()


@nnx.jit
def train_steps(model: MatchModel, optimizer: nnx.Optimizer, batches: Batch) -> None:
    """A step of gradient descent for each of several batches, in one program."""
    graph, state = nnx.split((model, optimizer))

    def step(state: Any, batch: Batch) -> tuple[Any, None]:
        model, optimizer = nnx.merge(graph, state)
        optimizer.update(model, nnx.grad(loss)(model, batch))
        return nnx.state((model, optimizer)), None

    state, _ = jax.lax.scan(step, state, batches)
    nnx.update((model, optimizer), state)


@nnx.jit
def hits(model: MatchModel, batch: Batch) -> Array:
    """Share of the targets that the model tells."""
    (_, logits), asked = model.streams(batch["tokens"]), batch["targets"] >= 0
    return jnp.sum((logits.argmax(-1) == batch["targets"]) & asked) / asked.sum()


def run(config: Config, directory: pathlib.Path, console: Console) -> list[Record]:
    """Trains each width on fresh data until one learns the task; accuracies on held-out data.

    A training ends when the accuracy on validation batches, looked at every ``log_every`` steps, is ``enough``. If no
    width learns the task, ``least_width`` is twice the largest that was tried, a lower bound, and ``learned`` is false.
    """
    dataset = data.load(config.data)
    bits, batch = dataset.vocabulary.bit_length() - 1, config.train.batch
    valid, test = (data.held_out(dataset, s, batch, config.train.evaluation_batches) for s in SPLITS[1:])
    begun = time.monotonic()
    records: list[Record] = []
    accuracies: list[float] = []
    learned, last = False, 0
    for width in config.widths:
        model = make_model(config, width, bits, dataset.num_classes)
        optimizer = make_optimizer(config.train, model)
        for last in range(config.train.log_every, config.train.steps + 1, config.train.log_every):
            steps = range(last - config.train.log_every, last)
            batches = [
                dataset.draw(np.random.default_rng([config.seed, i]), config.train.batch, "train") for i in steps
            ]
            train_steps(model, optimizer, {name: np.stack([b[name] for b in batches]) for name in batches[0]})
            learned = _accuracy(model, valid) >= config.enough
            if learned:
                break
        parameters = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
        accuracies.append(_accuracy(model, test))
        records.append({"width": width, "accuracy": accuracies[-1], "steps": last, "parameters": parameters})
        if learned:
            break
    asked = np.concatenate([batch["targets"][batch["targets"] >= 0] for batch in test])
    summary: Record = {
        "least_width": records[-1]["width"] if learned else 2 * config.widths[-1],
        "learned": learned,
        "best_accuracy": max(accuracies),
        "commonest": float(np.bincount(asked).max() / len(asked)),
        "seconds": round(time.monotonic() - begun, 1),
    }
    return [summary, *records]


def _accuracy(model: MatchModel, batches: Iterable[Batch]) -> float:
    return float(np.mean([hits(model, batch) for batch in batches]))


def _kind(name: str) -> str:
    """The name of a configuration without the size of its task."""
    return name.rpartition("-n")[0]


def table(records: Frame) -> Iterable[str]:
    """The least width of each kind of attention by the size of the task, and the accuracy of the widest model."""
    summaries = having(records, "least_width").assign(
        kind=lambda found: found["configuration"].map(_kind),
        size=lambda found: found["configuration"].str.rpartition("-n")[2].astype(int),
    )
    columns = {"quoted": True, "head": "attention"}
    yield "Least width that reaches the accuracy wanted; twice the largest that was tried where none does."
    yield pivot(summaries, "kind", "size", "least_width", cell=whole, **columns)
    yield "Best accuracy of any width."
    yield pivot(summaries, "kind", "size", "best_accuracy", cell=spread, **columns)
    commonest = summaries.groupby("size")["commonest"].mean()
    shares = ", ".join(f"{share:.3f} for {size}" for size, share in commonest.items())
    yield f"The commonest answer has the share {shares}."


def figure(records: Frame) -> Figure:
    """Accuracy by width, for each size of the task; where one width was tried, the accuracy of every run."""
    found = having(records, "width").assign(
        kind=lambda found: found["configuration"].map(_kind),
        size=lambda found: found["configuration"].str.rpartition("-n")[2].astype(int),
    )
    if found["width"].nunique() == found["size"].nunique() == 1:
        return _runs(found)
    return curves(
        found.sort_values("size"),
        x="width",
        y="accuracy",
        by="kind",
        panel="size",
        labels=("width", "accuracy"),
        scales=("log", "linear"),
        titles=lambda size: f"{size} tokens",
        columns=2,
    )


def _runs(found: Frame) -> Figure:
    drawn, (axes,) = panels(1, size=(7.0, 3.6))
    for kind, style in method_styles(list(dict.fromkeys(found["kind"]))).items():
        accuracies = found[found["kind"] == kind]["accuracy"]
        axes.plot([kind.replace("-", " ")] * len(accuracies), accuracies, **{**style, "linestyle": ""})
    axes.set(ylabel="accuracy", ylim=(0, 1.05))
    light_grid(axes)
    return drawn
