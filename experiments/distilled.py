"""A model trained with exact attention, whose attention other modules then learn to compute.

Module of several studies, which differ in data and model.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np
from rich.console import Console

from experiments import data, fitting
from experiments.fitting import FitConfig, Layer, Subject
from experiments.models import attention_layers
from experiments.results import Record
from experiments.training import TrainsExact, evaluate, fit, mean_bits, predict

table, figure = fitting.table, fitting.figure


@dataclasses.dataclass(frozen=True)
class Config(TrainsExact):
    """What is trained, and what is fitted to it then."""

    fit: FitConfig


def run(config: Config, directory: pathlib.Path, console: Console) -> list[Record]:
    """One record for each method; its scores are those of training, and what tunes it is the loss of training."""
    training = config.seeded_training
    model, dataset, _ = fit(training, directory, console)
    first = next(iter(attention_layers(model).values()))
    held_out = data.held_out(dataset, "valid", config.fit.batch, 4)

    def score(model: Any) -> dict[str, float]:
        scores = evaluate(training, model, dataset, "test")
        return {name: scores[name] for name in ("bits", "accuracy")}

    # Of another stream than the batches of training, which count steps.
    batches = [
        dataset.draw(np.random.default_rng([config.seed, 1, step]), config.fit.batch, "train")
        for step in range(config.fit.steps + config.fit.tuning_steps)
    ]
    length = model.positions.shape[0] if dataset.kind == "image" else held_out[0]["tokens"].shape[1]  # pyright: ignore
    subject = Subject(
        teacher=model,
        layer=Layer(first.num_kv_heads, first.head_dim, length, first.is_causal),
        batches=batches[: config.fit.steps],
        tuning_batches=batches[config.fit.steps :],
        held_out=held_out,
        call=predict,
        loss=mean_bits,
        score=score,
    )
    return [fitting.fitted(subject, method, config.fit, config.seed, console) for method in config.fit.methods]
