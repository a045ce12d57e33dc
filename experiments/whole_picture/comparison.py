"""What the comparisons of all methods share: each trained on the same task, its score, its error and its time."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from rich.console import Console

from experiments import data
from experiments.config import ConfigError
from experiments.fidelity import attention_errors
from experiments.models import AttentionConfig, SelfAttention
from experiments.run_files import read_json, write_json
from experiments.training import TrainingConfig, evaluate, fit

# Held-out examples that errors of attention are measured on.
ERROR_EXAMPLES = 16

# What is kept of each method that is trained.
FIGURES = ("bits", "accuracy", "attention_error", "error_on_exact", "training_seconds")


def train_one(
    training: TrainingConfig, name: str, attention: AttentionConfig, directory: pathlib.Path, console: Console
) -> tuple[nnx.Module, float]:
    """The model trained with a method, taken up from its checkpoints in ``directory``, and the seconds it took."""
    own = dataclasses.replace(training, attention=attention)
    model, _, seconds = fit(own, directory / "checkpoints" / name, console)
    return model, seconds


def train_each(
    training: TrainingConfig, methods: Mapping[str, AttentionConfig], directory: pathlib.Path, console: Console
) -> dict[str, Any]:
    """Scores and errors of attention of each method, of which one is ``exact``, trained where it is not kept already.

    ``attention_error`` is that of a method on the tensors of the model trained with it, and ``error_on_exact`` that on
    the tensors of the model trained with exact attention, before anything is trained with the method.
    """
    # Each method is kept once it is trained, so that a killed run goes on with the next, and times can be taken again.
    path, trained = directory / "methods.json", kept(directory, FIGURES)
    dataset = data.load(training.data)
    examples = data.held_out(dataset, "valid", ERROR_EXAMPLES, 1)[0]
    reference = None
    for name in [name for name in methods if name not in trained]:
        reference = reference or train_one(training, "exact", methods["exact"], directory, console)[0]
        model, seconds = train_one(training, name, methods[name], directory, console)
        errors = (attention_errors(m, examples, {name: methods[name]})[name] for m in (model, reference))
        own, on_exact = (error["mean"] for error in errors)
        trained[name] = {
            **evaluate(training, model, dataset, "test"),
            "attention_error": own,
            "error_on_exact": on_exact,
            "training_seconds": round(seconds, 1),
        }
        write_json(path, trained)
        console.print(f"{directory.name} {name}: {trained[name]['bits']:.3f} bits, attention error {own:.2f}")
        jax.clear_caches()
    return trained


def kept(directory: pathlib.Path, figures: Iterable[str]) -> dict[str, Any]:
    """The methods that are trained already, with these figures of each."""
    path, remedy = directory / "methods.json", "the methods are trained again"
    if not path.exists():
        return {}
    trained = read_json(path, dict[str, dict[str, Any]], remedy)
    for name, entry in trained.items():
        for figure in figures:
            if not isinstance(entry.get(figure), float):
                raise ConfigError(f"{path} is damaged; remove it, and {remedy} ({name}.{figure} is no number)")
    return trained


def layer(training: TrainingConfig, attention: AttentionConfig, length: int, is_causal: bool) -> Callable[[], Any]:
    """The compiled forward pass of a layer with this attention over a batch of the task."""
    model = training.model
    x = jax.random.normal(jax.random.key(0), (training.train.batch, length, model.model_dim), model.dtype)
    made = SelfAttention(model, attention, is_causal=is_causal, draw=(training.seed, 0), rngs=nnx.Rngs(training.seed))
    return functools.partial(jax.jit(made).lower(x).compile(), x)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's; what is no number ranks last."""
    from scipy import stats

    first, second = ([math.inf if math.isnan(value) else value for value in side] for side in (x, y))
    ranked: Any = stats.spearmanr(first, second)
    return float(ranked.statistic)
