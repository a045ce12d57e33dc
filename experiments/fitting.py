"""Modules with learned parts in place of a model's attention: fitted to it, and then the whole model tuned.

What the studies of this share.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import optax
from flax import nnx
from jax import Array
from matplotlib.figure import Figure
from rich.console import Console

from approx_attention.core import unknown
from approx_attention.evaluation import light_grid, method_styles
from approx_attention.nnx import (
    ApproxAttention,
    Eva,
    Hedgehog,
    Lara,
    LinformerAttention,
    Rfa,
    distill_attention,
    evabyte,
    layer_errors,
    mean_pool_init,
    tune,
)
from experiments.config import STRICT, Count, Positive
from experiments.results import Frame, Record
from experiments.show import code, markdown, parts, spread

# Points of a learning curve.
POINTS = 20
# A method without a learned part has no fit; all are tuned.
BASELINES = ("exact", "mean_value", "local")


class Layer(NamedTuple):
    """What a module needs to know of a layer: its key heads, their channels, the longest input, and its causality."""

    num_kv_heads: int
    head_dim: int
    length: int
    is_causal: bool


def _options(of: Layer, size: int) -> dict[str, Any]:
    """Causal forms sum the nearest tokens exactly, which short blocks keep from being most of a short sequence."""
    return {"is_causal": True, "block_size": size} if of.is_causal else {}


def favor(of: Layer, size: int, rngs: nnx.Rngs) -> ApproxAttention:
    """FAVOR+ with learned features, as many as Hedgehog has."""
    options: dict[str, Any] = {**_options(of, size), "num_features": 2 * of.head_dim}
    return ApproxAttention("favor", learned=("projection",), head_dim=of.head_dim, rngs=rngs, **options)


def rfa(of: Layer, size: int, rngs: nnx.Rngs) -> nnx.Module:
    """RFA with a learned bandwidth, and as many features."""
    options = {**_options(of, size), "num_features": 2 * of.head_dim}
    return Rfa(of.head_dim, of.num_kv_heads, options=options, rngs=rngs)


def hedgehog(of: Layer, size: int, rngs: nnx.Rngs) -> nnx.Module:
    """Hedgehog, whose number of features follows from the channels."""
    return Hedgehog(of.head_dim, of.num_kv_heads, **_options(of, size))


def linformer(of: Layer, size: int, rngs: nnx.Rngs) -> nnx.Module:
    """Linformer with projections for each head."""
    options: dict[str, Any] = {"num_slots": size, "sharing": "none", "init": mean_pool_init()}
    return LinformerAttention(of.num_kv_heads, of.length, is_causal=of.is_causal, rngs=rngs, **options)


def eva(of: Layer, size: int, rngs: nnx.Rngs) -> nnx.Module:
    """EVA with as many chunks as a window has tokens, and learned adaptors; the causal form has learned pooling."""
    if of.is_causal:
        chunk = max(1, of.length // size)
        return evabyte(of.head_dim, of.num_kv_heads, window_size=size, chunk_size=chunk, rngs=rngs)
    options = {"window_size": size, "num_chunks": size}
    return Eva(of.head_dim, of.num_kv_heads, options=options, adaptors=True, rngs=rngs)


def lara(of: Layer, size: int, rngs: nnx.Rngs) -> nnx.Module:
    """LARA with learned proposals."""
    if of.is_causal:
        raise ValueError("lara has no causal form")
    return Lara(of.head_dim, num_landmarks=size, rngs=rngs)


MODULES: dict[str, Callable[[Layer, int, nnx.Rngs], nnx.Module]] = {
    "favor": favor, "rfa": rfa, "hedgehog": hedgehog, "linformer": linformer, "eva": eva, "lara": lara,
}  # fmt: skip


def attention_fn(method: str, of: Layer, size: int, rngs: nnx.Rngs) -> ApproxAttention:
    """The attention of one layer."""
    if method in MODULES:
        module = MODULES[method](of, size, rngs)
        if isinstance(module, ApproxAttention):
            return module
        return ApproxAttention(module, is_causal=of.is_causal, rngs=rngs)
    options: dict[str, Any] = {"window_size": size} if method == "local" else {}
    return ApproxAttention(method, is_causal=of.is_causal, **options)


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """Sizes and steps.

    Attributes:
        methods: names in `MODULES` or `BASELINES`.
        size: slots of Linformer, chunks of EVA and its window, landmarks of LARA, the window of `local`.
        batch: sequences of a step.
        steps: of fitting attention.
        tuning_steps: of the whole model after that.
        learning_rate: of Adam, while fitting.
        tuning_rate: of Adam, while tuning.
    """

    methods: list[str]
    size: Count = 16
    batch: Count = 8
    steps: Count = 100
    tuning_steps: Count = 20
    learning_rate: Positive = 0.003
    tuning_rate: Positive = 1e-4

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        known = (*MODULES, *BASELINES)
        for name in self.methods:
            if name not in known:
                raise ValueError(unknown("method", name, known))


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model with exact attention, and what it is fitted, tuned and judged by.

    Attributes:
        teacher: the model.
        layer: what its attention layers are like.
        batches: inputs to fit to.
        tuning_batches: what ``loss`` takes.
        held_out: inputs on which errors are measured.
        call: ``(model, batch)``, runs the model.
        loss: ``(model, batch) -> number``, which tuning makes small.
        score: of a model, by name.
    """

    teacher: nnx.Module
    layer: Layer
    batches: Sequence[Any]
    tuning_batches: Sequence[Any]
    held_out: Sequence[Any]
    call: Callable[[Any, Any], Any]
    loss: Callable[[Any, Any], Array]
    score: Callable[[nnx.Module], dict[str, float]]


def fitted(subject: Subject, method: str, config: FitConfig, seed: int, console: Console) -> Record:
    """Errors of attention and scores of the model: as a method is put in, after fitting, and after tuning."""
    model, rngs = nnx.clone(subject.teacher), nnx.Rngs(seed)
    for _, layer in list(nnx.iter_graph(model)):
        if hasattr(layer, "attention_fn"):
            layer.attention_fn = nnx.data(attention_fn(method, subject.layer, config.size, rngs))
    scores, losses = {"before": subject.score(model)}, []
    record: Record = {"method": method}
    if method in MODULES:
        made = distill_attention(
            model,
            subject.teacher,
            subject.batches,
            config.steps,
            optimizer=optax.adam(config.learning_rate),
            held_out=subject.held_out,
            call=subject.call,
            on_step=lambda state, loss: losses.append(loss),
        )
        scores["fitted"] = subject.score(model)
        errors = np.sqrt(np.array(losses, np.float64))
        record |= {
            "error_before": mean_error(made.before),
            "error_fitted": mean_error(made.after),
            "tokens_read": made.num_tokens,
            "tokens_needed": needed(errors) * made.num_tokens // config.steps,
            "curve": [float(part.mean()) for part in np.array_split(errors, min(POINTS, len(errors)))],
        }
    else:
        found = layer_errors(model, subject.teacher, subject.held_out, call=subject.call)
        record["error_before"] = mean_error(found)
    tune(model, subject.loss, subject.tuning_batches, config.tuning_steps, optimizer=optax.adam(config.tuning_rate))
    scores["tuned"] = subject.score(model)
    record |= {f"{name}_{stage}": x for stage, of in scores.items() for name, x in of.items()}
    for name in scores["before"]:
        console.print(f"{method}: {name} {' -> '.join(f'{of[name]:.3f}' for of in scores.values())}")
    return record


def mean_error(errors: dict[str, Array]) -> float:
    """The mean over layers and heads."""
    return float(np.mean([*errors.values()]))


def needed(errors: np.ndarray) -> int:
    """The step after which nine tenths of the fall of an error were reached; errors of single steps are averaged."""
    width = max(1, len(errors) // POINTS)
    smooth = np.convolve(errors, np.full(width, 1 / width), mode="valid")
    return int(np.argmax(smooth <= smooth[0] + 0.9 * min(smooth[-1] - smooth[0], 0))) + width


STAGES = ("before", "fitted", "tuned")


def score_names(records: Frame) -> list[str]:
    """The scores that records have."""
    return [name.removesuffix("_tuned") for name in records if name.endswith("_tuned")]


def table(records: Frame) -> Iterable[str]:
    """Errors and scores at each stage, and how many tokens the fit took."""

    def cell(own: Frame, name: str, shown: Callable[[list[float]], str] = spread) -> str:
        values = [] if name not in own else [x for x in own[name] if not math.isnan(x)]
        return shown(values) if values else ""

    def tokens(values: list[float]) -> str:
        return f"{sum(values) / len(values):,.0f}"

    names = score_names(records)
    columns = ["error_before", "error_fitted", *(f"{name}_{stage}" for name in names for stage in STAGES)]
    rows = [
        [code(method), *(cell(own, name) for name in columns), *(cell(own, x, tokens) for x in TOKENS)]
        for method, own in parts(records, "method")
    ]
    yield (
        "Relative error of the attention and scores of the model: as the method is put in, after its learned parts are "
        "fitted, and after the whole model is tuned. Tokens: those that the fit has read, and those by which nine "
        "tenths of its progress were made."
    )
    heads = [column.replace("_", " ") for column in columns]
    yield markdown(["", *heads, "tokens", "nine tenths"], rows)


TOKENS = ("tokens_read", "tokens_needed")


def figure(records: Frame) -> Figure:
    """The first score at each stage, and the error of the attention while it is fitted."""
    name, drawn = score_names(records)[0], Figure(figsize=(10, 4.2))
    left, right = drawn.subplots(1, 2)
    styles = method_styles(dict.fromkeys(records["method"]))
    for method, own in parts(records, "method"):
        means = {i: own[f"{name}_{stage}"].mean() for i, stage in enumerate(STAGES) if f"{name}_{stage}" in own}
        means = {i: x for i, x in means.items() if not math.isnan(x)}
        left.plot(list(means), list(means.values()), label=method, **styles[method])
        curves = [x for x in own.get("curve", []) if isinstance(x, list)]
        if curves:
            shares = (np.arange(len(curves[0])) + 0.5) / len(curves[0])
            right.plot(shares * own["tokens_read"].mean(), np.mean(curves, axis=0), **styles[method])
    left.set_xticks(range(3), ["as put in", "fitted", "tuned"])
    left.set(ylabel=name)
    right.set(xlabel="tokens read", ylabel="relative attention error while fitting")
    for axes in (left, right):
        light_grid(axes)
    drawn.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return drawn
