"""Spectra of the attention of a model, layer by layer, trained and as it was initialised."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

from approx_attention.evaluation import spectrum
from approx_attention.nnx import capture_attention
from experiments import data
from experiments.config import ConfigError, Count, Seeded, Share
from experiments.training import TrainingConfig, build_model, fit, predict


@dataclasses.dataclass(frozen=True)
class SpectraConfig(Seeded):
    """A model trained with exact attention, and the share of the singular values that is looked at.

    Attributes:
        share: of the number of tokens: what the largest singular values up to there add up to.
    """

    training: TrainingConfig
    share: Share = 0.25
    examples: Count = 4

    def __post_init__(self) -> None:
        if self.training.seed:
            raise ValueError("the seed of the training is that of the run")
        if self.training.attention.method != "exact" or self.training.model.num_layers < 2:
            raise ValueError("what is looked at is a model of at least 2 layers with exact attention")


def run(config: SpectraConfig, directory: pathlib.Path, console: Console) -> dict[str, Any]:
    """Cumulative spectra of every layer, the mean over heads and examples, of P and of P less the uniform weights."""
    training = dataclasses.replace(config.training, seed=config.seed)
    model, dataset, _ = fit(training, directory, console)
    if dataset.is_causal:
        raise ConfigError(f"data {training.data.name!r} are causal; the spectra are of bidirectional attention")
    batch = data.held_out(dataset, "valid", config.examples, 1)[0]
    result: dict[str, Any] = {}
    for name, of in (("trained", model), ("initial", build_model(training, dataset))):
        layers = [_cumulative(tensors) for tensors in _captured(of, batch).values()]
        length = len(layers[0]["weights"])
        at = max(1, round(config.share * length)) - 1
        result[name] = {
            "curves": {
                kind: {f"layer {i}": [round(float(x), 5) for x in layer[kind]] for i, layer in enumerate(layers)}
                for kind in ("weights", "centred")
            },
            "share": {
                kind: {f"layer {i}": float(layer[kind][at]) for i, layer in enumerate(layers)}
                for kind in ("weights", "centred")
            },
        }
    first, *_, last = result["trained"]["share"]["weights"]
    return {
        **result,
        "rise": {
            kind: result["trained"]["share"][kind][last] - result["trained"]["share"][kind][first]
            for kind in ("weights", "centred")
        },
    }


def _captured(model: nnx.Module, batch: dict[str, Any]) -> dict[str, Any]:
    return capture_attention(model, lambda model: predict(model, {name: jnp.asarray(x) for name, x in batch.items()}))


@jax.jit
def _spectra(query: Any, key: Any) -> Any:
    group = query.shape[2] // key.shape[2]
    key = jnp.repeat(key, group, axis=2)
    return jax.vmap(jax.vmap(spectrum, in_axes=1), in_axes=0)(query, key)


def _cumulative(tensors: dict[str, Any]) -> dict[str, np.ndarray]:
    found = _spectra(*(jnp.asarray(tensors[name], jnp.float32) for name in "qk"))
    return {kind: np.asarray(getattr(found, kind)).mean((0, 1)) for kind in ("weights", "centred")}
