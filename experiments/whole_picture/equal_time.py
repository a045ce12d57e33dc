"""Every method at the largest size that takes a given share of the time of exact attention: its score at equal time."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Console

from approx_attention.evaluation import environment, time_interleaved
from approx_attention.registry import get_method
from experiments import data
from experiments.config import ConfigError, Count, Named, Positive, Seeded, Share, as_plain
from experiments.data import Dataset
from experiments.fidelity import attention_errors
from experiments.models import AttentionConfig, use_attention
from experiments.run_files import locked, read_json, write_json
from experiments.training import TrainingConfig, evaluate, fit, make_optimizer, train_step
from experiments.whole_picture.comparison import kept, layer

# Sizes that are tried, over the usual size of a method.
TIMES_USUAL = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2)


@dataclasses.dataclass(frozen=True)
class EqualTimeConfig(Seeded):
    """A model trained with exact attention, and the methods that take its place and are trained on.

    Attributes:
        training: what is trained with exact attention, which all are held to.
        methods: by the name they are reported under, with their hyper-parameters but for the size, which is found.
        tuning: steps of training that follow with each method, and with exact attention too.
        share: of the time of a layer with exact attention, that a layer may take.
        rounds: how often layers are timed, in turn with exact attention.
    """

    training: TrainingConfig
    methods: Named[AttentionConfig]
    tuning: Count
    share: Share = 0.5
    rounds: Count = 20

    def __post_init__(self) -> None:
        if self.training.attention != AttentionConfig() or self.training.seed != 0:
            raise ValueError("'training' has exact attention, and no seed of its own")
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {self.share}")
        for name, attention in self.methods.items():
            size = get_method(attention.method).size
            if attention.method == "exact" or size in attention.settings:
                raise ValueError(f"{name!r}: exact attention is what all are held to, and sizes are found, not given")


@dataclasses.dataclass(frozen=True)
class FoundSize:
    """The largest size of a method within the share of the time, and the time it takes."""

    size: Count | None
    share: Positive
    seconds: Positive


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The parts of the file of sizes that seeds share."""

    config: dict[str, Any]
    sizes: dict[str, FoundSize]


def run(config: EqualTimeConfig, directory: pathlib.Path, console: Console) -> dict[str, Any]:
    """Size, time, error of attention and scores of every method that is fast enough, beside exact attention.

    ``error`` and ``untuned`` are those of the method in the place of exact attention, with the weights as they are;
    ``bits`` and ``accuracy`` are those after the further training. ``too_slow`` has the methods that are not within the
    share of the time at their smallest size, with the share that they take.
    """
    training = dataclasses.replace(config.training, seed=config.seed)
    model, dataset, _ = fit(training, directory, console)
    example = data.held_out(dataset, "valid", 1, 1)[0]
    sizes = shared_sizes(config, directory, example["tokens"].shape[1])
    fitting = {name: entry for name, entry in sizes.items() if entry["share"] <= config.share}
    methods = {name: _of_size(config.methods[name], entry["size"]) for name, entry in fitting.items()}
    scores = kept(directory, ("bits", "accuracy", "untuned", "error"))
    for name, attention in ({"exact": AttentionConfig()} | methods).items():
        if name in scores:
            continue
        changed = nnx.clone(model)
        use_attention(changed, attention)
        untuned = evaluate(training, changed, dataset, "test")["bits"]
        tune(training, config.tuning, changed, dataset)
        scores[name] = {
            **evaluate(training, changed, dataset, "test"),
            "untuned": untuned,
            "error": attention_errors(model, example, {name: attention})[name]["mean"],
        }
        write_json(directory / "methods.json", scores)
        console.print(f"{directory.name} {name}: {untuned:.3f} bits, tuned {scores[name]['bits']:.3f}")
        jax.clear_caches()
    return {
        "methods": {"exact": {**scores["exact"], "size": None, "share": 1.0}}
        | {name: {**scores[name], **entry} for name, entry in fitting.items()},
        "too_slow": {name: entry["share"] for name, entry in sizes.items() if name not in fitting},
        "data": dict(dataset.provenance),
    }


def tune(training: TrainingConfig, steps: int, model: nnx.Module, dataset: Dataset) -> None:
    """Trains on, from a fresh optimizer, with batches that the model has not seen."""
    optimizer = make_optimizer(dataclasses.replace(training.train, steps=steps), model)
    for step in range(training.train.steps, training.train.steps + steps):
        batch = dataset.draw(np.random.default_rng([training.seed, step]), training.train.batch, "train")
        train_step(model, optimizer, batch)


def shared_sizes(config: EqualTimeConfig, directory: pathlib.Path, length: int) -> dict[str, dict[str, Any]]:
    """What `fit_sizes` finds, once for all seeds of an arm: else the noise of a clock would give each its own sizes."""
    path = directory.with_name(directory.name.rpartition("-seed")[0] + "-sizes.json")
    settings = json.loads(json.dumps(as_plain(dataclasses.replace(config, seed=0))))
    with locked(path.with_suffix(".lock"), path):
        if path.exists():
            held = read_json(path, Sizes, "the sizes are found again")
            if held["config"] != settings:
                raise ConfigError(f"{path} holds the sizes of other settings; remove it, and they are found again")
            return held["sizes"]
        sizes = fit_sizes(config, length)
        write_json(path, {"config": settings, "environment": environment(), "sizes": sizes})
        return sizes


def fit_sizes(config: EqualTimeConfig, length: int) -> dict[str, dict[str, Any]]:
    """For each method the largest size within the share of the time, else the smallest, and the share it takes."""
    is_causal = data.load(config.training.data).is_causal
    exact = layer(config.training, AttentionConfig(), length, is_causal)
    found = {}
    for name, attention in config.methods.items():
        for size in sizes_of(attention, length):
            own = layer(config.training, _of_size(attention, size), length, is_causal)
            timings = time_interleaved({"own": own, "exact": exact}, rounds=config.rounds)
            share = timings["own"].least / timings["exact"].least
            if name in found and share > config.share:
                break
            found[name] = {"size": size, "share": share, "seconds": timings["own"].least}
        jax.clear_caches()
    return found


def sizes_of(attention: AttentionConfig, length: int) -> Iterable[int | None]:
    """The sizes of a method that are tried, the smallest first and up to half of the length; None where it has none."""
    method = get_method(attention.method)
    if method.size is None:
        return [None]
    sizes = (max(1, min(math.floor(times * method.usual_size), length // 2)) for times in TIMES_USUAL)
    return list(dict.fromkeys(sizes))


def _of_size(attention: AttentionConfig, size: int | None) -> AttentionConfig:
    if size is None:
        return attention
    return dataclasses.replace(attention, settings={**attention.settings, str(get_method(attention.method).size): size})
