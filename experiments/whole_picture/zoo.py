"""Every method trained on the same task with equally many bytes to answer from: its score, its error and its time."""

import dataclasses
import inspect
import math
import pathlib
import statistics
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from approx_attention.evaluation import time_interleaved
from approx_attention.registry import get_method
from experiments import data
from experiments.config import Count, Named, Seeded
from experiments.harness.quality import bytes_held
from experiments.models import AttentionConfig
from experiments.run_files import read_json, write_json
from experiments.training import TrainingConfig, evaluate
from experiments.whole_picture.choice import choose
from experiments.whole_picture.comparison import (
    ERROR_EXAMPLES,
    FIGURES,
    kept,
    layer,
    rank_correlation,
    train_each,
    train_one,
)

# Not brought to the bytes of the others: two ends of the scale, and weights that are each estimated from all keys.
ENDS = ("exact", "mean_value", "ra")


@dataclasses.dataclass(frozen=True)
class ZooConfig(Seeded):
    """A task, and the methods to train on it, by the name they are reported under; ``exact`` is among them."""

    training: TrainingConfig
    methods: Named[AttentionConfig]
    rounds: Count = 20

    def __post_init__(self) -> None:
        if self.training.seed != 0:
            raise ValueError(f"the seed is a key next to 'training', not in it, where it is {self.training.seed}")
        if self.methods.get("exact") != AttentionConfig():
            raise ValueError("the methods must have 'exact' among them, without settings: all others are held to it")


@dataclasses.dataclass(frozen=True)
class Plan:
    """The parts of plan.json that tables show."""

    method: str
    bits: float
    error_bound: float
    held_out_error: float


def run(config: ZooConfig, directory: pathlib.Path, console: Console) -> dict[str, Any]:
    """Score, errors of attention, bytes and time of each method, and how well the errors tell the scores.

    ``plan`` is what `choose` finds on the tensors of the model trained with exact attention, trained in its turn,
    beside the ``best`` and ``median`` bits of the methods that hold no more: those it can choose from.
    """
    planned = directory / "plan.json"
    before = kept(directory, FIGURES)
    newly_trained = before.keys() != config.methods.keys()
    dataset = data.load(config.training.data)
    examples = data.held_out(dataset, "valid", ERROR_EXAMPLES, 1)[0]
    training = dataclasses.replace(config.training, seed=config.seed)
    trained = train_each(training, config.methods, directory, console)
    length = examples["tokens"].shape[1]
    head_dim = config.training.model.head_dim
    held = {name: answer_bytes(own, length, head_dim, dataset.is_causal) for name, own in config.methods.items()}
    # What methods of equal bytes may differ by, the plan may too.
    budget = int(1.15 * statistics.median(held.values()))
    caches = {name: bytes_held(training, dataset, own) for name, own in config.methods.items()}
    within = [name for name, cache in caches.items() if cache is not None and cache <= budget]
    if newly_trained or not planned.exists():
        reference = train_one(training, "exact", config.methods["exact"], directory, console)[0]
        chosen, facts = choose(reference, examples, config.methods, budget, dataset.is_causal)
        # Checkpoints of another choice are none of this one.
        name = "-".join(["plan", chosen.method, *(f"{of}={x}" for of, x in sorted(chosen.settings.items()))])
        model, spent = train_one(training, name, chosen, directory, console)
        facts |= evaluate(training, model, dataset, "test") | {"training_seconds": round(spent, 1)}
        write_json(planned, facts)
        console.print(f"{directory.name} {name}: {facts['bits']:.3f} bits")
    seconds = layer_seconds(config, length, dataset.is_causal)
    methods = {name: {**trained[name], "answer_bytes": held[name], "seconds": seconds[name]} for name in config.methods}
    others = [entry for name, entry in methods.items() if name != "exact"]
    return {
        "methods": methods,
        "plan": {
            **read_json(planned, Plan, "a method is chosen again"),
            "best": min(methods[name]["bits"] for name in within),
            "median": statistics.median(methods[name]["bits"] for name in within),
        },
        "rank_correlation": {
            error: rank_correlation([entry[error] for entry in others], [entry["bits"] for entry in others])
            for error in ("attention_error", "error_on_exact")
        },
        # What went into training before this pass, where it goes on from one that was broken off.
        "kept_seconds": round(sum(entry["training_seconds"] for entry in before.values()), 1),
        "is_causal": dataset.is_causal,
        "data": dict(dataset.provenance),
        "oracles": dict(dataset.oracles),
    }


def layer_seconds(config: ZooConfig, length: int, is_causal: bool) -> dict[str, float]:
    """The least seconds of a forward pass of each method's layer over a batch of the task, taken in turn."""
    calls = {name: layer(config.training, own, length, is_causal) for name, own in config.methods.items()}
    return {name: timing.least for name, timing in time_interleaved(calls, rounds=config.rounds).items()}


def answer_bytes(attention: AttentionConfig, length: int, head_dim: int, is_causal: bool) -> int:
    """Bytes per key head and sequence of what the last query is answered from, at ``length`` tokens.

    A token has a key, a value and a mass; a feature the values that it has summed, and their mass. Methods that choose
    tokens for each query hold all of them (`CHOOSE`), but answer from those chosen.
    """
    known = inspect.signature(get_method(attention.method).function).parameters
    settings = {name: parameter.default for name, parameter in known.items()} | attention.arguments()
    tokens, features = _ANSWERS_FROM[attention.method](settings, length, head_dim, is_causal)
    return 4 * (min(tokens, length) * (2 * head_dim + 1) + features * (head_dim + 1))


# Methods that hold every token, whatever a query is answered from.
CHOOSE = ("exact", "ra", "bigbird", "top_k", "lsh_top_k", "priority")


def _near(settings: Mapping[str, Any], is_causal: bool, block: str = "block_size") -> int:
    """Tokens that causal forms hold as they are: a block, and the block before."""
    return 2 * settings[block] if is_causal else 0


def _by_blocks(settings: Mapping[str, Any], length: int, is_causal: bool, block: str, size: str) -> int:
    """Tokens, exact or not, of a method that summarises every block for itself."""
    exact = 2 if is_causal else 3 if block == "window_size" else 0
    blocks = -(-length // settings[block])
    return min(exact, blocks) * settings[block] + max(blocks - exact, 0) * settings[size]


# The tokens and the features that a query is answered from: of settings s, at length n, with d channels, if causal c.
_ANSWERS_FROM: Mapping[str, Any] = {
    "exact": lambda s, n, d, c: (n, 0),
    "ra": lambda s, n, d, c: (n, 0),
    "mean_value": lambda s, n, d, c: (1, 0),
    "local": lambda s, n, d, c: (s["window_size"] * (1 if c else 2) - (not c), 0),
    "longformer": lambda s, n, d, c: (s["window_size"] * (1 if c else 2) - (not c) + s["num_global"], 0),
    "bigbird": lambda s, n, d, c: (
        s["block_size"]
        * ((s["num_window_blocks"] + c) // (2 if c else 1) + s["num_global_blocks"] + s["num_random_blocks"]),
        0,
    ),
    "top_k": lambda s, n, d, c: (s["keys_per_query"], 0),
    "lsh_top_k": lambda s, n, d, c: (s["keys_per_query"], 0),
    "priority": lambda s, n, d, c: (s["keys_per_query"], 0),
    "uniform_sample": lambda s, n, d, c: (_near(s, c) + s["sample_size"], 0),
    "importance_sample": lambda s, n, d, c: (s["sample_size"], 0),
    "hyper_attention": lambda s, n, d, c: (s["block_size"] + s["sample_size"], 0),
    "mean_pool": lambda s, n, d, c: (_near(s, c) + s["num_landmarks"], 0),
    "coreset": lambda s, n, d, c: (_near(s, c) + s["coreset_size"] + (s["sinks"] if c else 0), 0),
    "sparse_coreset": lambda s, n, d, c: (_by_blocks(s, n, c, "window_size", "coreset_size"), 0),
    "linformer": lambda s, n, d, c: (s["num_slots"], 0),
    "block_linformer": lambda s, n, d, c: (_by_blocks(s, n, c, "block_size", "slots_per_block"), 0),
    "eva": lambda s, n, d, c: (_near(s, c, "window_size") + (0 if c else s["window_size"]) + s["num_chunks"], 0),
    "nystrom": lambda s, n, d, c: (s["num_landmarks"], 0),
    "skyformer": lambda s, n, d, c: (s["num_landmarks"], 0),
    "favor": lambda s, n, d, c: (_near(s, c), s["num_features"]),
    "rfa": lambda s, n, d, c: (_near(s, c), s["num_features"]),
    "scatterbrain": lambda s, n, d, c: ((2 if c else 3) * s["window_size"], s["num_features"]),
    "lara": lambda s, n, d, c: (0, s["num_landmarks"]),
    "cosformer": lambda s, n, d, c: (0, 2 * d),
    "polynomial": lambda s, n, d, c: (_near(s, c), math.comb(d + (s["degree"] or 2), d)),
}
