"""A model that has read a context and a question, and whose cache is compressed then: does it answer another one?"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array
from matplotlib.figure import Figure
from rich.console import Console

from approx_attention.coresets import ALGORITHMS
from approx_attention.decoding import HEURISTICS, MATCHING
from approx_attention.evaluation import output_error
from approx_attention.nnx import ApproxAttention, compress_caches, init_cache
from experiments import data
from experiments.config import ConfigError, Count, Several, Whole
from experiments.data import DataConfig
from experiments.data.retrieval import QUESTION
from experiments.models import attention_layers
from experiments.results import Frame, Record
from experiments.show import curves, mean, parts, pivot
from experiments.training import TrainsExact, fit

# The tokens of a question before its answer.
ASKED = QUESTION - 1
# The mass correction of `compress_caches`, by what follows a "+" in the name of a policy.
CORRECTIONS: dict[str, Any] = {"": False, "mass": True, "fitted": "fitted"}


def parse_policy(policy: str) -> tuple[str, Any]:
    """The name of a policy, and its mass correction.

    Raises:
        ValueError: it is none of: an algorithm, ``attention_matching``, a heuristic with or without a correction.
    """
    name, _, correction = policy.partition("+")
    known = {*ALGORITHMS, *HEURISTICS, *MATCHING}
    if name not in known or correction not in CORRECTIONS or (correction and name not in HEURISTICS):
        raise ValueError(
            f"unknown policy {policy!r}; known are {', '.join(sorted(known))}, and heuristics with +mass or +fitted"
        )
    return name, CORRECTIONS[correction]


@dataclasses.dataclass(frozen=True)
class Config(TrainsExact):
    """What is trained with exact attention on questions about contexts, and how its caches are compressed.

    Attributes:
        training: of a model on the data ``retrieval``.
        tasks: of `data.retrieval.tasks`, each of which is scored.
        policies: as in `compress_tokens`, by name; heuristics with ``+mass`` or ``+fitted`` for mass correction.
        budgets: tokens of every head for all that is older than the exact blocks.
        bits: of the compressed tokens: 8, 4, or 32 for no rounding.
        block_size: the last one or two blocks of this number of tokens stay exact.
        coreset_size: tokens that stand for those after the compression.
        sinks: first tokens kept exactly.
        keep_queries: last queries that policies read.
        chunk: tokens of the context that the second pass of ``kvzip`` reads at a time, each after the whole prompt: no
            position is then further from the context than those of the training.
        batches: held-out batches of each task.
    """

    policies: Several[str]
    budgets: Several[Count]
    tasks: Several[str] = dataclasses.field(default_factory=lambda: ["needle", "needles", "key_value", "variables"])
    bits: Several[Count] = dataclasses.field(default_factory=lambda: [32])
    block_size: Count = 4
    coreset_size: Count = 8
    sinks: Whole = 0
    keep_queries: Count = 16
    chunk: Count = 16
    batches: Count = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        for policy in self.policies:
            parse_policy(policy)
        if self.training.data.name != "retrieval":
            raise ValueError(f"training.data.name must be 'retrieval', got {self.training.data.name!r}")
        if self.chunk > self.keep_queries:
            raise ValueError(f"the queries of a chunk must be kept: {self.chunk} are more than {self.keep_queries}")


class _Watched(ApproxAttention):
    """Exact attention that leaves its last output in the model's state."""

    def __init__(self) -> None:
        super().__init__("exact", is_causal=True)
        self.out = nnx.data(None)

    def __call__(self, *args: Any, **options: Any) -> Array:
        out = super().__call__(*args, **options)
        self.out = nnx.Intermediate(out)
        return out


def run(config: Config, directory: pathlib.Path, console: Console) -> list[Record]:
    """A record for every task, policy, budget, number of bits and question.

    The prompt is the context and a first question, without its answer. After the compression this question is asked
    again (``seen``), and another one about the same context (``new``), which policies that read queries did not see.
    Each record has the accuracy of the answer, the relative error of attention outputs at the question (mean over
    layers), and the bytes of the cache of a sequence. The policy ``none`` does not compress.
    """
    training = config.training
    model, dataset, seconds = fit(config.seeded_training, directory, console)
    for layer in attention_layers(model).values():
        layer.attention_fn = nnx.data(_Watched())
    records: list[Record] = []
    for task in config.tasks:
        settings = training.data.settings | {"task": task, "questions": 2}
        asked = data.load(DataConfig("retrieval", settings))
        if asked.vocabulary != dataset.vocabulary:
            raise ConfigError("the tasks that are scored must have the vocabulary of the training")
        batches = data.held_out(asked, "test", training.train.batch, config.batches)
        records += [
            {"task": task, **record, "guess": asked.oracles["a value at random"], "training_seconds": round(seconds, 1)}
            for record in _scores(config, model, [np.asarray(batch["tokens"]) for batch in batches], asked.context)
        ]
        whole: Any = [r["accuracy"] for r in records if r["task"] == task and r["policy"] == "none"]
        accuracy = max(whole, default=0)
        console.print(f"{task}: {accuracy:.3f} without compression")
    return records


def _scores(config: Config, model: nnx.Module, batches: list[np.ndarray], context: int) -> Iterator[dict[str, Any]]:
    """The records of one task."""
    prefilled = [_prefilled(config, model, tokens[:, : context + ASKED]) for tokens in batches]
    questions = {"seen": slice(context, context + ASKED), "new": slice(context + QUESTION, context + QUESTION + ASKED)}
    truths = {name: [_asked(m, tokens[:, at]) for m, tokens in zip(prefilled, batches, strict=True)]
              for name, at in questions.items()}  # fmt: skip

    def records(caches: list[nnx.Module], taken: int, **what: Any) -> Iterator[dict[str, Any]]:
        for name, at in questions.items():
            right, errors = [], []
            for compressed, tokens, (_, truth) in zip(caches, batches, truths[name], strict=True):
                answer, outs = _asked(compressed, tokens[:, at])
                right.append(np.asarray(answer) == tokens[:, at.stop])
                errors += [float(output_error(out, exact).relative) for out, exact in zip(outs, truth, strict=True)]
            accuracy, error = float(np.mean(right)), float(np.mean(errors))
            yield {**what, "question": name, "accuracy": accuracy, "attention_error": error,
                   "cache_bytes": taken // batches[0].shape[0]}  # fmt: skip

    # The bytes of the cache alone, without the queries that are kept for the policies.
    whole = init_cache(
        nnx.clone(model), len(batches[0]), max_length=context + ASKED + QUESTION, block_size=config.block_size
    )
    yield from records(prefilled, whole, policy="none", budget=context + ASKED, bits=32)
    parts = [
        [_after(m, tokens[:, i : i + config.chunk]) for i in range(0, context, config.chunk)]
        if any(policy.startswith("kvzip") for policy in config.policies)
        else []
        for m, tokens in zip(prefilled, batches, strict=True)
    ]
    for policy, budget, bits in itertools.product(config.policies, config.budgets, config.bits):
        press = _press(policy, budget, None if bits == 32 else bits, config.coreset_size, config.sinks)
        caches, taken = [nnx.clone(m) for m in prefilled], 0
        for index, (cache, second_pass) in enumerate(zip(caches, parts, strict=True)):
            key = jax.random.fold_in(jax.random.key(config.seed), index)
            taken = press(cache, key, queries_of=second_pass if policy.startswith("kvzip") else [])
        yield from records(caches, int(taken), policy=policy, budget=budget, bits=bits)


@functools.cache  # programs are kept from task to task
def _press(policy: str, budget: int, bits: int | None, coreset_size: int, sinks: int) -> Any:
    name, mass_correction = parse_policy(policy)
    options = {"policy": name, "mass_correction": mass_correction, "budget": budget, "bits": bits}
    return nnx.jit(functools.partial(compress_caches, coreset_size=coreset_size, sinks=sinks, **options))


def _prefilled(config: Config, model: nnx.Module, prompt: np.ndarray) -> nnx.Module:
    """A copy of the model that has read a prompt, with its last queries."""
    copy = nnx.clone(model)
    length = prompt.shape[1] + config.chunk + QUESTION
    init_cache(copy, len(prompt), max_length=length, block_size=config.block_size, keep_queries=config.keep_queries)
    _read(copy, prompt)
    return copy


def _after(model: nnx.Module, tokens: np.ndarray) -> nnx.Module:
    """A copy of the model that has read more."""
    copy = nnx.clone(model)
    _read(copy, tokens)
    return copy


@nnx.jit
def _read(model: Any, tokens: np.ndarray) -> tuple[Array, list[Array]]:
    """The likeliest token after these, and the output of attention at them in every layer."""
    logits = model(tokens)
    return logits[:, -1].argmax(-1), [layer.attention_fn.out[...] for layer in attention_layers(model).values()]


def _asked(model: nnx.Module, tokens: np.ndarray) -> tuple[Array, list[Array]]:
    """What a model answers to a question; its caches stay."""
    return _read(nnx.clone(model), tokens)


def table(records: Frame) -> Iterable[str]:
    """Accuracy on the second question by policy and budget, a table for each task."""
    for task, own in parts(records, "task"):
        new = own[own["question"] == "new"]
        whole = new[new["policy"] == "none"]
        yield (
            f"`{task}`: accuracy on a question that was not seen, by the tokens kept; with the whole cache "
            f"{mean(list(whole['accuracy']))}, a value at random {mean(list(whole['guess']))}"
        )
        kept = new[new["policy"] != "none"]
        yield pivot(
            kept, ["policy", "bits"], "budget", ["accuracy", "cache_bytes"], cell=[mean, _bytes], head=["", "bits"]
        )


def _bytes(figures: Any) -> str:
    return f"{figures[0]:.0f}"


def figure(records: Frame) -> Figure:
    """Accuracy on the second question by the bytes of the cache, a panel for each task."""
    return curves(
        records[records["question"] == "new"],
        x="cache_bytes",
        y="accuracy",
        by="policy",
        panel="task",
        labels=("cache bytes of a sequence", "accuracy, question not seen"),
        scales=("log", "linear"),
        ticks=lambda num_bytes: f"{num_bytes / 1024:.0f} KiB",
        columns=2,
    )
