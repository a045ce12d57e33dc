"""Every method at the largest size that takes a given share of the time of exact attention: its score at equal time."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
from rich.console import Console

from approx_attention.compare import environment
from approx_attention.diagnostics import time_interleaved
from approx_attention.registry import get_method
from experiments import data
from experiments.config import STRICT, ConfigError, Count, as_plain
from experiments.models import AttentionConfig
from experiments.training import TrainingConfig
from experiments.whole_picture.comparison import keep, layer, rank_correlation, train_each

# Sizes that are tried, over the usual size of a method.
TIMES_USUAL = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2)


@dataclasses.dataclass(frozen=True)
class EqualTimeConfig:
    """A task, and the methods to train on it, by the name they are reported under.

    Attributes:
        training: what is trained; its own attention is the exact one that all are held to.
        methods: their hyper-parameters but for the size, which is found.
        share: of the time of a layer with exact attention, that a layer may take.
        rounds: how often layers are timed, in turn with exact attention.
    """

    training: TrainingConfig
    methods: dict[str, AttentionConfig]
    share: float = 0.5
    rounds: Count = 20
    seed: int = 0

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        if self.training.attention != AttentionConfig() or self.training.seed != 0:
            raise ValueError("'training' has exact attention, and no seed of its own")
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {self.share}")
        for name, attention in self.methods.items():
            size = get_method(attention.method).size
            if attention.method == "exact" or size in attention.settings:
                raise ValueError(f"{name!r}: exact attention is what all are held to, and sizes are found, not given")


def run(config: EqualTimeConfig, directory: pathlib.Path, console: Console) -> dict[str, Any]:
    """Size, time, score and error of attention of every method that is fast enough, beside exact attention.

    ``too_slow`` has those that are not at their smallest size, with the share of the time that this takes.
    """
    dataset = data.load(config.training.data)
    sizes = shared_sizes(config, directory, data.held_out(dataset, "valid", 1, 1)[0]["tokens"].shape[1])
    fitting = {name: entry for name, entry in sizes.items() if entry["share"] <= config.share}
    methods = {name: _of_size(config.methods[name], entry["size"]) for name, entry in fitting.items()}
    trained = train_each(
        dataclasses.replace(config.training, seed=config.seed),
        {"exact": AttentionConfig()} | methods,
        directory,
        console,
    )
    entries = {name: {**trained[name], **entry} for name, entry in fitting.items()}
    return {
        "methods": {"exact": {**trained["exact"], "size": None, "share": 1.0}} | entries,
        "too_slow": {name: entry["share"] for name, entry in sizes.items() if name not in fitting},
        "share": config.share,
        "rank_correlation": rank_correlation(
            [entry["attention_error"] for entry in entries.values()], [entry["bits"] for entry in entries.values()]
        ),
        "data": dict(dataset.provenance),
    }


def shared_sizes(config: EqualTimeConfig, directory: pathlib.Path, length: int) -> dict[str, dict[str, Any]]:
    """What `fit_sizes` finds, once for all seeds of an arm: else the noise of a clock would give each its own sizes."""
    path = directory.with_name(directory.name.rpartition("-seed")[0] + "-sizes.json")
    settings = json.loads(json.dumps(as_plain(dataclasses.replace(config, seed=0))))
    if path.exists():
        held = json.loads(path.read_text())
        if held["config"] != settings:
            raise ConfigError(f"{path} holds the sizes of other settings; remove it, and they are found again")
        return held["sizes"]
    sizes = fit_sizes(config, length)
    keep(path, {"config": settings, "environment": environment(), "sizes": sizes})
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
    """The sizes of a method that are tried at a length, the smallest first; one for a method without."""
    method = get_method(attention.method)
    if method.size is None:
        return [None]
    sizes = (max(1, math.floor(times * method.usual_size)) for times in TIMES_USUAL)
    return list(dict.fromkeys(size for size in sizes if size <= length // 2))


def _of_size(attention: AttentionConfig, size: int | None) -> AttentionConfig:
    if size is None:
        return attention
    return dataclasses.replace(attention, settings={**attention.settings, str(get_method(attention.method).size): size})
